"""The loop over cells in Triton as one function of torch with a gradient, for float32.

The order of weights is that of `spairkit.kernels.cells_op`.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from spairkit.kernels.cells_layout import Numbers, Sizes, columns, tables, weight_gradients
from spairkit.kernels.cells_triton import cells_forward_triton, precision
from spairkit.kernels.cells_triton_backward import cells_backward_triton


def encode_cells_triton(
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
        RuntimeError: a second derivative was requested.
    """
    latents: Tensor = _Cells.apply(numbers, images, products, normal, jitter, edge, *weights)
    return latents


class _Cells(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, numbers: Numbers, images: Tensor, products: Tensor, normal: Tensor,
        jitter: Tensor, edge: Tensor | None, *weights: Tensor,
    ) -> Tensor:  # fmt: skip
        sizes = Sizes.of(weights)
        flat = torch.cat([weight.detach().flatten() for weight in weights])
        counts = tuple(weight.numel() for weight in weights)
        walked = tables(sizes, counts, numbers.training_wheels, images.device)
        images, products, normal, jitter = (
            x.contiguous() for x in (images, products, normal, jitter)
        )
        # without lateral connections nothing is read from it
        rim = flat if edge is None else edge.contiguous()
        # of the backward pass too, which runs outside `torch.autocast`
        ctx.precision = precision(images.device)
        record, latents, packed = cells_forward_triton(
            walked, sizes, numbers, ctx.precision, flat, images, products, normal, jitter, rim
        )
        ctx.numbers, ctx.sizes, ctx.layers = numbers, sizes, walked.backward
        # torch notices where one of them is changed, and frees them after the backward pass
        ctx.save_for_backward(images, normal, record, latents, packed, *weights)
        return latents

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_latents: Tensor) -> tuple[Tensor | None, ...]:
        images, normal, record, latents, packed, *_ = ctx.saved_tensors
        sizes, numbers = ctx.sizes, ctx.numbers
        grads, grad_edges = cells_backward_triton(
            ctx.layers, sizes, numbers, ctx.precision, packed, images, normal, record, latents,
            grad_latents.contiguous(),
        )  # fmt: skip
        grad_products, grad_edge = None, None
        if not numbers.training_wheels:
            first = columns(sizes).first
            grad_products = grads[:, first : first + 3 * sizes.hidden].unflatten(
                0, normal.shape[:2]
            )
            grad_edge = grad_edges.sum(0) if sizes.context else None
        grads_of_weights = weight_gradients(
            sizes, record, grads, packed.dtype, numbers.training_wheels
        )
        return (None, None, grad_products, None, None, grad_edge, *grads_of_weights)
