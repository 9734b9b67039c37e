"""render against Algorithm 1 written as a loop over pixels and objects, on every backend."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spairkit.backends import Backend
from spairkit.rendering import render

Scene = dict[str, Any]


def make_scene(
    num_images: int = 2,
    num_objects: int = 3,
    map_size: tuple[int, int] = (5, 4),
    image_size: tuple[int, int] = (13, 11),
    channels: int = 3,
    *,
    least_presence: float = 0.1,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Scene:
    """Random objects, some of them across the border of the image."""
    random = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=random, dtype=torch.float64)

    height, width = image_size
    limits = torch.tensor([width, height], dtype=torch.float64)
    centre = (uniform(num_images, num_objects, 2) * 1.2 - 0.1) * limits
    side = 2.0 + uniform(num_images, num_objects, 2) * 0.6 * limits
    scene = {
        "rgba": uniform(num_images, num_objects, *map_size, channels + 1),
        "boxes": torch.cat([centre - side / 2, centre + side / 2], -1),
        "depth": 4 * uniform(num_images, num_objects) - 2,
        "presence": least_presence + (1 - least_presence) * uniform(num_images, num_objects),
        "background": uniform(num_images, channels, height, width),
    }
    return {name: tensor.to(dtype) for name, tensor in scene.items()}


def render_by_loop(scene: Scene, floor: float = 0.0) -> Tensor:
    """Algorithm 1, one pixel, one object and one texel at a time."""
    rgba, boxes, depth, presence, background = (scene[name].double() for name in scene)
    num_images, channels, height, width = background.shape
    texel_rows, texel_columns = rgba.shape[2:4]
    image: Tensor = background.clone()
    for b in range(num_images):
        for row in range(height):
            for column in range(width):
                bg = background[b, :, row, column]
                total, blend = torch.zeros(()).double(), torch.zeros(channels).double()
                for n in range(rgba.shape[1]):
                    x1, y1, x2, y2 = boxes[b, n].tolist()
                    if x2 <= x1 or y2 <= y1:
                        continue
                    v = (row + 0.5 - y1) / (y2 - y1) * texel_rows - 0.5
                    u = (column + 0.5 - x1) / (x2 - x1) * texel_columns - 0.5
                    colour, alpha, gamma = torch.zeros(channels).double(), 0.0, 0.0
                    for i in (math.floor(v), math.floor(v) + 1):
                        for j in (math.floor(u), math.floor(u) + 1):
                            weight = (1 - abs(v - i)) * (1 - abs(u - j))
                            if 0 <= i < texel_rows and 0 <= j < texel_columns:
                                texel = rgba[b, n, i, j]
                                opacity = float(texel[-1] * presence[b, n])
                                nearness = 1 / (1 + math.exp(float(depth[b, n])))
                                colour += weight * texel[:-1]
                                alpha += weight * opacity
                                gamma += weight * max(opacity * nearness, floor)
                            else:
                                colour += weight * bg
                    blend += gamma * (alpha * colour + (1 - alpha) * bg)
                    total += gamma
                if total > 0:
                    image[b, :, row, column] = blend / total
    return image


@pytest.mark.parametrize("floor", [0.0, 0.01])
@pytest.mark.parametrize(
    ("map_size", "image_size", "channels"),
    [((5, 4), (13, 11), 3), ((2, 7), (6, 17), 1), ((9, 2), (9, 5), 4)],
)
def test_torch_matches_the_loop(
    map_size: tuple[int, int], image_size: tuple[int, int], channels: int, floor: float
) -> None:
    scene = make_scene(2, 4, map_size, image_size, channels)
    image = render(**scene, importance_floor=floor, backend="torch")
    torch.testing.assert_close(image, render_by_loop(scene, floor), rtol=0, atol=1e-12)


@pytest.mark.parametrize("floor", [0.0, 0.05])
def test_torch_gradients_match_finite_differences(floor: float) -> None:
    scene = make_scene(1, 3, (3, 4), (6, 5), 2, seed=3)
    leaves = [tensor.requires_grad_() for tensor in scene.values()]

    def image(*inputs: Tensor) -> Tensor:
        return render(*inputs, importance_floor=floor, backend="torch")

    assert torch.autograd.gradcheck(image, leaves, atol=1e-6, rtol=1e-5)


def test_object_at_its_own_size_is_copied_exactly() -> None:
    rgba = torch.rand(1, 1, 6, 5, 4)
    rgba[..., 3] = 1
    background = torch.rand(1, 3, 10, 12)
    boxes = torch.tensor([[[3.0, 2.0, 8.0, 8.0]]])
    image = render(rgba, boxes, torch.zeros(1, 1), torch.ones(1, 1), background, backend="torch")
    expected = background.clone()
    expected[0, :, 2:8, 3:8] = rgba[0, 0, ..., :3].permute(2, 0, 1)
    torch.testing.assert_close(image, expected, rtol=0, atol=1e-6)


def test_nearer_object_hides_the_other() -> None:
    rgba = torch.ones(1, 2, 4, 4, 2)
    rgba[0, 1, ..., 0] = 0.0
    boxes = torch.tensor([[[0.0, 0.0, 4.0, 4.0]]]).expand(1, 2, 4)
    depth = torch.tensor([[-20.0, 20.0]])
    background = torch.full((1, 1, 4, 4), 0.5)
    image = render(rgba, boxes, depth, torch.ones(1, 2), background, backend="torch")
    torch.testing.assert_close(image, torch.ones(1, 1, 4, 4))


def test_16_bit_maps_are_computed_in_float32() -> None:
    scene = make_scene(dtype=torch.float32)
    scene["rgba"] = scene["rgba"].bfloat16().requires_grad_()
    image = render(**scene, backend="torch")
    exact = render(**{**scene, "rgba": scene["rgba"].detach().float()}, backend="torch")
    assert image.dtype == torch.float32
    torch.testing.assert_close(image, exact, rtol=0, atol=0)
    image.sum().backward()
    assert scene["rgba"].grad.dtype == torch.bfloat16


BACKENDS: list[Backend] = ["torch", "cpu"]


def gradients(image: Tensor, scene: Scene, cotangent: Tensor) -> dict[str, Tensor]:
    leaves = [scene[name] for name in scene]
    found = torch.autograd.grad(image, leaves, cotangent, materialize_grads=True)
    return dict(zip(scene, found, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("floor", [0.0, 0.01])
def test_absent_objects_leave_the_background_bit_identical(backend: Backend, floor: float) -> None:
    scene = make_scene(2, 6, dtype=torch.float32)
    scene["presence"].zero_()
    leaves = {name: tensor.requires_grad_() for name, tensor in scene.items()}
    image = render(**leaves, importance_floor=floor, backend=backend)
    assert torch.equal(image, scene["background"])
    for name, grad in gradients(image, leaves, torch.ones_like(image)).items():
        assert grad.isfinite().all(), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("presence", [1e-3, 1e-8])
def test_gradients_stay_finite_at_small_presence(backend: Backend, presence: float) -> None:
    scene = make_scene(2, 8, dtype=torch.float32, seed=5)
    scene["presence"].fill_(presence)
    scene["depth"][:, ::2] += 25
    leaves = {name: tensor.requires_grad_() for name, tensor in scene.items()}
    image = render(**leaves, backend=backend)
    assert image.isfinite().all()
    for name, grad in gradients(image, leaves, torch.ones_like(image)).items():
        assert grad.isfinite().all(), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "box",
    [(4, 4, 4, 8), (6, 4, 3, 8), (2, 2, 2, 2), (30, 30, 40, 40), (-9, -9, -1, -2)],
    ids=["flat", "inverted", "point", "right of image", "left of image"],
)
def test_invisible_box_gets_zero_gradients(
    backend: Backend, box: tuple[int, ...], device: torch.device
) -> None:
    scene = make_scene(1, 1, dtype=torch.float32)
    scene["boxes"] = torch.tensor([[box]], dtype=torch.float32)
    device = torch.device("cpu") if backend == "cpu" else device
    leaves = {name: tensor.to(device).requires_grad_() for name, tensor in scene.items()}
    image = render(**leaves, backend=backend)
    assert torch.equal(image, leaves["background"])
    found = gradients(image, leaves, torch.ones_like(image))
    assert torch.equal(found.pop("background"), torch.ones_like(image))
    assert all(not grad.any() for grad in found.values())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("num_images", "num_objects"), [(2, 0), (0, 3)])
def test_image_without_objects_is_the_background(
    backend: Backend, num_images: int, num_objects: int
) -> None:
    scene = make_scene(num_images, num_objects, dtype=torch.float32)
    leaves = {name: tensor.requires_grad_() for name, tensor in scene.items()}
    image = render(**leaves, backend=backend)
    assert torch.equal(image, scene["background"])
    for name, grad in gradients(image, leaves, torch.ones_like(image)).items():
        assert grad.shape == scene[name].shape
        assert grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["rgba", "boxes", "depth", "presence", "background"])
def test_nan_propagates(backend: Backend, name: str) -> None:
    scene = make_scene(2, 3, dtype=torch.float32)
    scene["boxes"][1, 1] = torch.tensor([2.0, 2.0, 9.0, 9.0])
    where = (1, 1, slice(4, 6), slice(4, 6)) if name == "background" else (1, 1)
    scene[name][where] = torch.nan
    image = render(**scene, backend=backend)
    assert image[1].isnan().any()
    assert image[0].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 1e30, -1e30])
def test_extreme_boxes_neither_hang_nor_crash(backend: Backend, value: float) -> None:
    for corner in range(4):
        scene = make_scene(1, 2, dtype=torch.float32)
        scene["boxes"][0, 1, corner] = value
        leaves = {name: tensor.requires_grad_() for name, tensor in scene.items()}
        image = render(**leaves, backend=backend)
        found = gradients(image, leaves, torch.ones_like(image))
        if math.isfinite(value):
            assert image.isfinite().all()
            assert all(gradient.isfinite().all() for gradient in found.values())
        else:
            assert image.isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), num_objects=st.integers(2, 7), channels=st.integers(1, 4))
def test_order_of_objects_does_not_change_the_image(
    backend: Backend, seed: int, num_objects: int, channels: int
) -> None:
    scene = make_scene(1, num_objects, channels=channels, seed=seed, dtype=torch.float32)
    order = torch.randperm(num_objects, generator=torch.Generator().manual_seed(seed))
    shuffled = {
        name: tensor if name == "background" else tensor[:, order] for name, tensor in scene.items()
    }
    torch.testing.assert_close(
        render(**shuffled, backend=backend), render(**scene, backend=backend), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), dx=st.integers(-4, 4), dy=st.integers(-4, 4))
def test_moving_boxes_by_whole_pixels_moves_the_image(
    backend: Backend, seed: int, dx: int, dy: int
) -> None:
    scene = make_scene(1, 3, image_size=(24, 24), seed=seed, dtype=torch.float32)
    # 1/64 px is exact in float32 at this size, so that the move is exact too
    scene["boxes"] = (scene["boxes"].clamp(5, 19) * 64).round() / 64
    scene["background"] = torch.full((1, 3, 24, 24), 0.25)
    still = render(**scene, backend=backend)
    scene["boxes"] = scene["boxes"] + torch.tensor([dx, dy, dx, dy], dtype=torch.float32)
    moved = render(**scene, backend=backend)
    torch.testing.assert_close(moved, still.roll((dy, dx), (2, 3)), rtol=0, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), floor=st.sampled_from([0.0, 0.01, 0.3]))
def test_pixels_lie_between_object_and_background_colours(
    backend: Backend, seed: int, floor: float
) -> None:
    scene = make_scene(1, 4, seed=seed, dtype=torch.float32)
    scene["rgba"][..., :3] = 0.3 + 0.2 * scene["rgba"][..., :3]
    scene["background"] = 0.4 + 0.3 * scene["background"]
    image = render(**scene, importance_floor=floor, backend=backend)
    assert image.min() >= 0.3 - 1e-6
    assert image.max() <= 0.7 + 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_background_of_one_colour_equals_a_full_one(backend: Backend) -> None:
    scene = make_scene(2, 3, dtype=torch.float32)
    colour = scene["background"][..., :1, :1].clone().requires_grad_()
    full = colour.expand(-1, -1, 13, 11)
    image = render(**{**scene, "background": colour}, size=(13, 11), backend=backend)
    assert torch.equal(image, render(**{**scene, "background": full}, backend=backend))
    image.sum().backward()
    assert colour.grad is not None
    assert colour.grad.shape == (2, 3, 1, 1)


@pytest.mark.parametrize("colours", [2, 4])
def test_triton_leaves_two_and_four_colours_to_torch(
    colours: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = make_scene(2, 3, channels=colours, dtype=torch.float32)
    wanted = render(**scene, backend="torch")
    monkeypatch.setattr("spairkit.rendering.chosen_backend", lambda *_: "triton")
    assert torch.equal(render(**scene), wanted)
    with pytest.raises(ValueError, match=f"draws 1 or 3 colours, got {colours}: use backend"):
        render(**scene, backend="triton")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rgba": torch.rand(2, 3, 5, 4)}, r"rgba must be \[B, N, h, w, C \+ 1\]"),
        ({"rgba": torch.rand(2, 3, 5, 4, 6)}, "1 to 4 colours and alpha, got 6"),
        ({"rgba": torch.rand(2, 3, 1, 4, 4)}, "2 to 64 texels per side, got 1x4"),
        ({"rgba": torch.rand(2, 3, 5, 65, 4)}, "2 to 64 texels per side, got 5x65"),
        ({"boxes": torch.rand(2, 3, 2)}, r"boxes must have shape \(2, 3, 4\).*got \(2, 3, 2\)"),
        ({"depth": torch.rand(2, 4)}, r"depth must have shape \(2, 3\).*got \(2, 4\)"),
        ({"presence": torch.rand(2, 3, 1)}, r"presence must have shape \(2, 3\)"),
        ({"background": torch.rand(2, 1, 13, 11)}, r"background must be \[2, 3, H, W\]"),
        ({"background": torch.rand(3, 13, 11)}, r"background must be \[2, 3, H, W\]"),
        (
            {"presence": torch.ones(2, 3).long()},
            "presence must be a floating-point tensor",
        ),
        ({"depth": torch.ones(2, 3).double()}, "depth is float64, so rgba must be too"),
        ({"boxes": torch.rand(2, 3, 4, device="meta")}, "boxes must be on the device of rgba, cpu"),
        ({"size": (4, 4)}, r"needs a background of \[B, C, 1, 1\]"),
        ({"size": (-1, -1)}, r"size must be two positive integers \(H, W\), got \(-1, -1\)"),
        ({"size": (4,)}, r"size must be two positive integers \(H, W\), got \(4,\)"),
        ({"size": (2.5, 4)}, "size must be two positive integers"),
        (
            {"rgba": torch.rand(2, 3, 5, 4, 4).to(torch.float8_e4m3fn)},
            "rgba must have 16, 32 or 64",
        ),
        ({"importance_floor": -0.1}, "importance_floor must be finite and at least 0, got -0.1"),
        ({"importance_floor": math.nan}, "importance_floor must be finite and at least 0, got nan"),
        ({"backend": "numba"}, "backend must be one of auto, torch, cpu, triton, got 'numba'"),
    ],
)
def test_errors_name_the_argument_and_the_rule(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        render(**{**make_scene(dtype=torch.float32), **change})
