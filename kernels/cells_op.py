"""The compiled loop over cells as one function of torch with a gradient, for the CPU and float32.

The order of weights is that of `spairkit.models.cell_loop`: the first layers' weights for the
context; for where, depth and pres the first layer's weight for its own inputs, then weight and bias
of the second and the last layer; weight and bias of each layer of the encoder, at least two.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from spairkit.kernels import cells_cpu as cells
from spairkit.kernels.cells_cpu import DEPTH, ENCODER, OUTPUTS, PRES, WHERE, Grid, Network, Numbers
from spairkit.kernels.cells_layout import HEADS, OF_HEAD
from spairkit.kernels.threads import arrays, over_images, single_threaded_blas


def encode_cells_cpu(
    grid: Grid,
    numbers: Numbers,
    images: Tensor,  # [B, 3, H, W]
    frames: Tensor,  # [B, 4] scale and shift from coordinates to pixel indices, of y and of x
    products: Tensor,  # [B, K, 3 h] first layers applied to features, with their biases
    normal: Tensor,  # [B, K, M]
    jitter: Tensor,  # [B, K] standard logistic
    edge: Tensor | None,  # [V]
    weights: list[Tensor],
) -> Tensor:  # [B, K, 3 M + 6], columns as in `spairkit.models.latents.unpack`
    """Latents in raster order; gradients to products, edge and weights unless presence is hard.

    Raises:
        RuntimeError: a second derivative was requested.
    """
    inputs = (grid, numbers, images, frames, products, normal, jitter, edge)
    if not torch.is_grad_enabled():
        return _forward(*inputs, weights)[0]
    record: Tensor = _CompiledCells.apply(*inputs, *weights)
    return record


def _forward(
    grid: Grid, numbers: Numbers, images: Tensor, frames: Tensor, products: Tensor, normal: Tensor,
    jitter: Tensor, edge: Tensor | None, weights: Sequence[Tensor],
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """The record, and what the gradients need besides."""
    batch, num_cells, size = normal.shape
    kept: list[Tensor] = []

    def new(columns: int) -> Tensor:
        kept.append(products.new_empty(batch * num_cells, columns))
        return kept[-1]

    networks, contexts = _networks(weights, new)
    record = products.new_empty(batch, num_cells, 3 * size + 6)
    inputs = arrays(images, products, frames, normal, jitter)
    edge = products.new_zeros(size + 1) if edge is None else edge
    shared = arrays(edge, weights[0], weights[HEADS * OF_HEAD + 2][None])
    with single_threaded_blas():
        over_images(
            cells.cells_forward, batch, grid, numbers, networks, *inputs, *shared, contexts,
            record.numpy(),
        )  # fmt: skip
    return record, kept


class _CompiledCells(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, grid: Grid, numbers: Numbers, images: Tensor, frames: Tensor, products: Tensor,
        normal: Tensor, jitter: Tensor, edge: Tensor | None, *weights: Tensor,
    ) -> Tensor:  # fmt: skip
        inputs = (grid, numbers, images, frames, products, normal, jitter, edge)
        record, kept = _forward(*inputs, weights)
        ctx.grid, ctx.numbers, ctx.num_weights = grid, numbers, len(weights)
        # torch notices where one of them is changed, and frees them after the backward pass
        ctx.save_for_backward(images, frames, normal, record, *weights, *kept)
        return record

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_record: Tensor) -> tuple[Tensor | None, ...]:
        images, frames, normal, record, *saved = ctx.saved_tensors
        weights, kept = saved[: ctx.num_weights], iter(saved[ctx.num_weights :])
        networks, contexts = _networks(weights, lambda _: next(kept))
        numbers, context_weight = ctx.numbers, weights[0]
        batch, num_cells, size = normal.shape
        shared = len(context_weight)
        grads = tuple(np.empty_like(network.values) for network in networks)
        grad_added = record.new_empty(batch * num_cells, shared)
        grad_products = record.new_empty(batch, num_cells, shared)
        grad_edges = record.new_empty(batch, size + 1)
        inputs = arrays(images, frames, normal, record, grad_record, context_weight)
        with single_threaded_blas():
            over_images(
                cells.cells_backward, batch, ctx.grid, numbers, networks, grads, *inputs,
                *(x.numpy() for x in (grad_added, grad_products, grad_edges)),
            )  # fmt: skip
        own, *later = _weight_gradients(networks[ENCODER], grads[ENCODER])
        encoder = own, _by_layer(grads[ENCODER], networks[ENCODER])[0].sum(0), *later
        if numbers.training_wheels:
            return (*(None,) * 8, *(None,) * (1 + HEADS * OF_HEAD), *encoder)
        lateral = context_weight.shape[1] > 0
        heads = [_weight_gradients(networks[i], grads[i]) for i in (WHERE, DEPTH, PRES)]
        return (
            *(None,) * 4,
            grad_products,
            *(None,) * 2,
            grad_edges.sum(0) if lateral else None,
            grad_added.t() @ torch.from_numpy(contexts),
            *(grad for head in heads for grad in head),
            *encoder,
        )


def _networks(
    weights: Sequence[Tensor], rows: Callable[[int], Tensor]
) -> tuple[tuple[Network, ...], np.ndarray]:
    """where, encoder, depth and pres, and contexts [R, 4 V] or of no columns.

    `rows` gives [R, columns] for their inputs and values, in turn.
    """
    context, *rest = weights
    parts = [rest[OF_HEAD * i : OF_HEAD * (i + 1)] for i in range(HEADS)]
    first, _, *later = rest[HEADS * OF_HEAD :]
    parts.insert(ENCODER, [first, *later])
    networks = []
    for own, *later in parts:
        layers = _offsets(tuple(len(weight) for weight in (own, *later[::2])))
        flat = torch.cat([weight.detach().flatten() for weight in later[::2]])
        biases = torch.cat([bias.detach() for bias in later[1::2]])
        inputs, values = rows(own.shape[1]), rows(layers[-1, cells.COLUMN] + layers[-1, OUTPUTS])
        parts_of = (x.numpy() for x in (inputs, flat, biases[None], values.flatten()))
        networks.append(Network(layers, *arrays(own), *parts_of))
    return tuple(networks), rows(context.shape[1]).numpy()


@lru_cache(maxsize=64)
def _offsets(outputs: tuple[int, ...]) -> np.ndarray:
    """`Network.layers` from the outputs of each layer."""
    size = np.array(outputs, np.int64)
    weights, biases = np.zeros_like(size), np.zeros_like(size)
    weights[1:], biases[1:] = size[1:] * size[:-1], size[1:]
    starts = (x.cumsum() - x for x in (size, weights, biases))
    return np.stack([size, *starts], axis=1)


def _by_layer(flat: np.ndarray, network: Network) -> list[Tensor]:
    """[R, outputs] of each layer, from values or gradients of all layers."""
    rows = len(network.inputs)
    sizes = [rows * int(outputs) for outputs in network.layers[:, OUTPUTS]]
    return [part.view(rows, -1) for part in torch.from_numpy(flat).split_with_sizes(sizes)]


def _weight_gradients(network: Network, grads: np.ndarray) -> list[Tensor]:
    """Of `own`, then weight and bias of each later layer: one product a layer, over all rows."""
    first, *later = _by_layer(grads, network)
    *below, _ = _by_layer(network.values, network)
    result = [first.t() @ torch.from_numpy(network.inputs)]
    for grad, values in zip(later, below, strict=True):
        result += [grad.t() @ values, grad.sum(0)]
    return result
