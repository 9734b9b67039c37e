"""The compiled loop over cells against the readable one that autograd records."""

from dataclasses import fields, replace
from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spairkit import backends
from spairkit.config import SPAIRConfig
from spairkit.models.latents import Latents, Noise
from spairkit.models.parts import Part
from spairkit.models.spair import SPAIR

if TYPE_CHECKING:
    from conftest import CellLoop

SMALL = SPAIRConfig(
    backbone_channels=(8,),
    features=7,
    hidden=12,
    passthrough=5,
    what=6,
    encoder_hidden=(11, 9),
    decoder_hidden=(12,),
    object_size=5,
    temperature=0.7,
)
VARIANTS = {
    "relu": SMALL,
    "celu": replace(SMALL, activation="celu", encoder_hidden=(11,)),
    "no lateral": replace(SMALL, lateral=False),
    "no passthrough": replace(SMALL, passthrough=0),
    # logits beyond the bounds of clipping, where gradients are zero
    "clipped": replace(SMALL, size_bias=-9.9, std_bias=10.0, presence_bias=9.8),
    "wide centres": replace(SMALL, centre_min=-0.25, centre_max=1.0),
}


def latents_of(model: SPAIR, images: Tensor, noise: Noise, wheels: bool, readable: bool) -> Latents:
    """Only the readable loop supports gradients of images: requiring them selects it."""
    images = images.clone().requires_grad_() if readable else images
    return model._encode(images, noise, training_wheels=wheels, relaxed=True)


def gradients(model: SPAIR, total: Tensor) -> dict[str, Tensor]:
    """Gradients of all parameters that have one."""
    model.zero_grad()
    total.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("height", "width"), [(12, 12), (36, 48), (13, 60), (60, 12)])
