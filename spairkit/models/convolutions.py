"""Strided convolutions with zeros beyond the right and lower rim (docs/model.md 3.1)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from spairkit.backends import fused, runs_compiled

_KERNEL, _STRIDE = 4, 2  # of convolutions with a Numba kernel
_LEAST_WEIGHTS = 2048  # for each pixel of the kernel; with fewer there is little to gain
_LEAST_PIXELS = 1024  # of all images; with fewer, preparing the weights takes longer


def end_padding(size: int, kernel: int, stride: int) -> int:
    """Zeros after the last pixel, so that a convolution has ceil(size / stride) outputs."""
    return max(kernel - (size % stride or stride), 0)


def has_kernel(weight: Sequence[int], stride: int) -> bool:
    """Whether a weight of this shape, [N, C, k, k], is convolved by Numba on the CPU in float32."""
    outputs, channels, *kernel = weight
    fits = (*kernel, stride) == (_KERNEL, _KERNEL, _STRIDE)
    return fits and outputs * channels >= _LEAST_WEIGHTS


def convolve(images: Tensor, weight: Tensor, bias: Tensor, stride: int) -> Tensor:
    """A convolution with zeros after the last pixel, so that outputs cover every pixel.

    Args:
        images: [B, C, H, W].
        weight: [N, C, k, k].
        bias: [N].
        stride: pixels.

    Returns:
        [B, N, ceil(H / stride), ceil(W / stride)]. On the CPU in float32, wide 4 x 4 kernels with
        stride 2 take 9 products instead of 16 (`spairkit.kernels.convolution_cpu`).
    """
    channels = weight.shape[1]
    if (
        has_kernel(weight.shape, stride)
        and images.numel() >= channels * _LEAST_PIXELS
        and not torch.is_autocast_enabled("cpu")
        and runs_compiled(images, weight, bias)
    ):
        from spairkit.kernels.convolution_cpu import convolve_backward_cpu, convolve_cpu

        return fused(convolve_cpu, convolve_backward_cpu, (images, weight, bias))
    return convolve_by_torch(images, weight, bias, stride)


def convolve_by_torch(images: Tensor, weight: Tensor, bias: Tensor, stride: int) -> Tensor:
    """The result of `convolve` by torch's convolution, on any device and in any dtype."""
    height, width = images.shape[-2:]
    kernel = weight.shape[-1]
    bottom, right = end_padding(height, kernel, stride), end_padding(width, kernel, stride)
    return F.conv2d(F.pad(images, (0, right, 0, bottom)), weight, bias, stride)
