"""The compiled renderers against plain torch in float64, and as operators of torch.

This file tests Numba, and Triton if there is a GPU; `test_interpreter.py` runs it in Triton's
interpreter.
"""

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor

from spairkit.backends import Backend
from spairkit.rendering import render

Scene = dict[str, Any]


def make_scene(
    num_images: int = 2,
    num_objects: int = 4,
    map_size: tuple[int, int] = (6, 5),
    image_size: tuple[int, int] = (19, 12),
    channels: int = 3,
    *,
    least_presence: float = 0.1,
    device: torch.device | str = "cpu",
) -> Scene:
    """Random objects that overlap, some of them across the edge of the image."""
    random = torch.Generator().manual_seed(num_objects)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=random)

    height, width = image_size
    limits = torch.tensor([width, height])
    centre = (uniform(num_images, num_objects, 2) * 1.2 - 0.1) * limits
    side = 2.0 + uniform(num_images, num_objects, 2) * 0.6 * limits
    spread = least_presence ** uniform(num_images, num_objects)  # log-uniform up to 1
    scene = {
        "rgba": uniform(num_images, num_objects, *map_size, channels + 1),
        "boxes": torch.cat([centre - side / 2, centre + side / 2], -1),
        "depth": 4 * uniform(num_images, num_objects) - 2,
        "presence": spread,
        "background": uniform(num_images, channels, height, width),
    }
    return {name: tensor.to(device) for name, tensor in scene.items()}


def image_and_gradients(scene: Scene, **options: Any) -> tuple[Tensor, list[Tensor]]:
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in scene.items()}
    image = render(**leaves, **options)
    random = torch.Generator().manual_seed(1)
    cotangent = torch.randn(image.shape, generator=random, dtype=torch.float32).to(image)
    return image.detach(), list(torch.autograd.grad(image, list(leaves.values()), cotangent))


def assert_matches_float64(
    scene: Scene, kernel: Backend, *, gradient_error: float, floor: float = 0.0
) -> None:
    exact = {name: tensor.double() for name, tensor in scene.items()}
    expected, expected_grads = image_and_gradients(exact, importance_floor=floor, backend="torch")
    image, grads = image_and_gradients(scene, importance_floor=floor, backend=kernel)
    assert image.dtype == torch.float32
    torch.testing.assert_close(image.double(), expected, rtol=0, atol=2e-5)
    for name, grad, wanted in zip(scene, grads, expected_grads, strict=True):
        assert grad.dtype == scene[name].dtype
        error = (grad.double() - wanted).norm()
        # gradients of depth cancel where one object covers a pixel: hence the absolute tolerance
        assert error <= gradient_error * wanted.norm() + 1e-5, f"{name} is off by {error:.1e}"


SHAPES = [
    # num_images, num_objects, map_size, image_size, channels
    (2, 4, (6, 5), (19, 12), 3),
    (1, 1, (2, 2), (5, 9), 1),
    (1, 3, (14, 14), (24, 24), 3),
    (1, 2, (3, 17), (8, 8), 1),
    (1, 3, (33, 2), (11, 10), 3),
]


@pytest.mark.parametrize("floor", [0.0, 0.02])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_image_and_gradients_match_float64(
    shape: tuple[Any, ...], floor: float, kernel: Backend, kernel_device: torch.device
) -> None:
    scene = make_scene(*shape, device=kernel_device)
    assert_matches_float64(scene, kernel, gradient_error=1e-4, floor=floor)


@pytest.mark.parametrize(("least", "gradient_error"), [(1e-2, 1e-3), (1e-4, 1e-2)])
def test_small_presence_matches_float64(
    least: float, gradient_error: float, kernel: Backend, kernel_device: torch.device
) -> None:
    scene = make_scene(least_presence=least, device=kernel_device)
    assert_matches_float64(scene, kernel, gradient_error=gradient_error)


def test_more_than_32_objects_match_float64(kernel: Backend, kernel_device: torch.device) -> None:
    scene = make_scene(1, 36, (3, 3), (8, 8), 1, device=kernel_device)
    assert_matches_float64(scene, kernel, gradient_error=1e-4)


