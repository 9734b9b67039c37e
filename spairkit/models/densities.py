"""Samples, KL divergences and likelihoods (docs/model.md 2.1, 3.3, 5)."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spairkit.backends import Backend, compiled_backend, fused
from spairkit.kernels.constants import LOG_ROOT_TWO_PI, LOGIT_LIMIT

_EPSILON = 1e-9
_LANES = 64  # a multiple of the elements that torch computes at a time


def squash(logits: Tensor) -> Tensor:
    """sigmoid of logits clipped to +-10, in [4.5e-5, 1 - 4.5e-5]; any shape.

    On a CPU, torch computes the last few elements of a tensor by other code than the rest, so an
    image would have other bits in another batch; padding avoids it.
    """
    clipped = logits.clamp(-LOGIT_LIMIT, LOGIT_LIMIT)
    # an exported graph would hold for multiples of the traced batch only
    if clipped.device.type != "cpu" or torch.compiler.is_exporting():
        return torch.sigmoid(clipped)
    rest = -clipped.numel() % _LANES
    if rest == 0:
        return torch.sigmoid(clipped)
    padded = F.pad(clipped.reshape(-1), (0, rest))
    return torch.sigmoid(padded)[: clipped.numel()].view(clipped.shape)


def scaled_squash(
    logits: Tensor, scale: Tensor, bias: Tensor, *, backend: Backend = "auto"
) -> Tensor:
    """squash(logits * scale + bias), in a single pass with Numba or Triton.

    Args:
        logits: any shape.
        scale: the shape of the last axes of `logits`.
        bias: the shape of `scale`.
        backend: as `spairkit.backends.compiled_backend`.
    """
    fits = scale.shape == bias.shape == logits.shape[-scale.dim() :]
    constant = not (scale.requires_grad or bias.requires_grad)
    chosen = compiled_backend(backend, logits, scale, bias) if fits and constant else "torch"
    if chosen == "torch":
        return squash(logits * scale + bias)
    if chosen == "cpu":
        from spairkit.kernels.appearance_cpu import squash_backward_cpu as backward
        from spairkit.kernels.appearance_cpu import squash_cpu as forward
    else:
        from spairkit.kernels.appearance_triton import squash_backward_triton as backward
        from spairkit.kernels.appearance_triton import squash_triton as forward
    return fused(forward, backward, (logits, scale, bias))


class _Limited(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, limit: float) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.limit = limit
        return logits.clamp(-limit, limit)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (logits,) = ctx.saved_tensors
        (grad,) = grads
        return grad * ((logits.abs() <= ctx.limit) | (grad * logits > 0)), None


def limited(logits: Tensor, limit: float) -> Tensor:
    """`logits` clipped to +-limit; outside, gradients pass only if they point back inside."""
    clipped: Tensor = _Limited.apply(logits, limit)  # type: ignore[no-untyped-call]
    return clipped


def normal_kl(mean: Tensor, std: Tensor, prior_mean: float, prior_std: float) -> Tensor:
    """KL(N(mean, std^2) || N(prior_mean, prior_std^2)) in nats, elementwise.

    Latents are normal before their sigmoid, so there is no Jacobian (docs/model.md 1).
    """
    variance = (std / prior_std).square()
    distance = ((mean - prior_mean) / prior_std).square()
    return 0.5 * (variance + distance - 1) - (std / prior_std).log()


Group = tuple[int, float, float]
"""Number of dimensions, and mean and standard deviation of their prior."""


def weighted_kls(
    mean: Tensor,  # [B, K, M]
    std: Tensor,  # [B, K, M] positive
    weight: Tensor,  # [B, K]
    *groups: Group,
    backend: Backend = "auto",
) -> Tensor:  # [B, G]
    """`normal_kl` of consecutive groups of the M dimensions, in nats, weighted, summed over cells.

    mean, std and weight get gradients. `backend` is as in `spairkit.backends.compiled_backend`.
    """
    fits = mean.shape == std.shape == (*weight.shape, sum(size for size, _, _ in groups))
    chosen = compiled_backend(backend, mean, std, weight) if fits else "torch"
    if chosen == "torch":
        sizes = [size for size, _, _ in groups]
        parts = zip(mean.split(sizes, dim=-1), std.split(sizes, dim=-1), groups, strict=True)
        kls = [normal_kl(m, s, *prior).sum(-1) for m, s, (_, *prior) in parts]  # [B, K] each
        return torch.stack([(weight * kl).sum(1) for kl in kls], dim=1)
    if chosen == "cpu":
        from spairkit.kernels.normal_kl_cpu import weighted_kls_backward_cpu as backward
        from spairkit.kernels.normal_kl_cpu import weighted_kls_cpu as forward
    else:
        from spairkit.kernels.normal_kl_triton import weighted_kls_backward_triton as backward
        from spairkit.kernels.normal_kl_triton import weighted_kls_triton as forward
    return fused(forward, backward, (mean, std, weight), groups)


def logistic(uniform: Tensor) -> Tensor:
    """Samples of the standard logistic distribution from samples of U[0, 1), any shape.

    Source: docs/model.md 3.3, with the authors' 1e-9 inside the logarithms.
    """
    return (uniform + _EPSILON).log() - (1 - uniform + _EPSILON).log()


def concrete_sample(logits: Tensor, noise: Tensor, temperature: float) -> Tensor:
    """A relaxed Bernoulli sample in (0, 1), with a gradient to `logits`.

    Args:
        logits: log-odds of 1, any shape.
        noise: samples from `logistic`, the same shape.
        temperature: positive; samples approach 0 and 1 as it approaches 0.
    """
    return torch.sigmoid((logits + noise) / temperature)


def bernoulli_cross_entropy(
    image: Tensor, target: Tensor, floor: float, *, backend: Backend = "auto"
) -> Tensor:
    """-log p(target | image) in nats, summed over all but the first axis: [B, ...] -> [B].

    Args:
        image: reconstruction, in [0, 1] up to rounding.
        target: in [0, 1], not only 0 and 1; the same shape.
        floor: positive, added inside both logarithms.
        backend: as `spairkit.backends.compiled_backend`.

    Source: docs/model.md 5, "Reconstruction".
    """
    fits = image.shape == target.shape and floor >= torch.finfo(torch.float32).tiny
    fits = fits and not target.requires_grad
    chosen = compiled_backend(backend, image, target) if fits else "torch"
    if chosen == "torch":
        return cross_entropy_by_torch(image, target, floor)
    if chosen == "cpu":
        from spairkit.kernels.likelihood_cpu import cross_entropy_backward_cpu as backward
        from spairkit.kernels.likelihood_cpu import cross_entropy_cpu as forward
    else:
        from spairkit.kernels.likelihood_triton import cross_entropy_backward_triton as backward
        from spairkit.kernels.likelihood_triton import cross_entropy_triton as forward
    return fused(forward, backward, (image, target), (floor,))


def cross_entropy_by_torch(image: Tensor, target: Tensor, floor: float) -> Tensor:  # [B]
    """The result of `bernoulli_cross_entropy` by plain torch, on any device and in any dtype."""
    image = image.clamp(0, 1)
    on, off = (image + floor).log(), (1 - image + floor).log()
    return -(off + target * (on - off)).flatten(1).sum(1)


def normal_nll(image: Tensor, target: Tensor, std: Tensor, *, backend: Backend = "auto") -> Tensor:
    """-log p(target | image) in nats, summed over all but the first axis: [B, ...] -> [B].

    Args:
        image: reconstruction, the mean of the normal.
        target: the same shape.
        std: 0-d and positive, the standard deviation of every element.
        backend: as `spairkit.backends.compiled_backend`.

    Source: docs/model.md 5, "Normal likelihood".
    """
    fits = image.shape == target.shape and std.dim() == 0
    constant = not (target.requires_grad or std.requires_grad)
    chosen = compiled_backend(backend, image, target, std) if fits and constant else "torch"
    if chosen == "torch":
        squares = ((image - target) / std).square().flatten(1)
        return 0.5 * squares.sum(1) + squares.shape[1] * (std.log() + LOG_ROOT_TWO_PI)
    if chosen == "cpu":
        from spairkit.kernels.likelihood_cpu import normal_nll_backward_cpu as backward
        from spairkit.kernels.likelihood_cpu import normal_nll_cpu as forward
    else:
        from spairkit.kernels.likelihood_triton import normal_nll_backward_triton as backward
        from spairkit.kernels.likelihood_triton import normal_nll_triton as forward
    return fused(forward, backward, (image, target, std))


def count_success(step: int, start: float, end: float, decay: float, schedule: str) -> float:
    """s = 1 / (1 + odds) of the count prior after `step` updates.

    "exponential": odds = (start - end) * .1^(step / decay) + end, the authors' schedule.
    "log-linear": the log of the odds is linear from start to end, for `decay` updates.

    Source: docs/model.md 2.1.
    """
    if schedule == "exponential":
        odds = (start - end) * math.pow(0.1, step / decay) + end
    else:
        share = min(1.0, step / decay)
        odds = math.exp((1 - share) * math.log(start) + share * math.log(end))
    return 1 / (1 + odds)
