"""The loop over cells in Triton against the plain loop, which autograd records, in float64.

Needs Triton: `test_interpreter.py` runs this file in Triton's interpreter. The networks are tiny.
"""

import os
from contextlib import nullcontext
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spairkit.backends import computing_in
from spairkit.config import SPAIRConfig
from spairkit.models.latents import Latents, Noise
from spairkit.models.spair import SPAIR

if TYPE_CHECKING:
    from conftest import CellLoop

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


@pytest.fixture
def _bf16_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter as a device with bfloat16: by itself it rounds towards zero, and
    multiplies the bits as integers."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    from spairkit.kernels import cells_triton_op

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def nearest(self: Any, value: Any, kind: Any) -> Any:
        if value.dtype.scalar != tl.float32 or kind.scalar != tl.bfloat16:
            return cast(self, value, kind)
        rounded = torch.from_numpy(value.data).bfloat16().view(torch.uint16)
        return TensorHandle(rounded.numpy(), tl.bfloat16)

    def product(self: Any, left: Any, right: Any, *others: Any) -> Any:
        """A product of two numbers in bfloat16 is exact in float32."""
        if left.dtype.scalar == tl.bfloat16:
            left, right = (cast(self, factor, tl.float32) for factor in (left, right))
        return dot(self, left, right, *others)

    def precision(device: torch.device) -> str:
        return "bf16" if torch.is_autocast_enabled(device.type) else "ieee"

    monkeypatch.setattr(InterpreterBuilder, "cast_impl", nearest)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", product)
    monkeypatch.setattr(cells_triton_op, "precision", precision)


def encoded(
    loop: "type[CellLoop]",
    model: SPAIR,
    images: Tensor,
    noise: Noise,
    wheels: bool,
    backend: str,
    bf16: bool = False,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Latents, and gradients of all parameters and products that have one."""
    model.backend = backend  # type: ignore[assignment]
    model.zero_grad()
    dtype, device = next(model.parameters()).dtype, images.device
    normal, logistic, background = (
        x.to(device, dtype) for x in (noise.normal, noise.logistic, noise.background)
    )
    given = Noise(normal, logistic, background)
    with torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext():
        latents = model._encode(images.to(dtype), given, training_wheels=wheels, relaxed=True)
    loop.score(latents).backward()
    values = {field.name: getattr(latents, field.name).detach() for field in fields(Latents)}
    return values, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def made(
    loop: "type[CellLoop]", config: SPAIRConfig, grid: tuple[int, int], batch: int
) -> tuple[SPAIR, Tensor, Noise]:
    """A model in float64, images and noise."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = loop.build(config).to(device)
    # smooth images: gradients of boxes jump where a sampling point moves to another pixel
    coarse = torch.rand(batch, 3, 3, 4, dtype=torch.float64, device=device)
    size = grid[0] * config.cell - 1, grid[1] * config.cell
    images = F.interpolate(coarse, size=size, mode="bicubic").clamp(0, 1)
    return model, images, model._draw(images, torch.Generator(device).manual_seed(1))


def assert_matches_plain_loop(
    loop: "type[CellLoop]",
    config: SPAIRConfig,
    grid: tuple[int, int],
    batch: int,
    *,
    wheels: bool = False,
) -> None:
    model, images, noise = made(loop, config, grid, batch)
    exact = encoded(loop, model, images, noise, wheels, "torch")
    if config is CLIPPED and batch == 3:
        clipped = exact[0]["presence_logit"] == 10
        assert bool(clipped.any())
        assert not bool(clipped.all())
    model = model.float()
    plain, rough = (encoded(loop, model, images, noise, wheels, way) for way in ("torch", "triton"))
    # an unused parameter has grad None, not zeros: optimisers treat them differently
    assert set(rough[1]) == set(exact[1])
    assert len(rough[1]) >= (2 if wheels else 18)
    for actual, single, expected, least in zip(rough, plain, exact, (1e-6, 4e-6), strict=True):
        for name, value in actual.items():
            assert value.dtype == torch.float32
            # the terms of a bias's gradient may cancel, so it is measured by its layer's
            layer = [
                v.norm() for n, v in expected.items() if n.split(".")[:-1] == name.split(".")[:-1]
            ]
            size_of = max(layer) if "." in name else expected[name].norm()
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
    config: SPAIRConfig,
    grid: tuple[int, int],
    batch: int,
    wheels: bool,
    tiles: None,
    cell_loop: "type[CellLoop]",
) -> None:
    assert_matches_plain_loop(cell_loop, config, grid, batch, wheels=wheels)


