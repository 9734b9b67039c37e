"""The presence prior as operators of torch: shapes for tracing, gradients, choice of kernel."""

import torch
from torch import Tensor


@torch.library.custom_op("spairkit::presence_kl", mutates_args=())
def presence_kl_op(
    logits: Tensor,  # [B, n]
    samples: Tensor,  # [B, n] read as samples > 0.5
    success: Tensor,  # [] float64
    backend: str,
) -> tuple[Tensor, Tensor]:
    """KL in nats, [B, n] float32, and log-odds of the prior, [B, n] float64."""
    if backend == "cpu":
        from spairkit.kernels.presence_cpu import presence_kl_cpu as forward
    else:
        from spairkit.kernels.presence_triton import presence_kl_triton as forward
    return forward(logits, samples, success)


@presence_kl_op.register_fake
def _(logits, samples, success, backend):
    kl = samples.new_empty(samples.shape, dtype=torch.float32)
    return kl, samples.new_empty(samples.shape, dtype=torch.float64)


def _save_kl(ctx, inputs, output):
    logits, *_ = inputs
    _, prior_logit = output
    ctx.save_for_backward(logits, prior_logit)
    ctx.mark_non_differentiable(prior_logit)
    ctx.set_materialize_grads(False)


def _kl_gradients(ctx, grad_kl, *_):
    if grad_kl is None:
        return None, None, None, None
    logits, prior_logit = ctx.saved_tensors
    exact = logits.double()
    slope = torch.sigmoid(exact) * torch.sigmoid(-exact) * (exact - prior_logit)
    return (grad_kl * slope).to(logits.dtype), None, None, None


presence_kl_op.register_autograd(_kl_gradients, setup_context=_save_kl)


@torch.library.custom_op("spairkit::count_posterior", mutates_args=())
def count_posterior_op(
    samples: Tensor,  # [B, n] in [0, 1]
    success: Tensor,  # [] float64
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Log-odds of the prior, [B, n] float64, and what the walk back needs (Triton only)."""
    if backend == "cpu":
        from spairkit.kernels.presence_cpu import count_posterior_cpu

        return count_posterior_cpu(samples, success), samples.new_empty(0, dtype=torch.float32)
    from spairkit.kernels.presence_triton import count_posterior_triton

    return count_posterior_triton(samples, success)


@count_posterior_op.register_fake
def _(samples, success, backend):
    prior_logit = samples.new_empty(samples.shape, dtype=torch.float64)
    saved = (0,) if backend == "cpu" else saved_shape(*samples.shape)
    return prior_logit, samples.new_empty(saved, dtype=torch.float32)


@torch.library.custom_op("spairkit::count_posterior_backward", mutates_args=())
def count_posterior_backward_op(
    grad_logit: Tensor, samples: Tensor, success: Tensor, saved: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    """Gradients of the samples, [B, n] float32, and of log(1 - success), [B] float64."""
    if backend == "cpu":
        from spairkit.kernels.presence_cpu import count_posterior_backward_cpu

        return count_posterior_backward_cpu(grad_logit, samples, success)
    from spairkit.kernels.presence_triton import count_posterior_backward_triton

    return count_posterior_backward_triton(grad_logit, samples, saved)


@count_posterior_backward_op.register_fake
def _(grad_logit, samples, success, saved, backend):
    grad_samples = samples.new_empty(samples.shape, dtype=torch.float32)
    return grad_samples, samples.new_empty(samples.shape[:1], dtype=torch.float64)


def _save_walk(ctx, inputs, output):
    samples, success, ctx.backend = inputs
    _, saved = output
    ctx.save_for_backward(samples, success, saved)
    ctx.mark_non_differentiable(saved)
    ctx.set_materialize_grads(False)


def _walk_gradients(ctx, grad_logit, *_):
    if grad_logit is None:
        return None, None, None
    samples, success, saved = ctx.saved_tensors
    grad_samples, grad_log_failure = count_posterior_backward_op(
        grad_logit, samples, success, saved, ctx.backend
    )
    return grad_samples.to(samples.dtype), -grad_log_failure.sum() / (1 - success), None


def _refuse(ctx, *_):
    raise RuntimeError(
        "relaxed samples have no second derivatives on the backends 'cpu' and 'triton': "
        "use backend='torch'"
    )


count_posterior_op.register_autograd(_walk_gradients, setup_context=_save_walk)
count_posterior_backward_op.register_autograd(_refuse)


def walk_block(num_cells: int) -> tuple[int, int, int]:
    """Counts (a power of two above n), cells a block and warps of the Triton walk.

    The product of the first two over 32 times the third is at most 8: more spills registers.
    """
    if num_cells <= 31:
        return 32, 8, 2
    if num_cells <= 127:
        return 128, 8, 4
    if num_cells <= 255:
        return 256, 8, 8
    if num_cells <= 511:
        return 512, 4, 8
    if num_cells <= 1023:
        return 1024, 2, 8
    return 2048, 1, 8


def saved_shape(num_images: int, num_cells: int) -> tuple[int, int, int]:
    """Of what the Triton walk leaves for the way back: the log-weights before each block."""
    num_counts, block, _ = walk_block(num_cells)
    return num_images, (num_cells + block - 1) // block, num_counts