def test_integer_boxes_do_not_touch_neighbouring_pixels(
    kernel: Backend, kernel_device: torch.device
) -> None:
    # the centres of the neighbours lie exactly at the ends of the map, where weights are 0
    scene = make_scene(1, 1, (4, 4), (10, 10), device=kernel_device)
    scene["boxes"] = torch.tensor([[[3.0, 2.0, 7.0, 6.0]]], device=kernel_device)
    image, _ = image_and_gradients(scene, backend=kernel)
    touched = (image != scene["background"]).any(1)[0]
    assert touched[2:6, 3:7].all()
    touched[2:6, 3:7] = False
    assert not touched.any()


@pytest.mark.parametrize("presence", [0.0, 1e-8])
def test_faint_objects_have_finite_gradients(
    presence: float, kernel: Backend, kernel_device: torch.device
) -> None:
    scene = make_scene(1, 4, device=kernel_device)
    scene["presence"].fill_(presence)
    image, grads = image_and_gradients(scene, backend=kernel)
    assert all(grad.isfinite().all() for grad in grads)
    if presence == 0:
        assert torch.equal(image, scene["background"])


def test_default_dtype_does_not_change_results(
    kernel: Backend,
    kernel_device: torch.device,
    float64_by_default: Callable[[], AbstractContextManager[None]],
) -> None:
    scene = make_scene(1, 4, device=kernel_device)
    image, grads = image_and_gradients(scene, backend=kernel)
    with float64_by_default():
        same_image, same_grads = image_and_gradients(scene, backend=kernel)
    for actual, wanted in zip([same_image, *same_grads], [image, *grads], strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=0)


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_16_bit_maps_are_accurate_to_their_rounding(
    dtype: torch.dtype, rounding: float, kernel: Backend, kernel_device: torch.device
) -> None:
    scene = make_scene(1, 4, device=kernel_device)
    scene["rgba"] = scene["rgba"].to(dtype)
    image, grads = image_and_gradients(scene, backend=kernel)
    exact, expected = image_and_gradients(
        {name: tensor.double() for name, tensor in scene.items()}, backend="torch"
    )
    # only the stored maps are rounded: arithmetic is in float32
    torch.testing.assert_close(image.double(), exact, rtol=0, atol=2e-5)
    assert grads[0].dtype == dtype
    for grad, wanted in zip(grads, expected, strict=True):
        assert (grad.double() - wanted).norm() <= rounding * wanted.norm()


@pytest.mark.parametrize("where", ["rgba", "boxes", "depth", "presence", "background"])
def test_nan_propagates(where: str, kernel: Backend, kernel_device: torch.device) -> None:
    scene = make_scene(2, 3, (3, 3), (8, 8), device=kernel_device)
    scene["boxes"][1, 1] = torch.tensor([2.0, 2.0, 6.0, 6.0])
    scene[where][(1, 1, 4, 4) if where == "background" else (1, 1)] = torch.nan
    image, _ = image_and_gradients(scene, backend=kernel)
    assert image[1].isnan().any()
    assert image[0].isfinite().all()


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e30, -1e30])
def test_extreme_boxes_neither_hang_nor_crash(
    value: float, kernel: Backend, kernel_device: torch.device
) -> None:
    for corner in (0, 3):
        scene = make_scene(1, 2, (3, 3), (8, 8), 1, device=kernel_device)
        scene["boxes"][0, 1, corner] = value
        image, _ = image_and_gradients(scene, backend=kernel)
        assert image.isnan().all() or abs(value) == 1e30


@pytest.mark.parametrize(("num_images", "num_objects"), [(0, 2), (2, 0), (0, 0)])
def test_image_without_objects_is_the_background(
    num_images: int, num_objects: int, kernel: Backend, kernel_device: torch.device
) -> None:
    scene = make_scene(num_images, num_objects, device=kernel_device)
    image, grads = image_and_gradients(scene, backend=kernel)
    assert torch.equal(image, scene["background"])
    assert [grad.shape for grad in grads] == [tensor.shape for tensor in scene.values()]