@pytest.mark.parametrize("tiles", [(3, 4, 8, 8, 16)], indirect=True)
def test_waves_and_layers_wider_than_a_tile(tiles: None, cell_loop: "type[CellLoop]") -> None:
    assert_matches_plain_loop(cell_loop, SMALL, (2, 3), 4)


def test_tiles_of_a_launch_equal_the_plain_loop(cell_loop: "type[CellLoop]") -> None:
    assert_matches_plain_loop(cell_loop, SMALL, (2, 2), 3)


@pytest.mark.usefixtures("_bf16_in_the_interpreter")
@pytest.mark.parametrize("tiles", [(2, 16, 16, 32, 64)], indirect=True)
@pytest.mark.parametrize(
    ("config", "wheels"),
    [(SMALL, False), (WIDE, False), (CELU, True)],
    ids=["relu", "wide", "wheels"],
)
def test_products_in_bf16_err_as_those_of_autocast(
    config: SPAIRConfig, wheels: bool, tiles: None, cell_loop: "type[CellLoop]"
) -> None:
    model, images, noise = made(cell_loop, config, (2, 3), 3)
    exact = encoded(cell_loop, model, images, noise, wheels, "torch")
    model = model.float()
    plain, rough = (
        encoded(cell_loop, model, images, noise, wheels, way, bf16=True)
        for way in ("torch", "triton")
    )
    assert set(rough[1]) == set(exact[1])
    for actual, autocast, expected in zip(rough, plain, exact, strict=True):
        errors = []
        for name, value in actual.items():
            assert value.dtype == torch.float32
            size_of = expected[name].norm()
            errors.append(float((value - expected[name]).norm() / size_of))
            allowed = 2 * float((autocast[name] - expected[name]).norm() / size_of)
            assert errors[-1] <= allowed + torch.finfo(torch.bfloat16).eps, (
                f"{name}: {errors[-1]:.1e}, by torch {allowed / 2:.1e}"
            )
        assert max(errors) > 2e-3, "products are more exact than those of bfloat16"


@pytest.mark.usefixtures("_bf16_in_the_interpreter")
@pytest.mark.parametrize("tiles", [(2, 16, 16, 32, 64)], indirect=True)
def test_products_in_bf16_leave_no_trace(tiles: None, cell_loop: "type[CellLoop]") -> None:
    model, images, noise = made(cell_loop, SMALL, (1, 2), 2)
    before, low, after = (
        encoded(cell_loop, model.float(), images, noise, False, "triton", bf16)
        for bf16 in (False, True, False)
    )
    for first, other, last in zip(before, low, after, strict=True):
        assert all(torch.equal(first[name], last[name]) for name in first)
        assert not any(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(
    ("enabled", "dtype", "expected"),
    [
        (False, torch.bfloat16, "ieee"),
        (True, torch.bfloat16, "bf16"),
        (True, torch.float16, "ieee"),
    ],
)
def test_precision_on_a_gpu_is_that_of_torch(
    enabled: bool, dtype: torch.dtype, expected: str
) -> None:
    from spairkit.kernels.cells_triton import precision

    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    try:
        torch.set_autocast_enabled("cuda", enabled)
        torch.set_autocast_dtype("cuda", dtype)
        assert precision(torch.device("cuda")) == expected
        assert precision(torch.device("cpu")) == "ieee"
        with computing_in("tf32", torch.device("cuda")):
            assert precision(torch.device("cuda")) == ("bf16" if expected == "bf16" else "tf32")
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


@pytest.mark.long
@pytest.mark.parametrize("config", [SMALL, CELU, ALONE, CLIPPED, WIDE])
@pytest.mark.parametrize("wheels", [False, True], ids=["free", "wheels"])
@pytest.mark.parametrize("batch", [1, 2, 9])
@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (5, 1), (3, 3), (4, 7), (7, 5)])
def test_every_grid_equals_the_plain_loop(
    config: SPAIRConfig,
    grid: tuple[int, int],
    batch: int,
    wheels: bool,
    cell_loop: "type[CellLoop]",
) -> None:
    assert_matches_plain_loop(cell_loop, config, grid, batch, wheels=wheels)
