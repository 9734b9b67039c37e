"""Extreme inputs to the operators and to the loss: values and gradients are finite.

Each operator sees 10,000 inputs, many of them at the ends of what its documentation allows, in
plain torch and with Numba, and 200 in Triton's interpreter (`test_interpreter.py`).
"""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from spairkit import backends
from spairkit.backends import Backend
from spairkit.config import SPAIRConfig
from spairkit.models import affine
from spairkit.models.densities import (
    bernoulli_cross_entropy,
    concrete_sample,
    logistic,
    normal_nll,
    scaled_squash,
    squash,
    weighted_kls,
)
from spairkit.models.glimpses import extract_glimpses
from spairkit.models.spair import SPAIR
from spairkit.presence import log_presence_prior, presence_kl, presence_prior
from spairkit.rendering import render

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")

SUCCESSES = [1e-12, 1e-6, 0.1, 0.5, 0.99, 0.9999, 1 - 1e-6, 1 - 1e-12, 1 - 2**-53]
SHARES = [0.0, 1e-45, 1e-38, 1e-30, 1e-8, 1e-3, 0.5, 1 - 1e-3, 1 - 2**-24, 1.0]
SIDES = [0.0, 1e-45, 1e-38, 1e-7, 1e-6, 2e-6, 0.5, 1.0, 7.0, 1e4, 1e10, 1e20, 1e30, 3.4e38]
LOGITS = [0.0, 1e-30, 1.0, 10.0, 88.0, 1e3, 1e10]
NUMBER = 10_000
INTERPRETED = [
    pytest.param(20, id="20"),
    pytest.param(200, id="200", marks=[pytest.mark.long, pytest.mark.timeout(3600)]),
]


class Draw:
    """Random inputs of which about half are extremes."""

    def __init__(self, seed: int) -> None:
        self.random = torch.Generator().manual_seed(seed)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.random)

    def of(self, values: list[float], *shape: int) -> Tensor:
        return torch.tensor(values)[torch.randint(len(values), shape, generator=self.random)]

    def shares(self, *shape: int) -> Tensor:
        """In [0, 1]."""
        return torch.where(
            self.uniform(*shape) < 0.5, self.of(SHARES, *shape), self.uniform(*shape)
        )

    def numbers(self, extremes: list[float], *shape: int) -> Tensor:
        """Normal, or an extreme of either sign."""
        signed = self.of(extremes, *shape) * self.of([-1.0, 1.0], *shape)
        normal = torch.randn(*shape, generator=self.random)
        return torch.where(self.uniform(*shape) < 0.5, signed, normal)

    def boxes(self, *shape: int) -> Tensor:
        ordinary = self.uniform(*shape, 4) * 30 - 8
        return torch.where(self.uniform(*shape, 1) < 0.5, self.numbers(SIDES, *shape, 4), ordinary)


def check(function: Callable[..., Tensor], *inputs: Tensor, **constants: Any) -> None:
    """Value and gradients of all inputs are finite, one example per row."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    value = function(*leaves, **constants)
    assert value.isfinite().all(), [t[~value.isfinite().flatten(1).all(1)][:2] for t in inputs]
    cotangent = torch.randn(value.shape, generator=torch.Generator().manual_seed(1)).to(value)
    gradients = torch.autograd.grad(value, leaves, cotangent, allow_unused=True)
    for gradient in gradients:
        if gradient is not None:
            wrong = ~gradient.isfinite().flatten(1).all(1)
            assert not wrong.any(), [tensor[wrong][:2] for tensor in inputs]
    assert any(gradient is not None for gradient in gradients)


def runs(kernel: Backend, device: torch.device, interpreted: int) -> list[tuple[Backend, int]]:
    """Backends and their number of inputs: the interpreter is thousands of times slower."""
    if kernel == "triton" and device.type == "cpu":
        return [("triton", interpreted)]
    return [("torch", NUMBER), (kernel, NUMBER)]


@pytest.fixture(params=["torch", "cpu"])
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether functions that choose by themselves use Numba."""
    monkeypatch.setitem(backends._tried, "cpu", request.param == "cpu")
    return bool(request.param == "cpu")


@pytest.mark.parametrize("interpreted", INTERPRETED)
def test_rendered_images_are_finite(
    interpreted: int, kernel: Backend, kernel_device: torch.device
) -> None:
    """Several objects that overlap; `test_kernels_render.py` has single ones of any size."""
    for backend, number in runs(kernel, kernel_device, interpreted):
        for floor in (0.0, 0.00025, 0.01):
            draw, images = Draw(number), number // 3 + 1
            inputs = (
                draw.shares(images, 4, 3, 3, 4),
                draw.boxes(images, 4),
                draw.numbers(LOGITS, images, 4),
                draw.shares(images, 4),
                draw.shares(images, 3, 8, 8),
            )
            placed = (tensor.to(kernel_device) for tensor in inputs)
            check(render, *placed, importance_floor=floor, backend=backend)


