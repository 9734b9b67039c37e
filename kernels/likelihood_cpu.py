"""Numba twins of the likelihoods of images, float32, forward and backward."""

import numpy as np
from torch import Tensor

from spairkit.kernels.constants import LOG_ROOT_TWO_PI
from spairkit.kernels.elementary_cpu import log
from spairkit.kernels.threads import compiled, inlined, over_images

_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)
_BLOCK = 512  # terms that are summed in float32; blocks are summed in float64


@inlined
def _clipped(x):
    """To [0, 1]; NaN stays NaN."""
    if x > _ONE:
        x = _ONE
    elif x < _ZERO:
        x = _ZERO
    return x


@inlined
def _probabilities(x, floor):
    """x + floor and 1 - x + floor of the clipped x."""
    # the difference is clipped too, or LLVM might compute (1 + floor) - x, where 1 + floor is 1
    return _clipped(x) + floor, _clipped(_ONE - x) + floor


@compiled
def _cross_entropy(start, stop, image, target, floor, sums):
    size = image.shape[1]
    for b in range(start, stop):
        total = np.float64(0.0)
        for first in range(0, size, _BLOCK):
            part = _ZERO
            for i in range(first, min(first + _BLOCK, size)):
                on, off = _probabilities(image[b, i], floor)
                log_off = log(off)
                part += log_off + target[b, i] * (log(on) - log_off)
            total -= part
        sums[b] = total


@compiled
def _cross_entropy_backward(start, stop, grad_sums, image, target, floor, grad_image):
    for b in range(start, stop):
        for i in range(image.shape[1]):
            x, wanted = image[b, i], target[b, i]
            on, off = _probabilities(x, floor)
            grad = grad_sums[b] * ((_ONE - wanted) / off - wanted / on)
            # NaN lies outside, and torch gives it no gradient either
            grad_image[b, i] = grad if x >= _ZERO and x <= _ONE else _ZERO


@compiled
def _normal_nll(start, stop, image, target, std, sums):
    size = image.shape[1]
    for b in range(start, stop):
        total = np.float64(0.0)
        for first in range(0, size, _BLOCK):
            part = _ZERO
            for i in range(first, min(first + _BLOCK, size)):
                residual = image[b, i] - target[b, i]
                part += residual * residual
            total += part
        sums[b] = total / (2 * std * std) + size * (np.log(std) + LOG_ROOT_TWO_PI)


@compiled
def _normal_nll_backward(start, stop, grad_sums, image, target, std, grad_image):
    for b in range(start, stop):
        slope = np.float32(grad_sums[b] / (std * std))
        for i in range(image.shape[1]):
            grad_image[b, i] = slope * (image[b, i] - target[b, i])


def cross_entropy_cpu(image: Tensor, target: Tensor, floor: float) -> Tensor:  # [B]
    """-log p(target | image) in nats, of images [B, ...]; `floor` is added in both logarithms."""
    sums = image.new_empty(len(image))
    inputs = _matrix(image), _matrix(target)
    over_images(_cross_entropy, len(image), *inputs, np.float32(floor), sums.numpy())
    return sums


def cross_entropy_backward_cpu(
    grad_sums: Tensor, sums: Tensor, image: Tensor, target: Tensor, floor: float
) -> tuple[Tensor, None]:
    """The gradient of the image, and None for the target."""
    grad_image = image.new_empty(image.shape)
    inputs = grad_sums.contiguous().numpy(), _matrix(image), _matrix(target)
    over_images(
        _cross_entropy_backward, len(image), *inputs, np.float32(floor), _matrix(grad_image)
    )
    return grad_image, None


def normal_nll_cpu(image: Tensor, target: Tensor, std: Tensor) -> Tensor:  # [B]
    """-log p(target | image) in nats, of images [B, ...] under normal noise; `std` is 0-d."""
    sums = image.new_empty(len(image))
    inputs = _matrix(image), _matrix(target), float(std)
    over_images(_normal_nll, len(image), *inputs, sums.numpy())
    return sums


def normal_nll_backward_cpu(
    grad_sums: Tensor, sums: Tensor, image: Tensor, target: Tensor, std: Tensor
) -> tuple[Tensor, None, None]:
    """The gradient of the image, and None for the target and the standard deviation."""
    grad_image = image.new_empty(image.shape)
    inputs = grad_sums.contiguous().numpy(), _matrix(image), _matrix(target), float(std)
    over_images(_normal_nll_backward, len(image), *inputs, _matrix(grad_image))
    return grad_image, None, None


def _matrix(images: Tensor) -> np.ndarray:  # [B, ...] -> [B, n]
    return images.detach().contiguous().flatten(1).numpy()
