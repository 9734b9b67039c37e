"""Strided convolutions with zeros beyond the right and lower rim (docs/model.md 3.1)."""

import torch.nn.functional as F
from torch import Tensor


def end_padding(size: int, kernel: int, stride: int) -> int:
    """Zeros after the last pixel, so that a convolution has ceil(size / stride) outputs."""
    return max(kernel - (size % stride or stride), 0)


def convolve(images: Tensor, weight: Tensor, bias: Tensor, stride: int) -> Tensor:
    """A convolution with zeros after the last pixel, so that outputs cover every pixel.

    Args:
        images: [B, C, H, W].
        weight: [N, C, k, k].
        bias: [N].
        stride: pixels.

    Returns:
        [B, N, ceil(H / stride), ceil(W / stride)].
    """
    height, width = images.shape[-2:]
    kernel = weight.shape[-1]
    if kernel > 1:  # padding by nothing would copy
        bottom, right = end_padding(height, kernel, stride), end_padding(width, kernel, stride)
        images = F.pad(images, (0, right, 0, bottom))
    return F.conv2d(images, weight, bias, stride)
