"""Convolutions with padding at the end: sizes, explicit zeros, the kernel of stride 2."""

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spairkit.kernels import winograd_cpu
from spairkit.models import convolutions
from spairkit.models.convolutions import convolve, convolve_by_torch, end_padding

ROUNDING = 3e-7  # relative; for results that torch rounds hardly at all


@pytest.mark.parametrize(
    ("size", "paddings"),
    [(48, (2, 2, 1)), (84, (2, 2, 1)), (210, (2, 3, 2)), (160, (2, 2, 3))],
)
def test_padding_equals_that_of_the_specification(size: int, paddings: tuple[int, ...]) -> None:
    for stride, padding in zip((2, 2, 3), paddings, strict=True):
        assert end_padding(size, 4, stride) == padding
        size = (size + padding - 4) // stride + 1


def operands(
    batch: int, height: int, width: int, channels: int = 5, outputs: int = 7, side: int = 4
) -> list[Tensor]:
    """Images, weight and bias, which require gradients."""
    torch.manual_seed(0)
    images = torch.randn(batch, channels, height, width)
    weight = torch.randn(outputs, channels, side, side) / (side * channels**0.5)
    return [x.requires_grad_() for x in (images, weight, torch.randn(outputs))]


def with_many_zeros(images: Tensor, weight: Tensor, bias: Tensor, stride: int) -> Tensor:
    """The convolution by torch, of images padded by more than it needs."""
    rows, columns = (-(-size // stride) for size in images.shape[2:])
    return F.conv2d(F.pad(images, (0, 3, 0, 3)), weight, bias, stride)[..., :rows, :columns]


def applied(function: Callable[..., Tensor], inputs: Sequence[Tensor], stride: int = 2) -> Tensor:
    return function(*inputs, stride)


def error(found: Tensor, wanted: Tensor) -> float:
    """Relative error over all numbers."""
    found, wanted = found.detach().double(), wanted.detach()
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-3))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The functions of the kernel that were called; it is used for layers of any width."""
    made: list[str] = []

    def watched(name: str, original: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            made.append(name)
            return original(*arguments)

        return call

    monkeypatch.setattr(convolutions, "_LEAST_PIXELS", 0)
    monkeypatch.setattr(convolutions, "_LEAST_WEIGHTS", 0)
    for name in ("winograd_cpu", "winograd_backward_cpu"):
        monkeypatch.setattr(winograd_cpu, name, watched(name, getattr(winograd_cpu, name)))
    threads = torch.get_num_threads()
    yield made
    torch.set_num_threads(threads)


def assert_near_float64(inputs: list[Tensor], stride: int) -> None:
    """Values and gradients err at most twice as much as torch's in float32."""
    values = applied(convolve, inputs, stride)
    grad = torch.randn_like(values)
    results = []
    for function, dtype in (
        (convolve, torch.float32),
        (convolve_by_torch, torch.float32),
        (with_many_zeros, torch.float64),
    ):
        values = applied(function, [x.to(dtype) for x in inputs], stride)
        results.append([values, *torch.autograd.grad(values, inputs, grad.to(dtype))])
    for ours, theirs, exact in zip(*results, strict=True):
        assert ours.shape == exact.shape
        assert error(ours, exact) <= 2 * error(theirs, exact) + ROUNDING


@pytest.mark.parametrize("stride", [1, 2, 3, 4])
@pytest.mark.parametrize("batch", [1, 2, 9])
@pytest.mark.parametrize("size", [(1, 1), (2, 5), (9, 12), (11, 7), (24, 24)])
def test_values_and_gradients_match_float64(
    size: tuple[int, int], batch: int, stride: int, calls: list[str]
) -> None:
    assert_near_float64(operands(batch, *size), stride)
    assert calls == (2 * ["winograd_cpu"] + ["winograd_backward_cpu"] if stride == 2 else [])


@pytest.mark.parametrize(
    "shape",
    [
        (5, 44, 36),  # two images share products, and the last one has its own
        (2, 6, 1300),  # one image has more tiles than share a product elsewhere
        (0, 8, 8),
    ],
)
def test_any_number_of_tiles(shape: tuple[int, int, int], calls: list[str]) -> None:
    assert_near_float64(operands(*shape), 2)
    assert len(calls) == 3


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_any_memory_format_is_supported(layout: torch.memory_format, calls: list[str]) -> None:
    images, weight, bias = operands(2, 10, 8)
    wanted = with_many_zeros(images, weight, bias, 2)
    images, weight = (x.contiguous(memory_format=layout) for x in (images, weight))
    for same in (images, torch.cat([images, images], dim=3)[..., :8]):
        torch.testing.assert_close(convolve(same, weight, bias, 2), wanted)
    assert len(calls) == 2


def test_threads_share_the_images(calls: list[str]) -> None:
    inputs = operands(5, 28, 16)
    grad, results = torch.randn(5, 7, 14, 8), []
    for threads in (1, 3, 8):
        torch.set_num_threads(threads)
        values = applied(convolve, inputs)
        results.append([values, *torch.autograd.grad(values, inputs, grad)])
    for found in results[1:]:
        torch.testing.assert_close(found, results[0])
    assert len(calls) == 6


def test_repetitions_are_bit_identical(calls: list[str]) -> None:
    inputs = operands(9, 24, 20)
    results = []
    for _ in range(2):
        values = applied(convolve, inputs)
        results.append([values, *torch.autograd.grad(values.square().sum(), inputs)])
    assert all(map(torch.equal, *results))
    assert len(calls) == 4


def test_inference_autocast_and_float64_use_torch(calls: list[str]) -> None:
    inputs = operands(2, 13, 11)
    with torch.no_grad():
        assert torch.equal(applied(convolve, inputs), applied(convolve_by_torch, inputs))
    with torch.autocast("cpu", torch.bfloat16):
        assert applied(convolve, inputs).dtype == torch.bfloat16
    applied(convolve, [x.double() for x in inputs])
    assert not calls


def test_wide_layers_take_winograd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(winograd_cpu, "winograd_cpu")
    with pytest.raises(ImportError, match="winograd_cpu"):
        applied(convolve, operands(1, 32, 32, 64, 128))


def test_a_program_with_gradients_takes_any_batch() -> None:
    class Layer(torch.nn.Conv2d):
        def forward(self, images: Tensor) -> Tensor:
            assert self.bias is not None
            return convolve(images, self.weight, self.bias, 2)

    layer, images = Layer(64, 128, 4), torch.rand(9, 64, 16, 16)
    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(layer, (images[:2],), dynamic_shapes={"images": batch})
    assert layer.bias is not None
    wanted = convolve_by_torch(images, layer.weight, layer.bias, 2)
    torch.testing.assert_close(program.module()(images), wanted)


@pytest.mark.parametrize(
    ("channels", "outputs", "height"), [(3, 128, 48), (32, 64, 48), (128, 128, 20)]
)
def test_narrow_layers_and_few_pixels_use_torch(
    channels: int, outputs: int, height: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(winograd_cpu, "winograd_cpu")
    applied(convolve, operands(1, height, 48, channels, outputs))


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
    given = [x.to(dtype) for x in operands(2, 13, 11, channels, outputs, side)]
    values = applied(convolve, given, stride)
    assert values.shape == (2, outputs, -(-13 // stride), -(-11 // stride))
    torch.testing.assert_close(values, applied(with_many_zeros, given, stride))