def test_results_are_bit_identical_between_calls(
    kernel: Backend, kernel_device: torch.device
) -> None:
    scene = make_scene(device=kernel_device)
    first, first_grads = image_and_gradients(scene, backend=kernel)
    again, again_grads = image_and_gradients(scene, backend=kernel)
    assert torch.equal(first, again)
    assert all(map(torch.equal, first_grads, again_grads))


def test_thread_count_does_not_change_bits(kernel: Backend, kernel_device: torch.device) -> None:
    scene = make_scene(5, 2, (3, 4), (8, 7), device=kernel_device)
    found = []
    threads = torch.get_num_threads()
    for num_threads in (1, 3):
        torch.set_num_threads(num_threads)
        found.append(image_and_gradients(scene, backend=kernel))
    torch.set_num_threads(threads)
    assert torch.equal(found[0][0], found[1][0])
    assert all(map(torch.equal, found[0][1], found[1][1]))


def test_strides_do_not_change_bits(kernel: Backend, kernel_device: torch.device) -> None:
    scene = make_scene(2, 2, (3, 2), (7, 5), device=kernel_device)
    strided = {name: torch.stack([x, x + 1], -1)[..., 0] for name, x in scene.items()}
    image, grads = image_and_gradients(strided, backend=kernel)
    expected, expected_grads = image_and_gradients(scene, backend=kernel)
    assert torch.equal(image, expected)
    assert all(map(torch.equal, grads, expected_grads))


def awkward_samples(device: torch.device) -> list[Scene]:
    """Strided inputs, views, empty inputs, and inputs of size 1."""
    plain = make_scene(2, 1, (3, 2), (7, 5), device=device)
    one_colour = plain["background"][..., :1, :1]
    return [
        make_scene(2, 2, (3, 2), (7, 5), device=device),
        make_scene(1, 1, (2, 2), (5, 5), 1, device=device),
        make_scene(2, 0, (3, 2), (7, 5), device=device),
        make_scene(0, 2, (3, 2), (7, 5), device=device),
        make_scene(1, 1, (2, 4), (4, 9), 3, device=device),
        make_scene(1, 1, (4, 2), (9, 1), 1, device=device),
        {**plain, "background": one_colour.expand(-1, -1, 7, 5)},
        {**plain, "rgba": plain["rgba"].transpose(2, 3).contiguous().transpose(2, 3)},
        {**plain, "boxes": plain["boxes"].repeat(1, 1, 2)[..., ::2][..., [0, 1, 2, 3]]},
        {**plain, "depth": plain["depth"][:1].expand(2, 1)},
        {
            **plain,
            "background": plain["background"].permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
        },
        {**plain, "rgba": plain["rgba"].half()},
    ]


@pytest.mark.parametrize("index", range(12))
def test_operators_pass_opcheck(index: int, kernel: Backend, kernel_device: torch.device) -> None:
    scene = awkward_samples(kernel_device)[index]
    leaves = [tensor.detach().requires_grad_() for tensor in scene.values()]
    torch.library.opcheck(torch.ops.spairkit.render.default, (*leaves, 0.01, kernel))
    image, *saved = torch.ops.spairkit.render(*scene.values(), 0.01, kernel)
    # the gradient of a sum is one expanded number
    cotangent = image.new_ones(()).expand(image.shape) if index % 2 else image
    inputs = (cotangent, *scene.values(), *saved, 0.01, kernel)
    torch.library.opcheck(torch.ops.spairkit.render_backward.default, inputs)


def test_operators_compile_without_graph_breaks(
    kernel: Backend, kernel_device: torch.device
) -> None:
    scene = make_scene(1, 2, (3, 3), (8, 8), 1, device=kernel_device)

    def loss(*inputs: Tensor) -> Tensor:
        return render(*inputs, importance_floor=0.01, backend=kernel).square().sum()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [tensor.detach().requires_grad_() for tensor in scene.values()]
        results.append([function(*leaves), *torch.autograd.grad(function(*leaves), leaves)])
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager)


