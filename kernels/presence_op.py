"""The presence prior as operators of torch: shapes for tracing, gradients, choice of the kernel."""

import torch
from torch import Tensor

from spairkit.kernels.dispatch import registered
from spairkit.kernels.presence_blocks import saved_shape


def _presence_kl(
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


_presence_kl_op, presence_kl_op = registered("spairkit::presence_kl", _presence_kl)


@_presence_kl_op.register_fake
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


_presence_kl_op.register_autograd(_kl_gradients, setup_context=_save_kl)


def _count_posterior(
    samples: Tensor,  # [B, n] in [0, 1]
    success: Tensor,  # [] float64
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Log-odds of the prior, [B, n] float64, and log-weights for the backward walk of Triton."""
    if backend == "cpu":
        from spairkit.kernels.presence_cpu import count_posterior_cpu

        return count_posterior_cpu(samples, success), samples.new_empty(0, dtype=torch.float32)
    from spairkit.kernels.presence_triton import count_posterior_triton

    return count_posterior_triton(samples, success)


_count_posterior_op, count_posterior_op = registered("spairkit::count_posterior", _count_posterior)


@_count_posterior_op.register_fake
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


_count_posterior_op.register_autograd(_walk_gradients, setup_context=_save_walk)
count_posterior_backward_op.register_autograd(_refuse)
