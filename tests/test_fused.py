"""Fused functions on the CPU against plain torch in float64, and cases that use plain torch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from spairkit import backends
from spairkit.backends import fused
from spairkit.models import densities
from spairkit.models.densities import (
    bernoulli_cross_entropy,
    normal_nll,
    scaled_squash,
    weighted_kls,
)

Function = Callable[..., Tensor]
GROUPS = (2, 0.0, 1.0), (2, -2.1972, 0.5), (5, 0.0, 1.0), (1, 0.3, 0.7)


def cross_entropy(image: Tensor, target: Tensor) -> Tensor:
    return bernoulli_cross_entropy(image, target, 1e-6)


def normal(image: Tensor, target: Tensor) -> Tensor:
    return normal_nll(image, target, torch.full((), 0.07, dtype=image.dtype))


def kls(mean: Tensor, std: Tensor, weight: Tensor) -> Tensor:
    return weighted_kls(mean, std, weight, *GROUPS)


def maps(*shape: int) -> list[Tensor]:
    """Logits [..., 3, 5, 4], some of them clipped; scale; bias."""
    scale = torch.tensor([2.0, 2.0, 2.0, 0.1]).expand(3, 5, 4)
    bias = torch.tensor([0.0, 0.0, 0.0, 5.0]).expand(3, 5, 4)
    return [6 * torch.randn(*shape, 3, 5, 4), scale, bias]


def pixels(*shape: int) -> list[Tensor]:
    """An image with some pixels outside [0, 1], and a target."""
    return [1.4 * torch.rand(*shape) - 0.2, torch.rand(*shape)]


def moments(*shape: int) -> list[Tensor]:
    """Means, standard deviations from limit to limit, and weights."""
    raws = 6 * torch.randn(*shape, 10)
    return [2 * torch.randn(*shape, 10), 2 * densities.squash(raws), torch.rand(*shape)]


CASES: dict[str, tuple[Function, Callable[..., list[Tensor]], int]] = {
    "squash": (scaled_squash, maps, 1),
    "cross_entropy": (cross_entropy, pixels, 1),
    "normal": (normal, pixels, 1),
    "kls": (kls, moments, 3),
}
"""Function, its inputs, and the number of inputs with gradients."""


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def kernel_calls(monkeypatch: pytest.MonkeyPatch) -> list[Function]:
    """The kernels called so far."""
    calls: list[Function] = []

    def watched(forward: Function, *rest: Any) -> Tensor:
        calls.append(forward)
        return fused(forward, *rest)

    monkeypatch.setattr(densities, "fused", watched)
    return calls


def plain(function: Function) -> Function:
    """The function as on a machine without Numba."""

    def without_numba(*inputs: Tensor) -> Tensor:
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(backends._tried, "cpu", False)
            return function(*inputs)

    return without_numba


def weighted(value: Tensor) -> Tensor:
    """A sum that weights every element differently."""
    generator = torch.Generator().manual_seed(5)
    return (value * torch.randn(value.shape, generator=generator).to(value.dtype)).sum()


def results(
    function: Function, inputs: list[Tensor], num_wanted: int, dtype: torch.dtype
) -> list[Tensor]:
    """The value, and the gradients of the first inputs."""
    inputs = [x.detach().to(dtype) for x in inputs]
    wanted = [x.requires_grad_() for x in inputs[:num_wanted]]
    value = function(*inputs)
    return [value.detach(), *torch.autograd.grad(weighted(value), wanted)]


def assert_no_worse(function: Function, inputs: list[Tensor], num_wanted: int) -> None:
    """A kernel's error is at most twice that of torch in float32."""
    exact = results(function, inputs, num_wanted, torch.float64)
    loose = results(plain(function), inputs, num_wanted, torch.float32)
    actual = results(function, inputs, num_wanted, torch.float32)
    for ours, theirs, truth in zip(actual, loose, exact, strict=True):
        assert ours.dtype == torch.float32
        assert ours.shape == truth.shape
        error, allowed = (ours - truth).abs(), 2 * (theirs - truth).abs()
        least = torch.finfo(torch.float32).eps * truth.abs().max()
        assert float(error.max()) <= float(allowed.max() + least)
        assert float(error.mean()) <= float(allowed.mean() + least)


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (32, 16)])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_match_torch(
    name: str, shape: tuple[int, ...], kernel_calls: list[Function]
) -> None:
    function, inputs, num_wanted = CASES[name]
    assert_no_worse(function, inputs(*shape), num_wanted)
    assert len(kernel_calls) == 1