def test_autocast_does_not_change_results(kernel: Backend, kernel_device: torch.device) -> None:
    scene = make_scene(1, 2, (3, 3), (8, 8), device=kernel_device)
    expected, expected_grads = image_and_gradients(scene, backend=kernel)
    with torch.autocast(kernel_device.type, dtype=torch.bfloat16):
        image, grads = image_and_gradients(scene, backend=kernel)
        reference, _ = image_and_gradients(scene, backend="torch")
    assert torch.equal(image, expected)
    assert all(map(torch.equal, grads, expected_grads))
    torch.testing.assert_close(reference, expected, rtol=0, atol=1e-5)


def test_second_derivatives_are_refused(kernel: Backend, kernel_device: torch.device) -> None:
    scene = make_scene(1, 1, (3, 3), (6, 6), device=kernel_device)
    leaves = {name: tensor.requires_grad_() for name, tensor in scene.items()}
    image = render(**leaves, backend=kernel)
    (grad,) = torch.autograd.grad(image.sum(), leaves["boxes"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivatives.*backend='torch'"):
        grad.sum().backward()


def test_only_inputs_that_require_gradients_get_them(
    kernel: Backend, kernel_device: torch.device
) -> None:
    scene = make_scene(1, 2, (3, 3), (6, 6), device=kernel_device)
    for name, fixed in itertools.product(("boxes", "background"), (True, False)):
        leaves = {n: t.detach().requires_grad_((n == name) != fixed) for n, t in scene.items()}
        render(**leaves, backend=kernel).sum().backward()
        assert all((tensor.grad is not None) == tensor.requires_grad for tensor in leaves.values())


def test_unusable_backend_is_named() -> None:
    scene = make_scene()
    if torch.cuda.is_available():
        scene = {name: tensor.cuda() for name, tensor in scene.items()}
        with pytest.raises(ValueError, match="backend 'cpu' needs rgba on the CPU, got cuda"):
            render(**scene, backend="cpu")
    double = {name: tensor.double() for name, tensor in scene.items()}
    with pytest.raises(ValueError, match="rgba is float64, which backend"):
        render(**double, backend="triton")


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # in the interpreter
def test_extreme_inputs_give_finite_images_and_gradients(
    kernel: Backend, kernel_device: torch.device
) -> None:
    """Sides from the least float to the greatest, next to ordinary ones, in every combination."""
    sizes = [
        0,
        1e-45,
        1e-38,
        1e-7,
        1e-6,
        2e-6,
        0.5,
        1,
        3,
        16,
        1e4,
        1e10,
        1e20,
        1e30,
        1.7e38,
        3.4e38,
    ]
    extremes = torch.tensor([*sizes, *(-size for size in sizes)])
    for backend, number in (("torch", 10_000), (kernel, 40 if kernel == "triton" else 10_000)):
        random = torch.Generator().manual_seed(number)

        def drawn(values: Tensor, *shape: int, random: torch.Generator = random) -> Tensor:
            return values[torch.randint(len(values), shape, generator=random)]

        ordinary = torch.rand(number, 1, 4, generator=random) * 20 - 4
        is_extreme = torch.rand(number, 1, 4, generator=random) < 0.5
        scene = {
            "rgba": torch.rand(number, 1, 3, 3, 4, generator=random),
            "boxes": torch.where(is_extreme, drawn(extremes, number, 1, 4), ordinary),
            "depth": drawn(extremes, number, 1),
            "presence": drawn(torch.tensor([1, 0.5, 1e-3, 1e-8, 0]), number, 1),
            "background": torch.rand(number, 3, 8, 8, generator=random),
        }
        scene = {name: tensor.to(kernel_device) for name, tensor in scene.items()}
        image, gradients = image_and_gradients(scene, backend=backend)
        assert image.isfinite().all()
        for name, gradient in zip(scene, gradients, strict=True):
            wrong = ~gradient.isfinite().flatten(1).all(1)
            assert not wrong.any(), (backend, name, scene["boxes"][wrong][:3].tolist())
