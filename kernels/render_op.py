"""The renderer as operators of torch: shapes for tracing, gradients, choice of the kernel."""

import torch
from torch import Tensor

from spairkit.kernels.dispatch import registered


def _render(
    rgba: Tensor,  # [B, N, h, w, C + 1] float32, float16 or bfloat16; the rest is float32
    boxes: Tensor,  # [B, N, 4]
    depth: Tensor,  # [B, N]
    presence: Tensor,  # [B, N]
    background: Tensor,  # [B, C, H, W]
    floor: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """image, image - background, 1 / importance and d image / d background.

    The last three serve the gradients. The difference is saved because computing it from the image
    would cancel digits where presence is small.
    """
    if backend == "cpu":
        from spairkit.kernels.render_cpu import render_cpu as forward
    else:
        from spairkit.kernels.render_triton import render_triton as forward
    return forward(rgba, boxes, depth, presence, background, floor)


_render_op, render_op = registered("spairkit::render", _render)


@_render_op.register_fake
def _(rgba, boxes, depth, presence, background, floor, backend):
    image = background.new_empty(background.shape)
    flat = background.new_empty(background.shape[0], *background.shape[2:])
    return image, torch.empty_like(image), flat, torch.empty_like(flat)


@torch.library.custom_op("spairkit::render_backward", mutates_args=())
def render_backward_op(
    grad_image: Tensor, rgba: Tensor, boxes: Tensor, depth: Tensor, presence: Tensor,
    background: Tensor, change: Tensor, inverse: Tensor, keep: Tensor, floor: float, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of rgba, boxes, depth, presence and background."""
    if backend == "cpu":
        from spairkit.kernels.render_cpu import render_backward_cpu as backward
    else:
        from spairkit.kernels.render_triton_backward import render_backward_triton as backward
    return backward(
        grad_image, rgba, boxes, depth, presence, background, change, inverse, keep, floor
    )


@render_backward_op.register_fake
def _(grad_image, rgba, boxes, depth, presence, background, *saved_and_options):
    return tuple(
        tensor.new_empty(tensor.shape) for tensor in (rgba, boxes, depth, presence, background)
    )


def _save(ctx, inputs, output):
    *tensors, ctx.floor, ctx.backend = inputs
    _, change, inverse, keep = output
    ctx.save_for_backward(*tensors, change, inverse, keep)
    ctx.mark_non_differentiable(change, inverse, keep)
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad_image, *_):
    if grad_image is None:
        return (None,) * 7
    grads = render_backward_op(grad_image, *ctx.saved_tensors, ctx.floor, ctx.backend)
    return *grads, None, None


def _refuse(ctx, *_):
    raise RuntimeError(
        "render has no second derivatives on the backends 'cpu' and 'triton': "
        "use render(..., backend='torch')"
    )


_render_op.register_autograd(_gradients, setup_context=_save)
render_backward_op.register_autograd(_refuse)