@pytest.mark.parametrize("floor", [1e-2, 1e-9, 1e-30])
def test_any_floor_is_accurate_at_black_and_white(floor: float) -> None:
    image, target = pixels(3, 3, 48, 48)
    image.view(-1)[::7], image.view(-1)[::11] = 0.0, 1.0
    image.view(-1)[::13], image.view(-1)[::17] = 2.0**-24, 1 - 2.0**-24
    assert_no_worse(lambda x, y: bernoulli_cross_entropy(x, y, floor), [image, target], 1)


def test_subnormal_floor_uses_plain_torch(kernel_calls: list[Function]) -> None:
    value = bernoulli_cross_entropy(torch.zeros(1, 1), torch.ones(1, 1), 1e-40)
    assert float(value) == pytest.approx(92.1, abs=0.1)
    assert not kernel_calls


def test_only_pixels_within_0_and_1_get_gradients() -> None:
    image = torch.tensor([[-1e-6, 0.0, 1.0, 1 + 1e-6, 5.0]], requires_grad=True)
    (grad,) = torch.autograd.grad(cross_entropy(image, torch.full((1, 5), 0.5)).sum(), image)
    assert (grad != 0).tolist() == [[False, True, True, False, False]]


@pytest.mark.parametrize("function", [cross_entropy, normal])
def test_sums_over_a_large_image_are_accurate(function: Function) -> None:
    image, target = pixels(4, 3, 512, 512)
    exact = function(image.double(), target.double())
    torch.testing.assert_close(function(image, target).double(), exact, rtol=3e-7, atol=0)


@pytest.mark.parametrize("std", [1 / 255, 0.1, 1.0])
def test_any_noise_is_accurate(std: float) -> None:
    noise = torch.tensor(std)

    def function(image: Tensor, target: Tensor) -> Tensor:
        return normal_nll(image, target, noise.to(image.dtype))

    image, target = pixels(3, 3, 48, 48)
    assert_no_worse(function, [target + noise * torch.randn_like(image), target], 1)


def test_only_logits_within_the_limit_get_gradients() -> None:
    ends = torch.tensor([9.9999, 10.0, 10.0001, 1e30])
    logits = torch.cat([ends, -ends]).requires_grad_()
    values = scaled_squash(logits, torch.ones(8), torch.zeros(8))
    (grad,) = torch.autograd.grad(values.sum(), logits)
    slope = 4.5396e-5 * torch.tensor([1.0, 1, 0, 0, 1, 1, 0, 0])
    torch.testing.assert_close(grad, slope, rtol=2e-3, atol=0)
    for end in (values[:4], values[4:]):
        assert end[1] == end[2] == end[3]


def test_zero_weights_zero_the_kls_but_get_gradients() -> None:
    mean, std, weight = moments(2, 3)
    value, *grads = results(kls, [mean, std, torch.zeros_like(weight)], 3, torch.float32)
    assert not bool(value.any())
    assert [bool(grad.any()) for grad in grads] == [False, False, True]


@pytest.mark.parametrize("name", CASES)
def test_nan_propagates_as_in_torch(name: str) -> None:
    function, inputs, num_wanted = CASES[name]
    for position in range(num_wanted):
        broken = inputs(2, 3)
        broken[position].view(-1)[4] = torch.nan
        theirs = results(plain(function), broken, num_wanted, torch.float32)
        ours = results(function, broken, num_wanted, torch.float32)
        assert bool(ours[0].isnan().any())
        for actual, expected in zip(ours, theirs, strict=True):
            assert torch.equal(actual.isnan(), expected.isnan())


