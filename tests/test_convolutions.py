"""Convolutions with padding at the end: sizes, and values against explicit zeros."""

import pytest
import torch
import torch.nn.functional as F

from spairkit.models.convolutions import convolve, end_padding


@pytest.mark.parametrize(
    ("size", "paddings"),
    [(48, (2, 2, 1)), (84, (2, 2, 1)), (210, (2, 3, 2)), (160, (2, 2, 3))],
)
def test_padding_equals_that_of_the_specification(size: int, paddings: tuple[int, ...]) -> None:
    for stride, padding in zip((2, 2, 3), paddings, strict=True):
        assert end_padding(size, 4, stride) == padding
        size = (size + padding - 4) // stride + 1


@pytest.mark.parametrize(
    ("channels", "outputs", "side", "stride", "dtype"),
    [
        (3, 64, 4, 2, torch.float32),
        (48, 64, 4, 3, torch.float32),
        (48, 64, 2, 2, torch.float32),
        (48, 64, 4, 2, torch.float32),
        (48, 64, 4, 2, torch.float64),
        (48, 64, 4, 2, torch.bfloat16),
    ],
)
def test_outputs_cover_every_pixel(
    channels: int, outputs: int, side: int, stride: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    images = torch.randn(2, channels, 13, 11).to(dtype)
    weight = torch.randn(outputs, channels, side, side).to(dtype) / (4 * channels**0.5)
    bias = torch.randn(outputs).to(dtype)
    values = convolve(images, weight, bias, stride)
    assert values.shape == (2, outputs, -(-13 // stride), -(-11 // stride))
    wanted = F.conv2d(F.pad(images, (0, 3, 0, 3)), weight, bias, stride)
    wanted = wanted[..., : values.shape[2], : values.shape[3]]
    torch.testing.assert_close(values, wanted)
