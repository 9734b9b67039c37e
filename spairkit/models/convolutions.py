"""Strided convolutions with zeros beyond the right and lower rim (docs/model.md 3.1)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from spairkit.backends import fused, runs_compiled

_LEAST_WEIGHTS = 8192  # for each pixel of the kernel: narrower layers gain little
_LEAST_PIXELS = 1024  # of all images: with fewer, preparing the weights takes longer


def end_padding(size: int, kernel: int, stride: int) -> int:
    """Zeros after the last pixel, so that a convolution has ceil(size / stride) outputs."""
    return max(kernel - (size % stride or stride), 0)


def takes_winograd(weight: Tensor, stride: int) -> bool:
    """Whether convolutions with weights of this shape are trained by Winograd's F(2, 2)."""
    outputs, channels, *kernel = weight.shape
    return (*kernel, stride) == (4, 4, 2) and outputs * channels >= _LEAST_WEIGHTS


def convolve(images: Tensor, weight: Tensor, bias: Tensor, stride: int) -> Tensor:
    """A convolution with zeros after the last pixel, so that outputs cover every pixel.

    With gradients, in float32 on the CPU, wide 4 x 4 kernels with stride 2 take 9 products instead
    of 16, by Winograd's F(2, 2) (`spairkit.kernels.winograd_cpu`). A second derivative then raises
    RuntimeError.

    Args:
        images: [B, C, H, W].
        weight: [N, C, k, k].
        bias: [N].
        stride: pixels.

    Returns:
        [B, N, ceil(H / stride), ceil(W / stride)].
    """
    # without gradients an image has the same bits in any batch, which the kernel does not ensure
    if (
        torch.is_grad_enabled()
        and takes_winograd(weight, stride)
        and not torch.is_autocast_enabled("cpu")
        and runs_compiled(images, weight, bias)
        # after that, as a trace must not depend on the size of a batch
        and images.numel() >= images.shape[1] * _LEAST_PIXELS
    ):
        from spairkit.kernels.winograd_cpu import winograd_backward_cpu, winograd_cpu

        return fused(winograd_cpu, winograd_backward_cpu, (images, _factors(weight), bias))
    return convolve_by_torch(images, weight, bias, stride)


def convolve_by_torch(images: Tensor, weight: Tensor, bias: Tensor, stride: int) -> Tensor:
    """`convolve` by torch's convolution, for any device, dtype and size."""
    height, width = images.shape[-2:]
    kernel = weight.shape[-1]
    if kernel > 1:  # padding by nothing would copy
        bottom, right = end_padding(height, kernel, stride), end_padding(width, kernel, stride)
        images = F.pad(images, (0, right, 0, bottom))
    return F.conv2d(images, weight, bias, stride)


def _factors(weight: Tensor) -> Tensor:  # [N, C, 4, 4] -> [9, N, 4 C]
    """g0, g0 + g1 and g1 of `spairkit.kernels.winograd_cpu`, down and across."""
    outputs, channels = weight.shape[:2]
    pixels = weight.flatten(2).transpose(1, 2).reshape(outputs, 2, 2, 2, 2, channels)
    blocks = pixels.permute(1, 3, 0, 2, 4, 5)  # blocks down and across come first
    for axis in range(2):
        g0, g1 = blocks.unbind(axis)
        blocks = torch.stack([g0, g0 + g1, g1], axis)
    return blocks.reshape(9, outputs, 4 * channels)
