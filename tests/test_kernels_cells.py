"""The loop over cells in Triton against the plain loop, which autograd records, in float64.

Needs Triton: `test_interpreter.py` runs this file in Triton's interpreter. The networks are tiny.
"""

import os
from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spairkit.config import SPAIRConfig
from spairkit.models.latents import Latents, Noise
from spairkit.models.spair import SPAIR

pytestmark = [
    pytest.mark.usefixtures("fast_interpreter"),
    pytest.mark.skipif(
        not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"),
        reason="needs Triton: see test_interpreter.py",
    ),
]

SMALL = SPAIRConfig(
    cell=4,
    anchor=16.0,
    backbone_channels=(4,),
    features=5,
    hidden=6,
    passthrough=3,
    what=2,
    encoder_hidden=(7,),
    decoder_hidden=(3,),
    object_size=3,
    temperature=0.7,
)
CELU = replace(SMALL, activation="celu", encoder_hidden=(7, 5), object_size=4)
ALONE = replace(SMALL, lateral=False, passthrough=0, hidden=9)
# logits beyond the bounds of clipping, where gradients are zero
CLIPPED = replace(SMALL, size_bias=-9.9, std_bias=10.0, presence_bias=14.0)
WIDE = replace(SMALL, centre_min=-0.25, centre_max=1.0, encoder_hidden=(), what=9, hidden=21)


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Launches with images of a program and height of a tile from the parameter."""
    from spairkit.kernels import cells_triton, cells_triton_backward
    from spairkit.kernels.cells_triton import Tile

    images, m, n, k, c = request.param
    tile = Tile(images, {"M": m, "N": n, "K": k, "C": c}, {"num_warps": 4})
    for module in (cells_triton, cells_triton_backward):
        monkeypatch.setattr(module, "cells_tile", lambda *_: tile)


def build(config: SPAIRConfig) -> SPAIR:
    torch.manual_seed(0)
    model = SPAIR(config).double()
    with torch.no_grad():
        for network in (model.where_network, model.depth_network, model.presence_network):
            network.last.weight.mul_(3)
            for line in (network.first, network.second):
                line.bias.normal_()
    return model


def score(latents: Latents) -> Tensor:
    """A scalar that weights every element of the latents differently."""
    generator = torch.Generator().manual_seed(3)
    total = 0.0
    for field in fields(Latents):
        value = getattr(latents, field.name)
        weight = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        total = total + (weight.to(value) * (value + value.square())).sum()
    assert isinstance(total, Tensor)
    return total


def encoded(
    model: SPAIR, images: Tensor, noise: Noise, wheels: bool, backend: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Latents, and gradients of all parameters and products that have one."""
    model.backend = backend  # type: ignore[assignment]
    model.zero_grad()
    dtype, device = next(model.parameters()).dtype, images.device
    normal, logistic, background = (
        x.to(device, dtype) for x in (noise.normal, noise.logistic, noise.background)
    )
    given = Noise(normal, logistic, background)
    latents = model._encode(images.to(dtype), given, training_wheels=wheels, relaxed=True)
    score(latents).backward()
    values = {field.name: getattr(latents, field.name).detach() for field in fields(Latents)}
    return values, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_matches_plain_loop(
    config: SPAIRConfig, grid: tuple[int, int], batch: int, *, wheels: bool = False
) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build(config).to(device)
    # smooth images: gradients of boxes jump where a sampling point moves to another pixel
    coarse = torch.rand(batch, 3, 3, 4, dtype=torch.float64, device=device)
    size = grid[0] * config.cell - 1, grid[1] * config.cell
    images = F.interpolate(coarse, size=size, mode="bicubic").clamp(0, 1)
    noise = model._draw(images, torch.Generator(device).manual_seed(1))
    exact = encoded(model, images, noise, wheels, "torch")
    if config is CLIPPED and batch == 3:
        clipped = exact[0]["presence_logit"] == 10
        assert bool(clipped.any())
        assert not bool(clipped.all())
    model = model.float()
    plain, rough = (encoded(model, images, noise, wheels, way) for way in ("torch", "triton"))
    # an unused parameter has grad None, not zeros: optimisers treat them differently
    assert set(rough[1]) == set(exact[1])
    assert len(rough[1]) >= (2 if wheels else 18)
    for actual, single, expected, least in zip(rough, plain, exact, (1e-6, 4e-6), strict=True):
        for name, value in actual.items():
            assert value.dtype == torch.float32
            size_of = expected[name].norm()
            error = float((value - expected[name]).norm() / size_of)
            allowed = 2 * float((single[name] - expected[name]).norm() / size_of)
            assert error <= allowed + least, f"{name}: {error:.1e}, by torch {allowed / 2:.1e}"


@pytest.mark.parametrize("tiles", [(4, 8, 16, 32, 64)], indirect=True)
@pytest.mark.parametrize(
    ("config", "grid", "batch", "wheels"),
    [
        (SMALL, (1, 1), 1, False),
        (CELU, (7, 5), 2, False),
        (ALONE, (2, 2), 9, False),
        (CLIPPED, (4, 1), 3, False),
        (WIDE, (1, 3), 5, False),
        (CELU, (2, 3), 2, True),
        (WIDE, (1, 2), 1, True),
    ],
    ids=["one cell", "celu", "alone", "clipped", "wide", "celu wheels", "one layer wheels"],
)
def test_equals_the_plain_loop(
    config: SPAIRConfig, grid: tuple[int, int], batch: int, wheels: bool, tiles: None
) -> None:
    assert_matches_plain_loop(config, grid, batch, wheels=wheels)


@pytest.mark.parametrize("tiles", [(3, 4, 8, 8, 16)], indirect=True)
def test_waves_and_layers_wider_than_a_tile(tiles: None) -> None:
    assert_matches_plain_loop(SMALL, (2, 3), 4)


def test_tiles_of_a_launch_equal_the_plain_loop() -> None:
    assert_matches_plain_loop(SMALL, (2, 2), 3)


@pytest.mark.long
@pytest.mark.parametrize("config", [SMALL, CELU, ALONE, CLIPPED, WIDE])
@pytest.mark.parametrize("wheels", [False, True], ids=["free", "wheels"])
@pytest.mark.parametrize("batch", [1, 2, 9])
@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (5, 1), (3, 3), (4, 7), (7, 5)])
def test_every_grid_equals_the_plain_loop(
    config: SPAIRConfig, grid: tuple[int, int], batch: int, wheels: bool
) -> None:
    assert_matches_plain_loop(config, grid, batch, wheels=wheels)