@pytest.mark.parametrize("wheels", [False, True], ids=["free", "wheels"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_compiled_loop_equals_the_readable_loop_in_float64(
    variant: str, wheels: bool, height: int, width: int, cell_loop: "type[CellLoop]"
) -> None:
    model = cell_loop.build(VARIANTS[variant])
    # smooth images: gradients of boxes jump where a sampling point moves to another pixel
    coarse = torch.rand(3, 3, 3, 4, dtype=torch.float64)
    images = F.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 1)
    noise = model._draw(images, torch.Generator().manual_seed(1))
    exact = latents_of(model, images, noise, wheels, readable=True)
    slopes = gradients(model, cell_loop.score(exact))
    model = model.float()
    single = Noise(noise.normal.float(), noise.logistic.float(), noise.background.float())
    rough = latents_of(model, images.float(), single, wheels, readable=False)
    for field in fields(Latents):
        value, expected = (getattr(x, field.name).detach() for x in (rough, exact))
        assert value.dtype == torch.float32
        assert float((value - expected).norm() / expected.norm()) < 5e-6, field.name
    if variant == "clipped":
        assert bool((rough.presence_logit == 10).any() and (rough.where_std > 1.9999).any())
    actual = gradients(model, cell_loop.score(rough))
    # an unused parameter has grad None, not zeros: optimisers treat them differently
    assert set(actual) == set(slopes)
    assert len(actual) >= (4 if wheels else 20)
    for name, grad in actual.items():
        assert float((grad - slopes[name]).norm() / slopes[name].norm()) < 2e-5, name


@pytest.mark.parametrize("sampled", [False, True], ids=["means", "sampled"])
@pytest.mark.parametrize("in_a_part", [False, True], ids=["whole", "part"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_compiled_inference_equals_the_readable_loop_in_float64(
    variant: str, in_a_part: bool, sampled: bool, cell_loop: "type[CellLoop]"
) -> None:
    model = cell_loop.build(VARIANTS[variant])
    coarse = torch.rand(3, 3, 3, 4, dtype=torch.float64)  # smooth, as above
    images = F.interpolate(coarse, size=(36, 48), mode="bicubic").clamp(0, 1)
    noise = model._draw(images, torch.Generator().manual_seed(1)) if sampled else None
    corners = [(12, 24), (0, 0), (60, 36)]
    parts = [Part(corner, size=(96, 90), core=(0, 0, 48, 36)) for corner in corners]
    part = parts if in_a_part else None
    with torch.no_grad():
        logits = model._encode(images, noise, False, relaxed=False, part=part).presence_logit
        if variant != "clipped":  # so that presences of 0 and 1 occur, and no logit is near 0
            ordered = logits.flatten().sort().values[len(logits) * 3 : -len(logits) * 3]
            widest = int(ordered.diff().argmax())
            model.presence_network.last.bias.sub_(ordered[widest : widest + 2].mean())
        exact = model._encode(images, noise, False, relaxed=False, part=part)
        single = noise and Noise(
            *(x.float() for x in (noise.normal, noise.logistic, noise.background))
        )
        rough = model.float()._encode(images.float(), single, False, relaxed=False, part=part)
    assert set(exact.presence.unique().tolist()) == ({1.0} if variant == "clipped" else {0.0, 1.0})
    for field in fields(Latents):
        value, expected = getattr(rough, field.name), getattr(exact, field.name)
        assert value.dtype == torch.float32
        assert float((value - expected).norm() / expected.norm().clamp(min=1)) < 5e-6, field.name


@pytest.mark.parametrize("variant", ["relu", "celu", "no lateral"])
def test_an_image_has_the_same_bits_in_any_batch(variant: str, cell_loop: "type[CellLoop]") -> None:
    model = cell_loop.build(VARIANTS[variant]).float()
    images, features = torch.rand(41, 3, 24, 36), torch.rand(41, 7, 2, 3)
    # a convolution of few channels has other bits in another batch
    model.backbone.register_forward_hook(lambda module, inputs, outputs: features[: len(outputs)])
    with torch.no_grad():
        together = model._encode(images, None, False, relaxed=False)
        for some in (1, 3, 8, 40):
            fewer = model._encode(images[:some], None, False, relaxed=False)
            for field in fields(Latents):
                values, expected = getattr(fewer, field.name), getattr(together, field.name)[:some]
                assert torch.equal(values, expected), field.name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # compiled, and readable
def test_nan_propagates(dtype: torch.dtype, cell_loop: "type[CellLoop]") -> None:
    model = cell_loop.build(SMALL).to(dtype)
    images = torch.rand(2, 3, 36, 36, dtype=dtype)
    images[0, :, 20, 20] = torch.nan
    noise = model._draw(images, torch.Generator().manual_seed(1))
    latents = latents_of(model, images, noise, wheels=False, readable=False)
    for field in fields(Latents):
        value = getattr(latents, field.name)
        if "what" not in field.name:  # a glimpse of a NaN box samples the image's edge
            assert bool(value[0, -1].isnan().all()), field.name
        assert bool(value[1].isfinite().all()), field.name
    grads = gradients(model, cell_loop.score(latents))
    assert bool(grads["where_network.last.weight"].isnan().all())


@pytest.mark.parametrize("variant", ["celu", "no lateral"])
def test_thread_count_does_not_change_results(variant: str, cell_loop: "type[CellLoop]") -> None:
    model = cell_loop.build(VARIANTS[variant]).float()
    coarse = torch.rand(5, 3, 3, 4)  # smooth, as above
    images = F.interpolate(coarse, size=(36, 48), mode="bicubic").clamp(0, 1)
    noise = model._draw(images, torch.Generator().manual_seed(1))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            latents = latents_of(model, images, noise, wheels=False, readable=False)
            total = (latents.what.square() + latents.presence[..., None]).sum()
            found.append([latents.boxes, *gradients(model, total).values()])
    finally:
        torch.set_num_threads(before)
    for alone, shared in zip(*found, strict=True):
        assert float((alone - shared).detach().norm() / alone.detach().norm()) < 1e-5


def test_all_networks_share_one_compilation(cell_loop: "type[CellLoop]") -> None:
    from spairkit.kernels.cells_cpu import cells_backward, cells_forward

    for variant in VARIANTS.values():
        for wheels in (False, True):
            model = cell_loop.build(variant).float()
            model(torch.rand(2, 3, 24, 24), training_wheels=wheels).total.sum().backward()
    assert len(cells_forward.signatures) == len(cells_backward.signatures) == 1


def test_results_are_bit_identical_between_runs(cell_loop: "type[CellLoop]") -> None:
    model = cell_loop.build(VARIANTS["celu"]).float()
    images = torch.rand(4, 3, 48, 48)
    runs = []
    for _ in range(2):
        losses = model(images, generator=torch.Generator().manual_seed(2))
        runs.append([losses.total, *gradients(model, losses.total.sum()).values()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_gradients_of_images_match_finite_differences(cell_loop: "type[CellLoop]") -> None:
    model = cell_loop.build(SMALL)
    images = torch.rand(1, 3, 12, 24, dtype=torch.float64, requires_grad=True)
    noise = model._draw(images.detach(), torch.Generator().manual_seed(1))

    def whole(images: Tensor) -> Tensor:
        return cell_loop.score(model._encode(images, noise, training_wheels=False, relaxed=True))

    (grad,) = torch.autograd.grad(whole(images), images)
    direction = torch.randn(images.shape, dtype=torch.float64)
    step = 1e-6 * direction
    with torch.no_grad():
        slope = (whole(images + step) - whole(images - step)) / 2e-6
    torch.testing.assert_close((grad * direction).sum(), slope, rtol=1e-4, atol=1e-4)


def test_second_derivatives_are_refused(cell_loop: "type[CellLoop]") -> None:
    model = cell_loop.build(SMALL).float()
    images = torch.rand(1, 3, 24, 24)
    noise = model._draw(images, None)
    total = cell_loop.score(model._encode(images, noise, training_wheels=False, relaxed=True))
    (grad,) = torch.autograd.grad(total, next(model.encoder.parameters()), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("compiled", [True, False])
def test_weights_changed_before_backward_raise_an_error(
    compiled: bool, monkeypatch: pytest.MonkeyPatch, cell_loop: "type[CellLoop]"
) -> None:
    monkeypatch.setitem(backends._tried, "cpu", compiled)
    model = cell_loop.build(SMALL).float()
    total = model(torch.rand(2, 3, 24, 24)).total.sum()
    with torch.no_grad():
        model.get_parameter("encoder.2.weight").mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_saved_tensors_are_freed_after_backward(cell_loop: "type[CellLoop]") -> None:
    total = cell_loop.build(SMALL).float()(torch.rand(2, 3, 24, 24)).total.sum()
    total.backward()
    with pytest.raises(RuntimeError, match="second time"):
        total.backward()


def test_losses_under_autocast_are_float32(cell_loop: "type[CellLoop]") -> None:
    model = cell_loop.build(SMALL).float()
    images = torch.rand(2, 3, 24, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model(images)
    assert losses.total.dtype == torch.float32
    assert all(bool(g.isfinite().all()) for g in gradients(model, losses.total.sum()).values())
