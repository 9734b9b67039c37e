"""Numba twin of `scaled_squash`, float32: the sigmoid of scaled and clipped logits."""

import numpy as np
from torch import Tensor

from spairkit.kernels.elementary_cpu import slope, squash
from spairkit.kernels.threads import compiled, over_images


@compiled
def _squash_all(start, stop, logits, scale, bias, values):
    for r in range(start, stop):
        for i in range(logits.shape[1]):
            values[r, i] = squash(logits[r, i] * scale[i] + bias[i])


@compiled
def _squash_backward(start, stop, grad_values, values, logits, scale, bias, grad_logits):
    for r in range(start, stop):
        for i in range(logits.shape[1]):
            steepness = slope(logits[r, i] * scale[i] + bias[i], values[r, i])
            grad_logits[r, i] = grad_values[r, i] * steepness * scale[i]


def squash_cpu(logits: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """squash(logits * scale + bias), where scale and bias have the last axes of the logits."""
    values = logits.new_empty(logits.shape)
    factors = _flat(scale), _flat(bias)
    rows = _rows(logits, scale)
    over_images(_squash_all, len(rows), rows, *factors, _rows(values, scale))
    return values


def squash_backward_cpu(
    grad_values: Tensor, values: Tensor, logits: Tensor, scale: Tensor, bias: Tensor
) -> tuple[Tensor, None, None]:
    """The gradient of the logits, and None for scale and bias."""
    grad_logits = logits.new_empty(logits.shape)
    factors = _flat(scale), _flat(bias)
    rows = [_rows(tensor, scale) for tensor in (grad_values, values, logits)]
    over_images(_squash_backward, len(rows[0]), *rows, *factors, _rows(grad_logits, scale))
    return grad_logits, None, None


def _flat(factors: Tensor) -> np.ndarray:  # [n]
    return factors.detach().contiguous().numpy().reshape(-1)


def _rows(tensor: Tensor, factors: Tensor) -> np.ndarray:  # [R, n]
    return tensor.detach().contiguous().numpy().reshape(-1, factors.numel())