@pytest.mark.parametrize("name", CASES)
def test_strides_do_not_change_results(name: str) -> None:
    function, inputs, num_wanted = CASES[name]
    straight = inputs(4, 6)
    strided = [torch.stack([x, x], dim=-1)[..., 0] for x in straight]
    assert not any(x.is_contiguous() for x in strided)
    wanted = [x.requires_grad_() for x in strided[:num_wanted]]
    grads = torch.autograd.grad(function(*strided).sum(), wanted)  # from an expanded gradient
    straight = [x.detach().clone() for x in straight]
    expected = [x.requires_grad_() for x in straight[:num_wanted]]
    value = function(*straight)
    ones = torch.autograd.grad(value, expected, torch.ones(*value.shape, 2)[..., 0])
    for ours, theirs in zip(grads, ones, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", CASES)
def test_thread_count_does_not_change_bits(name: str) -> None:
    function, inputs, num_wanted = CASES[name]
    given, num_threads = inputs(5, 6), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = results(function, given, num_wanted, torch.float32)
        torch.set_num_threads(3)
        three = results(function, given, num_wanted, torch.float32)
    finally:
        torch.set_num_threads(num_threads)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_empty_batches_are_supported(name: str) -> None:
    function, inputs, num_wanted = CASES[name]
    value, *grads = results(function, inputs(0, 6), num_wanted, torch.float32)
    assert value.shape[0] == 0
    assert all(grad.numel() == 0 for grad in grads)


@pytest.mark.parametrize("name", CASES)
def test_second_derivatives_are_refused(name: str) -> None:
    function, inputs, _ = CASES[name]
    first, *others = inputs(2, 3)
    first.requires_grad_()
    value = function(first, *others).sum()
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(value, first, create_graph=True)


@pytest.mark.parametrize("name", CASES)
def test_trace_contains_plain_torch(name: str, kernel_calls: list[Function]) -> None:
    function, inputs, _ = CASES[name]
    given = inputs(2, 3)
    traced = torch.compile(function, fullgraph=True, backend="aot_eager")(*given)
    assert not kernel_calls
    torch.testing.assert_close(traced, function(*given))


@pytest.mark.parametrize("name", CASES)
def test_other_dtypes_and_broken_numba_use_plain_torch(
    name: str, kernel_calls: list[Function]
) -> None:
    function, inputs, _ = CASES[name]
    given = inputs(2, 3)
    plain(function)(*given)
    for dtype in (torch.float64, torch.bfloat16):
        assert function(*(x.to(dtype) for x in given)).dtype == dtype
    assert not kernel_calls


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_uses_the_kernel(
    name: str, mode: Callable[[], Any], kernel_calls: list[Function]
) -> None:
    function, inputs, _ = CASES[name]
    given = inputs(2, 3)
    with mode():
        value = function(*given)
    assert not value.requires_grad
    assert torch.equal(value, function(*given))
    assert len(kernel_calls) == 2


def test_inputs_without_a_gradient_kernel_use_plain_torch(
    kernel_calls: list[Function],
) -> None:
    for function, make in ((scaled_squash, maps), (cross_entropy, pixels), (normal, pixels)):
        first, *others = (x.clone().requires_grad_() for x in make(2, 3))
        grads = torch.autograd.grad(function(first, *others).sum(), [first, *others])
        assert all(bool(grad.any()) for grad in grads)
    std = torch.tensor(0.1, requires_grad=True)
    image, target = pixels(2, 3)
    (grad,) = torch.autograd.grad(normal_nll(image, target, std).sum(), std)
    assert bool(grad.any())
    assert not kernel_calls


def test_broadcast_shapes_use_plain_torch(kernel_calls: list[Function]) -> None:
    image, target = pixels(2, 3)
    both = torch.stack([target[0], target[0]])
    for function in (cross_entropy, normal):
        assert torch.equal(function(image, target[:1]), plain(function)(image, both))
    logits, scale, bias = maps(2)
    assert scaled_squash(logits, scale[..., :1], bias).shape == logits.shape
    mean, std, weight = moments(2, 3)
    assert kls(mean, std, weight[:, :1]).shape == (2, len(GROUPS))
    assert not kernel_calls
    with pytest.raises(RuntimeError, match="split"):
        weighted_kls(mean, std, weight, *GROUPS[:-1])
