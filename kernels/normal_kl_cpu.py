"""Numba twin of the weighted KL divergences of normals, float32, forward and backward.

With r = std / prior's std and d = (mean - prior's mean) / prior's std, the divergence of one
dimension is (r^2 + d^2 - 1) / 2 - log r.
"""

from functools import lru_cache

import numpy as np
from torch import Tensor

from spairkit.kernels.elementary_cpu import log
from spairkit.kernels.threads import arrays, compiled, inlined, over_images

_ZERO = np.float32(0.0)
_HALF = np.float32(0.5)
_ONE = np.float32(1.0)


@inlined
def _divergence(ratio, distance):
    return _HALF * (ratio * ratio + distance * distance - _ONE) - log(ratio)


@compiled
def _weighted_kls(start, stop, mean, std, weight, ends, priors, sums):
    """Fills [B, G] from [B, K, M], [B, K, M], [B, K], ends of groups [G], means and stds [G, 2]."""
    num_cells = mean.shape[1]
    for b in range(start, stop):
        first = 0
        for g in range(len(ends)):
            prior_mean, prior_std = priors[g, 0], priors[g, 1]
            total = np.float64(0.0)
            for k in range(num_cells):
                kl = _ZERO
                for i in range(first, ends[g]):
                    distance = (mean[b, k, i] - prior_mean) / prior_std
                    kl += _divergence(std[b, k, i] / prior_std, distance)
                total += weight[b, k] * kl
            sums[b, g] = total
            first = ends[g]


@compiled
def _weighted_kls_backward(
    start, stop, grad_sums, mean, std, weight, ends, priors, grad_mean, grad_std, grad_weight
):
    num_cells = mean.shape[1]
    for b in range(start, stop):
        for k in range(num_cells):
            grad_here = _ZERO
            first = 0
            for g in range(len(ends)):
                prior_mean, prior_std = priors[g, 0], priors[g, 1]
                slope = grad_sums[b, g] * weight[b, k] / prior_std
                kl = _ZERO
                for i in range(first, ends[g]):
                    ratio = std[b, k, i] / prior_std
                    distance = (mean[b, k, i] - prior_mean) / prior_std
                    kl += _divergence(ratio, distance)
                    grad_mean[b, k, i] = slope * distance
                    grad_std[b, k, i] = slope * (ratio - _ONE / ratio)
                grad_here += grad_sums[b, g] * kl
                first = ends[g]
            grad_weight[b, k] = grad_here


def weighted_kls_cpu(
    mean: Tensor, std: Tensor, weight: Tensor, *groups: tuple[int, float, float]
) -> Tensor:  # [B, G]
    """Divergences in nats of groups: number of dimensions, mean and std of their prior."""
    sums = mean.new_empty(len(mean), len(groups))
    inputs = *arrays(mean, std, weight), *_ends_and_priors(groups)
    over_images(_weighted_kls, len(mean), *inputs, sums.numpy())
    return sums


def weighted_kls_backward_cpu(
    grad_sums: Tensor, sums: Tensor, mean: Tensor, std: Tensor, weight: Tensor,
    *groups: tuple[int, float, float],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of mean, std and weight."""
    grad_mean, grad_std, grad_weight = (x.new_empty(x.shape) for x in (mean, std, weight))
    inputs = *arrays(grad_sums, mean, std, weight), *_ends_and_priors(groups)
    grads = arrays(grad_mean, grad_std, grad_weight)
    over_images(_weighted_kls_backward, len(mean), *inputs, *grads)
    return grad_mean, grad_std, grad_weight


@lru_cache(maxsize=16)
def _ends_and_priors(
    groups: tuple[tuple[int, float, float], ...],
) -> tuple[np.ndarray, np.ndarray]:
    table = np.array(groups)
    return table[:, 0].cumsum().astype(np.int64), table[:, 1:].astype(np.float32)
