"""Convolutions with padding at the end: sizes, and the kernel for stride 2 against float64."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spairkit.kernels import convolution_cpu
from spairkit.models import convolutions
from spairkit.models.convolutions import convolve, end_padding

CHANNELS, OUTPUTS = 48, 64  # enough for the kernel
ROUNDING = 3e-7  # torch's own error varies between processors


def operands(*shape: int, channels: int = CHANNELS, outputs: int = OUTPUTS) -> list[Tensor]:
    """Images, weight and bias that require gradients."""
    torch.manual_seed(0)
    batch, height, width = shape
    images = torch.randn(batch, channels, height, width)
    weight = torch.randn(outputs, channels, 4, 4) / (4 * channels**0.5)
    return [x.requires_grad_() for x in (images, weight, torch.randn(outputs))]


def halve(inputs: list[Tensor]) -> Tensor:
    images, weight, bias = inputs
    return convolve(images, weight, bias, 2)


def expected(inputs: list[Tensor]) -> Tensor:
    """The convolution by torch in float64, of images padded with many zeros."""
    images, weight, bias = (x.double() for x in inputs)
    rows, columns = ((size + 1) // 2 for size in images.shape[2:])
    return F.conv2d(F.pad(images, (0, 3, 0, 3)), weight, bias, 2)[..., :rows, :columns]


def error(found: Tensor, wanted: Tensor) -> float:
    """Relative error over all numbers."""
    found, wanted = found.detach().double(), wanted.detach()
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-3))


def assert_near(found: Tensor, wanted: Tensor) -> None:
    assert error(found, wanted) < 2e-6


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Kernel functions called so far; the kernel is used for images of any size."""
    made: list[str] = []
    monkeypatch.setattr(convolutions, "_LEAST_PIXELS", 0)

    def watched(name: str, original: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            made.append(name)
            return original(*arguments)

        return call

    for name in ("convolve_cpu", "convolve_backward_cpu"):
        monkeypatch.setattr(convolution_cpu, name, watched(name, getattr(convolution_cpu, name)))
    return made


@pytest.mark.parametrize(
    ("size", "paddings"),
    [(48, (2, 2, 1)), (84, (2, 2, 1)), (210, (2, 3, 2)), (160, (2, 2, 3))],
)
def test_padding_matches_the_specification(size: int, paddings: tuple[int, ...]) -> None:
    for stride, padding in zip((2, 2, 3), paddings, strict=True):
        assert end_padding(size, 4, stride) == padding
        size = (size + padding - 4) // stride + 1


@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1),
        (3, 2, 5),
        (2, 9, 12),
        (2, 11, 7),
        (3, 24, 24),
        (5, 44, 36),  # more tiles than one block holds; blocks split images
        (2, 6, 1300),  # a row of more tiles than one block holds
        (0, 8, 8),
    ],
)
def test_stride_two_matches_torch(shape: tuple[int, int, int], calls: list[str]) -> None:
    inputs = operands(*shape)
    found, wanted = halve(inputs), expected(inputs)
    assert found.shape == wanted.shape
    grad = torch.randn_like(found)
    results = [found, *torch.autograd.grad(found, inputs, grad)]
    assert calls == ["convolve_cpu", "convolve_backward_cpu"]
    floats = convolutions.convolve_by_torch(inputs[0], inputs[1], inputs[2], 2)
    torchs = [floats, *torch.autograd.grad(floats, inputs, grad)]
    exact = [wanted, *torch.autograd.grad(wanted, inputs, grad.double())]
    for ours, theirs, exactly in zip(results, torchs, exact, strict=True):
        assert error(ours, exactly) <= 2 * error(theirs, exactly) + ROUNDING


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_any_memory_format_is_supported(layout: torch.memory_format, calls: list[str]) -> None:
    images, weight, bias = (x.detach() for x in operands(2, 10, 8))
    images, weight = (x.contiguous(memory_format=layout) for x in (images, weight))
    wide = torch.cat([images, images], dim=3)[..., :8]
    wanted = expected([images, weight, bias])
    for same in (images, wide):
        assert_near(convolve(same, weight, bias, 2), wanted)
    assert len(calls) == 2


def test_thread_count_does_not_change_results(calls: list[str]) -> None:
    inputs = operands(5, 28, 16)
    grad = torch.randn(5, OUTPUTS, 14, 8)
    results, num_threads = [], torch.get_num_threads()
    try:
        for threads in (1, 3, 8):
            torch.set_num_threads(threads)
            values = halve(inputs)
            results.append([values, *torch.autograd.grad(values, inputs, grad)])
    finally:
        torch.set_num_threads(num_threads)
    assert calls == 3 * ["convolve_cpu", "convolve_backward_cpu"]
    for found in results[1:]:
        for got, wanted in zip(found, results[0], strict=True):
            assert_near(got, wanted.double())


@pytest.mark.parametrize(
    ("channels", "outputs", "side", "stride", "dtype"),
    [
        (3, 64, 4, 2, torch.float32),
        (48, 64, 4, 3, torch.float32),
        (48, 64, 2, 2, torch.float32),
        (48, 64, 4, 2, torch.float64),
        (48, 64, 4, 2, torch.bfloat16),
    ],
)
def test_other_convolutions_use_torch(
    channels: int,
    outputs: int,
    side: int,
    stride: int,
    dtype: torch.dtype,
    calls: list[str],
) -> None:
    images, weight, bias = operands(2, 13, 11, channels=channels, outputs=outputs)
    inputs = images.to(dtype), weight[..., :side, :side].to(dtype), bias.to(dtype)
    values = convolve(inputs[0], inputs[1], inputs[2], stride)
    assert values.shape == (2, outputs, -(-13 // stride), -(-11 // stride))
    padded = F.pad(inputs[0], (0, 3, 0, 3))
    wanted = F.conv2d(padded, inputs[1], inputs[2], stride)[
        ..., : values.shape[2], : values.shape[3]
    ]
    torch.testing.assert_close(values, wanted)
    assert not calls


def test_autocast_uses_torch(calls: list[str]) -> None:
    images, weight, bias = operands(2, 32, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert convolve(images, weight, bias, 2).dtype == torch.bfloat16
    assert not calls
    convolve(images, weight, bias, 2)
    assert calls == ["convolve_cpu"]


def test_small_batches_use_torch() -> None:
    images, weight, bias = operands(1, 24, 24)
    values = convolve(images, weight, bias, 2)
    assert torch.equal(values, convolutions.convolve_by_torch(images, weight, bias, 2))
