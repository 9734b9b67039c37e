"""The compiled loop over cells as one function of torch with a gradient, for the CPU and float32.

Weights come in the order of `spairkit.models.cell_loop`: those of the first layers for the
context; for where, depth and pres those of the first layer for the network's own inputs, then
weight and bias of the second and of the last layer; last, weight and bias of each layer of the
encoder, which has at least two.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from spairkit.kernels.cells_cpu import Grid, Network, Numbers, cells_backward, cells_forward
from spairkit.kernels.threads import over_images, single_threaded_blas

_HEADS = 3  # where, depth, pres
_OF_HEAD = 5  # weights: own, then weight and bias of the second and of the last layer


class _Cells(NamedTuple):
    """Weights, and what a pass leaves for the way back."""

    where: Network
    encoder: Network
    depth: Network
    pres: Network
    contexts: np.ndarray  # [R, 4 V], R = K B, or no columns


def encode_cells_cpu(
    grid: Grid,
    numbers: Numbers,
    images: Tensor,  # [B, 3, H, W]
    products: Tensor,  # [B, K, 3 h] first layers applied to features, with their biases
    normal: Tensor,  # [B, K, M]
    jitter: Tensor,  # [B, K] standard logistic
    edge: Tensor | None,  # [V]
    weights: list[Tensor],
) -> Tensor:  # [B, K, 3 M + 6], columns as in `spairkit.models.latents.unpack`
    """Latents in raster order, with gradients to products, edge and weights.

    Raises:
        RuntimeError: a second derivative is asked for.
    """
    record: Tensor = _CompiledCells.apply(
        grid, numbers, images, products, normal, jitter, edge, *weights
    )
    return record


class _CompiledCells(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        grid: Grid,
        numbers: Numbers,
        images: Tensor,
        products: Tensor,
        normal: Tensor,
        jitter: Tensor,
        edge: Tensor | None,
        *weights: Tensor,
    ) -> Tensor:
        batch, num_cells, size = normal.shape
        arrays = [_array(weight) for weight in weights]
        kept: list[Tensor] = []

        def new(columns: int) -> Tensor:
            kept.append(products.new_empty(batch * num_cells, columns))
            return kept[-1]

        cells = _cells(arrays, new)
        record = products.new_empty(batch, num_cells, 3 * size + 6)
        inputs = [_array(x) for x in (images, products, normal, jitter)]
        beyond = np.zeros(size + 1, np.float32) if edge is None else _array(edge)
        encoder_bias = arrays[_HEADS * _OF_HEAD + 2][None]
        with single_threaded_blas():
            over_images(
                cells_forward, batch, grid, numbers, *inputs, beyond, arrays[0], cells.where,
                cells.encoder, encoder_bias, cells.depth, cells.pres, cells.contexts,
                record.numpy(),
            )  # fmt: skip
        ctx.grid, ctx.numbers, ctx.num_weights = grid, numbers, len(weights)
        # by torch, which sees when one is changed, and frees them after the way back
        ctx.save_for_backward(images, normal, record, *weights, *kept)
        return record

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_record: Tensor) -> tuple[Tensor | None, ...]:
        images, normal, record, *saved = ctx.saved_tensors
        weights, kept = saved[: ctx.num_weights], iter(saved[ctx.num_weights :])
        cells = _cells([_array(weight) for weight in weights], lambda _: next(kept))
        numbers, context_weight = ctx.numbers, weights[0]
        networks = cells.where, cells.encoder, cells.depth, cells.pres
        grads = tuple(tuple(np.empty_like(v) for v in network.values) for network in networks)
        batch, num_cells, size = normal.shape
        shared = len(context_weight)
        grad_added = record.new_empty(batch * num_cells, shared)
        grad_products = record.new_empty(batch, num_cells, shared)
        grad_edges = record.new_empty(batch, size + 1)
        inputs = [_array(x) for x in (images, normal, record, grad_record, context_weight)]
        with single_threaded_blas():
            over_images(
                cells_backward, batch, ctx.grid, numbers, *inputs, *networks, *grads,
                *(x.numpy() for x in (grad_added, grad_products, grad_edges)),
            )  # fmt: skip
        own, *later = _weight_gradients(cells.encoder, grads[1])
        encoder = own, torch.from_numpy(grads[1][0]).sum(0), *later
        if numbers.training_wheels:
            return (*(None,) * 7, *(None,) * (1 + _HEADS * _OF_HEAD), *encoder)
        lateral = context_weight.shape[1] > 0
        heads = [_weight_gradients(networks[i], grads[i]) for i in (0, 2, 3)]
        return (
            *(None,) * 3,
            grad_products,
            *(None,) * 2,
            grad_edges.sum(0) if lateral else None,
            grad_added.t() @ torch.from_numpy(cells.contexts),
            *(grad for head in heads for grad in head),
            *encoder,
        )


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().contiguous().numpy()


def _cells(weights: list[np.ndarray], rows: Callable[[int], Tensor]) -> _Cells:
    """Networks whose inputs and values are what `rows` gives for so many columns, in turn."""
    context, *rest = weights

    def network(own: np.ndarray, later: list[np.ndarray]) -> Network:
        lines, biases = later[::2], later[1::2]
        values = tuple(rows(line.shape[0]).numpy() for line in (own, *lines))
        return Network(own, rows(own.shape[1]).numpy(), tuple(lines), tuple(biases), values)

    heads = [rest[_OF_HEAD * i : _OF_HEAD * (i + 1)] for i in range(_HEADS)]
    where, depth, pres = (network(own, later) for own, *later in heads)
    own, _, *later = rest[_HEADS * _OF_HEAD :]
    return _Cells(where, network(own, later), depth, pres, rows(context.shape[1]).numpy())


def _weight_gradients(network: Network, grads: tuple[np.ndarray, ...]) -> list[Tensor]:
    """Of `own`, then weight and bias of each later layer: one product a layer, over all rows."""
    first, *later = (torch.from_numpy(grad) for grad in grads)
    result = [first.t() @ torch.from_numpy(network.inputs)]
    for grad, values in zip(later, network.values[:-1], strict=True):
        result += [grad.t() @ torch.from_numpy(values), grad.sum(0)]
    return result
