"""Numba twin of the squashing of object maps, float32: sigmoid of scaled and clipped logits."""

import numpy as np
from torch import Tensor

from spairkit.kernels.elementary_cpu import exp
from spairkit.kernels.threads import compiled, over_images

_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)
_LOGIT_LIMIT = np.float32(10.0)  # as in spairkit.densities


@compiled
def _squash(
    start,
    stop,
    logits,  # [R, n]
    scale,  # [n]
    bias,  # [n]
    values,  # [R, n]
):
    for r in range(start, stop):
        for i in range(logits.shape[1]):
            x = logits[r, i] * scale[i] + bias[i]
            if x > _LOGIT_LIMIT:
                x = _LOGIT_LIMIT
            elif x < -_LOGIT_LIMIT:
                x = -_LOGIT_LIMIT
            values[r, i] = _ONE / (_ONE + exp(-x))


@compiled
def _squash_backward(
    start,
    stop,
    grad_values,  # [R, n]
    values,  # [R, n]
    logits,  # [R, n]
    scale,  # [n]
    bias,  # [n]
    grad_logits,  # [R, n]
):
    for r in range(start, stop):
        for i in range(logits.shape[1]):
            # the value cannot tell: a logit a little below the limit has that of the limit
            inside = abs(logits[r, i] * scale[i] + bias[i]) <= _LOGIT_LIMIT
            value = values[r, i]
            grad = grad_values[r, i] * value * (_ONE - value) * scale[i]
            grad_logits[r, i] = grad if inside else _ZERO


def squash_cpu(logits: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Of logits whose last axes are those of scale and bias."""
    values = logits.new_empty(logits.shape)
    factors = _flat(scale), _flat(bias)
    rows = _rows(logits, scale)
    over_images(_squash, len(rows), rows, *factors, _rows(values, scale))
    return values


def squash_backward_cpu(
    grad_values: Tensor, values: Tensor, logits: Tensor, scale: Tensor, bias: Tensor
) -> tuple[Tensor, None, None]:
    """The gradient of the logits; scale and bias get none."""
    grad_logits = logits.new_empty(logits.shape)
    factors = _flat(scale), _flat(bias)
    rows = [_rows(tensor, scale) for tensor in (grad_values, values, logits)]
    over_images(_squash_backward, len(rows[0]), *rows, *factors, _rows(grad_logits, scale))
    return grad_logits, None, None


def _flat(factors: Tensor) -> np.ndarray:  # [n]
    return factors.detach().contiguous().numpy().reshape(-1)


def _rows(tensor: Tensor, factors: Tensor) -> np.ndarray:  # [R, n]
    return tensor.detach().contiguous().numpy().reshape(-1, factors.numel())