@pytest.mark.parametrize("interpreted", INTERPRETED)
@pytest.mark.parametrize("relaxed", [False, True])
def test_count_priors_are_finite(
    relaxed: bool, interpreted: int, kernel: Backend, kernel_device: torch.device
) -> None:
    for backend, number in runs(kernel, kernel_device, interpreted):
        draw = Draw(number)
        sizes = [3, 16] if number == interpreted else [1, 3, 16, 60]
        images = number // (len(sizes) * len(SUCCESSES)) + 1
        for success, num_cells in itertools.product(SUCCESSES, sizes):
            hard = (draw.uniform(images, num_cells) < draw.shares(images, 1)).float()
            near = (hard - 1e-7 * draw.uniform(images, num_cells)).abs()
            nearer = torch.where(hard > 0, near, 1e-30 * near)
            kinds = torch.stack([hard, near, nearer, draw.shares(images, num_cells)])
            chosen = torch.randint(4, (images,), generator=draw.random)
            samples = kinds[chosen, torch.arange(images)].to(kernel_device)
            logits = draw.numbers(LOGITS, images, num_cells).to(kernel_device)
            options: dict[str, Any] = {"relaxed": relaxed, "backend": backend}
            check(presence_kl, logits, samples, success=success, **options)
            prior = presence_prior(samples, success, **options)
            assert ((prior >= 0) & (prior <= 1)).all()


def test_log_priors_of_arrangements_are_finite() -> None:
    places = torch.tensor([0.0, 1, 2, 100, 1e4, 1e6])
    for success, share in itertools.product(SUCCESSES, (0.0, 0.3, 1.0)):
        value = log_presence_prior((share * places).floor(), places, success)
        assert value.isfinite().all()
        assert (value <= 0).all()


def test_glimpses_are_finite() -> None:
    draw = Draw(0)
    for height, width in ((1, 1), (2, 9), (12, 12)):
        images, boxes = draw.shares(NUMBER, 3, height, width), draw.boxes(NUMBER, 2)
        check(lambda b, i: extract_glimpses(i, b, 4), boxes, images)


def test_affine_maps_are_finite() -> None:
    """Scales and shifts are those of squashed logits, as in AIR."""
    draw = Draw(0)
    images, maps = draw.shares(NUMBER, 3, 9, 7), draw.shares(NUMBER, 2, 3, 4, 4)
    scale, shift = draw.numbers(LOGITS, NUMBER, 2, 2), draw.numbers(LOGITS, NUMBER, 2, 2)

    def cut(images: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return affine.cut(images, squash(scale), shift.tanh(), 4)

    def place(maps: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return affine.place(maps, squash(scale), shift.tanh(), 9, 7)

    check(cut, images, scale, shift)
    check(place, maps, scale, shift)


def test_divergences_and_likelihoods_are_finite(compiled: bool) -> None:
    draw = Draw(0)
    extremes = [0.0, 1e-30, 10.0, 1e4, 1e8]
    mean, std = draw.numbers(extremes, NUMBER, 3, 5), 2 * squash(draw.numbers(LOGITS, NUMBER, 3, 5))
    groups = (2, 0.0, 1.0), (1, -2.0, 0.5), (2, 0.0, 10.0)
    check(lambda *xs: weighted_kls(*xs, *groups), mean, std, draw.shares(NUMBER, 3))
    image, target = draw.shares(NUMBER, 3, 4, 4), draw.shares(NUMBER, 3, 4, 4)
    for floor in (1e-30, 1e-9, 1e-6, 1e-2):
        check(lambda x, floor=floor: bernoulli_cross_entropy(x, target, floor), image)
    for level in (1e-3, 0.1, 1.0, 1e3):
        noise = torch.tensor(level)
        check(lambda x, noise=noise: normal_nll(x, target, noise), image)


def test_samples_are_finite(compiled: bool) -> None:
    draw = Draw(0)
    noise = logistic(draw.of([0.0, 1e-45, 0.5, 1 - 2**-24], NUMBER, 5))
    assert noise.isfinite().all()
    logits = draw.numbers(LOGITS, NUMBER, 5)
    for temperature in (1e-3, 0.1, 1.0, 10.0):
        check(lambda x, t=temperature: concrete_sample(x, noise, t), logits)
    scale, bias = torch.full((5,), 2.0), torch.full((5,), -1.0)
    check(lambda x: scaled_squash(x, scale, bias), logits)


NETWORK = SPAIRConfig(
    backbone_channels=(4,),
    features=4,
    hidden=6,
    passthrough=2,
    what=3,
    encoder_hidden=(6,),
    decoder_hidden=(6,),
    object_size=4,
)
NETWORKS = {
    "paper": NETWORK,
    "background": replace(NETWORK, background="mlp", importance_floor=0.00025),
    "normal": replace(NETWORK, likelihood="normal", activation="celu", background="solid"),
    "cold": replace(NETWORK, temperature=0.01, beta=10.0, likelihood_floor=1e-6),
}


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(250, id="250"),
        pytest.param(NUMBER, id="10000", marks=[pytest.mark.long, pytest.mark.timeout(3600)]),
    ],
)
@pytest.mark.parametrize("name", NETWORKS)
def test_losses_and_gradients_of_weights_are_finite(name: str, number: int, compiled: bool) -> None:
    """Weights up to a hundred times those of a new network, images of extremes."""
    draw = Draw(number)
    images_each = 25
    for index in range(number // images_each):
        torch.manual_seed(index)
        model = SPAIR(NETWORKS[name])
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(10.0 ** (4 * float(draw.uniform(1)) - 2))
        images = draw.shares(images_each, 3, 24, 24)
        flat = draw.uniform(images_each, 1, 1, 1) < 0.3
        images = torch.where(flat, draw.shares(images_each, 3, 1, 1), images)
        success = SUCCESSES[index % len(SUCCESSES)]
        losses = model(images, success=success, generator=torch.Generator().manual_seed(index))
        for term, value in losses.terms().items():
            assert value.isfinite().all(), (index, term)
        losses.total.mean().backward()
        for key, parameter in model.named_parameters():
            assert parameter.grad is None or parameter.grad.isfinite().all(), (index, key)
