"""Triton twins of the likelihoods of images, float32, forward and backward.

Forward, one program sums an image: partial sums in float32, their sum in float64. NaN propagates.
"""

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from spairkit.kernels.constants import LOG_ROOT_TWO_PI
from spairkit.kernels.launch import on

LIKELIHOOD_BLOCK, LIKELIHOOD_WARPS = 1024, 8
_LOG_ROOT_TWO_PI = tl.constexpr(LOG_ROOT_TWO_PI)


@triton.jit
def _probabilities(x, floor):
    """x + floor and 1 - x + floor of x clipped to [0, 1]; NaN stays NaN."""
    x = tl.where(x > 1, 1.0, tl.where(x < 0, 0.0, x))
    return x + floor, (1.0 - x) + floor


@triton.jit
def _cross_entropy_kernel(
    image_ptr,  # [B, n]
    target_ptr,  # [B, n]
    floor,
    sums_ptr,  # [B] to be filled
    size,  # n
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * size
    total = tl.sum(tl.zeros([BLOCK], tl.float64), 0)
    begin = 0
    while begin < size:
        i = begin + tl.arange(0, BLOCK)
        exists = i < size
        image = tl.load(image_ptr + row + i, mask=exists, other=0.0)
        target = tl.load(target_ptr + row + i, mask=exists, other=0.0)
        on, off = _probabilities(image, floor)
        log_off = tl.log(off)
        part = log_off + target * (tl.log(on) - log_off)
        total -= tl.sum(tl.where(exists, part, 0.0), 0).to(tl.float64)
        begin += BLOCK
    tl.store(sums_ptr + tl.program_id(0), total.to(tl.float32))


@triton.jit
def _cross_entropy_backward_kernel(
    grad_sums_ptr,  # [B]
    image_ptr,
    target_ptr,
    floor,
    grad_image_ptr,  # [B, n] to be filled
    size,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = i < size
    place = b.to(tl.int64) * size + i
    image = tl.load(image_ptr + place, mask=exists, other=0.0)
    target = tl.load(target_ptr + place, mask=exists, other=0.0)
    on, off = _probabilities(image, floor)
    grad = tl.load(grad_sums_ptr + b) * ((1.0 - target) / off - target / on)
    # NaN lies outside, and torch gives it no gradient either
    grad = tl.where((image >= 0) & (image <= 1), grad, 0.0)
    tl.store(grad_image_ptr + place, grad, mask=exists)


@triton.jit
def _normal_nll_kernel(
    image_ptr,  # [B, n]
    target_ptr,  # [B, n]
    std_ptr,  # []
    sums_ptr,  # [B] to be filled
    size,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * size
    total = tl.sum(tl.zeros([BLOCK], tl.float64), 0)
    begin = 0
    while begin < size:
        i = begin + tl.arange(0, BLOCK)
        image = tl.load(image_ptr + row + i, mask=i < size, other=0.0)
        residual = image - tl.load(target_ptr + row + i, mask=i < size, other=0.0)
        total += tl.sum(residual * residual, 0).to(tl.float64)
        begin += BLOCK
    std = tl.load(std_ptr).to(tl.float64)
    total = total / (2.0 * std * std) + size * (tl.log(std) + _LOG_ROOT_TWO_PI)
    tl.store(sums_ptr + tl.program_id(0), total.to(tl.float32))


@triton.jit
def _normal_nll_backward_kernel(
    grad_sums_ptr,  # [B]
    image_ptr,
    target_ptr,
    std_ptr,
    grad_image_ptr,  # [B, n] to be filled
    size,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = i < size
    place = b.to(tl.int64) * size + i
    image = tl.load(image_ptr + place, mask=exists, other=0.0)
    residual = image - tl.load(target_ptr + place, mask=exists, other=0.0)
    std = tl.load(std_ptr)
    grad = tl.load(grad_sums_ptr + b) / (std * std) * residual
    tl.store(grad_image_ptr + place, grad, mask=exists)


def cross_entropy_triton(image: Tensor, target: Tensor, floor: float) -> Tensor:  # [B]
    """-log p(target | image) in nats, of images [B, ...]; `floor` is added in both logarithms."""
    return _sums(_cross_entropy_kernel, image, target, floor)


def cross_entropy_backward_triton(
    grad_sums: Tensor, sums: Tensor, image: Tensor, target: Tensor, floor: float
) -> tuple[Tensor, None]:
    """The gradient of the image, and None for the target."""
    return _grad_image(_cross_entropy_backward_kernel, grad_sums, image, target, floor), None


def normal_nll_triton(image: Tensor, target: Tensor, std: Tensor) -> Tensor:  # [B]
    """-log p(target | image) in nats, of images [B, ...] under normal noise; `std` is 0-d."""
    return _sums(_normal_nll_kernel, image, target, std)


def normal_nll_backward_triton(
    grad_sums: Tensor, sums: Tensor, image: Tensor, target: Tensor, std: Tensor
) -> tuple[Tensor, None, None]:
    """The gradient of the image, and None for the target and the standard deviation."""
    return _grad_image(_normal_nll_backward_kernel, grad_sums, image, target, std), None, None


def _sums(kernel: Any, image: Tensor, target: Tensor, setting: float | Tensor) -> Tensor:  # [B]
    sums = image.new_empty(len(image))
    if len(image):
        with on(image.device):
            kernel[(len(image),)](
                image.contiguous(), target.contiguous(), setting, sums, math.prod(image.shape[1:]),
                BLOCK=LIKELIHOOD_BLOCK, num_warps=LIKELIHOOD_WARPS,
            )  # fmt: skip
    return sums


def _grad_image(
    kernel: Any, grad_sums: Tensor, image: Tensor, target: Tensor, setting: float | Tensor
) -> Tensor:
    grad_image, size = image.new_empty(image.shape), math.prod(image.shape[1:])
    if len(image):
        with on(image.device):
            # a grid has at most 65,535 programs on the second axis
            kernel[(len(image), triton.cdiv(size, LIKELIHOOD_BLOCK))](
                grad_sums.contiguous(), image.contiguous(), target.contiguous(), setting,
                grad_image, size, BLOCK=LIKELIHOOD_BLOCK, num_warps=LIKELIHOOD_WARPS,
            )  # fmt: skip
    return grad_image
