"""Triton twins of the KL terms, the likelihoods and the decoder's sigmoid against plain torch.

Needs Triton: `test_interpreter.py` runs this file in Triton's interpreter.
"""

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from spairkit.backends import Backend
from spairkit.models.densities import (
    bernoulli_cross_entropy,
    normal_nll,
    scaled_squash,
    squash,
    weighted_kls,
)

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"),
    reason="needs Triton: see test_interpreter.py",
)

Function = Callable[[list[Tensor], Backend], Tensor]
GROUPS = (2, 0.0, 1.0), (2, -2.1972, 0.5), (65, 0.0, 1.0), (1, 0.3, 0.7)


def cross_entropy(inputs: list[Tensor], backend: Backend) -> Tensor:
    image, target = inputs
    return bernoulli_cross_entropy(image, target, 1e-9, backend=backend)


def normal(inputs: list[Tensor], backend: Backend) -> Tensor:
    image, target = inputs
    return normal_nll(image, target, image.new_full((), 0.07), backend=backend)


def kls(inputs: list[Tensor], backend: Backend) -> Tensor:
    mean, std, weight = inputs
    return weighted_kls(mean, std, weight, *GROUPS, backend=backend)


def appearance(inputs: list[Tensor], backend: Backend) -> Tensor:
    logits, scale, bias = inputs
    return scaled_squash(logits, scale, bias, backend=backend)


def pixels(batch: int) -> list[Tensor]:
    """Images with some pixels outside [0, 1], some black and some white; targets."""
    image = 1.4 * torch.rand(batch, 3, 19, 24) - 0.2
    image.view(-1)[::7], image.view(-1)[::11] = 0.0, 1.0
    return [image, torch.rand(batch, 3, 19, 24)]


def moments(batch: int) -> list[Tensor]:
    """Means, standard deviations from limit to limit, and weights of 5 cells."""
    std = 2 * squash(6 * torch.randn(batch, 5, 70))
    return [2 * torch.randn(batch, 5, 70), std, torch.rand(batch, 5)]


def maps(batch: int) -> list[Tensor]:
    """Logits, some of them clipped; scale; bias."""
    scale = torch.tensor([2.0, 2.0, 2.0, 0.1]).expand(3, 5, 4)
    bias = torch.tensor([0.0, 0.0, 0.0, 5.0]).expand(3, 5, 4)
    return [6 * torch.randn(batch, 21, 3, 5, 4), scale, bias]


CASES: dict[str, tuple[Function, Callable[[int], list[Tensor]], int]] = {
    "cross_entropy": (cross_entropy, pixels, 1),
    "normal": (normal, pixels, 1),
    "kls": (kls, moments, 3),
    "appearance": (appearance, maps, 1),
}
"""Function, its inputs, and the number of inputs with gradients."""


def results(
    name: str, inputs: list[Tensor], backend: Backend, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """The value, and the gradients of the inputs that get one, of a weighted sum."""
    function, _, num_wanted = CASES[name]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    given = [x.detach().to(device, dtype) for x in inputs]
    wanted = [x.requires_grad_() for x in given[:num_wanted]]
    value = function(given, backend)
    weights = torch.randn(value.shape, generator=torch.Generator().manual_seed(5))
    grads = torch.autograd.grad((value * weights.to(value)).sum(), wanted)
    return [value.detach(), *grads]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_error_is_at_most_twice_that_of_torch(name: str, batch: int) -> None:
    torch.manual_seed(0)
    inputs = CASES[name][1](batch)
    exact = results(name, inputs, "torch", torch.float64)
    single, actual = (results(name, inputs, way) for way in ("torch", "triton"))
    for ours, theirs, truth in zip(actual, single, exact, strict=True):
        assert ours.dtype == torch.float32
        error, allowed = (ours - truth).abs(), 2 * (theirs - truth).abs()
        least = torch.finfo(torch.float32).eps * truth.abs().max()
        assert float(error.max()) <= float(allowed.max() + least)
        assert float(error.mean()) <= float(allowed.mean() + least)


@pytest.mark.parametrize("name", CASES)
def test_nan_and_strides_and_empty_batches(name: str) -> None:
    torch.manual_seed(0)
    _, make, num_wanted = CASES[name]
    inputs = make(2)
    strided = [torch.stack([x, x], dim=-1)[..., 0] for x in inputs]
    for ours, expected in zip(
        results(name, strided, "triton"), results(name, inputs, "triton"), strict=True
    ):
        assert torch.equal(ours, expected)
    for position in range(num_wanted):
        broken = make(2)
        broken[position].view(-1)[4] = torch.nan
        pairs = (results(name, broken, way) for way in ("triton", "torch"))
        for ours, expected in zip(*pairs, strict=True):
            assert torch.equal(ours.isnan(), expected.isnan())
    value, *grads = results(name, make(0), "triton")
    assert value.shape[0] == 0
    assert all(grad.numel() == 0 for grad in grads)


def test_float64_is_refused() -> None:
    with pytest.raises(ValueError, match="does not support"):
        results("kls", moments(1), "triton", torch.float64)
