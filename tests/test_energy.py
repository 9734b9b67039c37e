"""The energy of the search against a loop over its definition in float64."""

import math
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from spairkit.config import SPAIRConfig
from spairkit.models.slots import Slots
from spairkit.models.spair import SPAIR
from spairkit.search.energy import Energy, Scene

if TYPE_CHECKING:
    from conftest import Discs

SMALL: dict[str, Any] = {
    "backbone_channels": (8,),
    "features": 8,
    "hidden": 8,
    "passthrough": 2,
    "what": 3,
    "encoder_hidden": (),
    "decoder_hidden": (12,),
    "object_size": 5,
    "alpha_scale": 1.0,
    "alpha_bias": 1.0,
    "position_prior_std": 1.3,
    "size_prior_mean": -1.5,
    "size_prior_std": 0.7,
    "odds_end": 0.07,
    "likelihood_floor": 1e-6,
}
HEIGHT, WIDTH, CELL, ANCHOR, BETA = 14, 19, 12, 48, 0.7


def network(likelihood: str) -> SPAIR:
    torch.manual_seed(0)
    net = SPAIR(SPAIRConfig(**SMALL | {"likelihood": likelihood})).eval().requires_grad_(False)
    if likelihood == "normal":
        net.noise_std.fill_(0.2)
    return net


def state(seed: int = 0) -> tuple[Scene, Slots]:
    """Two images, the second one in colour, with four slots each; two of these are empty."""
    random = torch.Generator().manual_seed(seed)
    images = torch.rand(2, 3, HEIGHT, WIDTH, generator=random)
    images[0] = images[0, :1]
    latents = torch.randn(2, 4, 8, generator=random)
    latents[..., 2:4] -= 1.2
    scene = Scene(
        images,
        0.5 * torch.rand(2, 3, 1, 1, generator=random),
        channels=torch.tensor([1, 3]),
        evidence=torch.tensor([1.0, 0.6]),
        outside=torch.tensor([0.0, 3.0]),
        places=torch.tensor([8.0, 20.0]),
    )
    slots = Slots(
        latents,
        0.1 + torch.rand(2, 4, 8, generator=random),
        torch.tensor([[0.0, 0.0], [0.0, 12.0], [12.0, 0.0], [0.0, 0.0]]).expand(2, -1, -1),
        torch.tensor([[1.0, 0.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0]]),
        torch.full((2, 4), torch.inf),
    )
    return scene, slots


def doubled(scene: Scene, slots: Slots) -> tuple[Scene, Slots]:
    """In float64."""
    return (
        Scene(*(getattr(scene, field.name).double() for field in fields(scene))),
        Slots(*(getattr(slots, field.name).double() for field in fields(slots))),
    )


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-min(max(x, -10), 10)))


def drawn_by_hand(net: SPAIR, scene: Scene, slots: Slots, b: int) -> list[list[list[float]]]:
    """[H][W][3]: Algorithm 1 pixel by pixel; only the maps come from the model."""
    side, floor = net.config.object_size, net.config.importance_floor
    maps = net.decode(slots.what).tolist()[b]
    background = scene.background[b, :, 0, 0].tolist()
    image = []
    for y in range(HEIGHT):
        row = []
        for x in range(WIDTH):
            change, total = [0.0, 0.0, 0.0], 0.0
            for i, latents in enumerate(slots.latents[b].tolist()):
                if not slots.present[b, i]:
                    continue
                corner_y, corner_x = slots.corner[b, i].tolist()
                unit = [sigmoid(z) for z in latents[:4]]
                centre_y = corner_y + (2 * unit[0] - 0.5) * CELL
                centre_x = corner_x + (2 * unit[1] - 0.5) * CELL
                h, w = ANCHOR * unit[2], ANCHOR * unit[3]
                v = (y + 0.5 - centre_y + h / 2) * side / h - 0.5
                u = (x + 0.5 - centre_x + w / 2) * side / w - 0.5
                alpha, importance, colour = 0.0, 0.0, [0.0, 0.0, 0.0]
                for r in range(-1, side + 1):
                    for c in range(-1, side + 1):
                        share = max(0.0, 1 - abs(v - r)) * max(0.0, 1 - abs(u - c))
                        inside = 0 <= r < side and 0 <= c < side
                        *texel, a = maps[i][r][c] if inside else (*background, 0.0)
                        alpha += share * a
                        if inside:
                            importance += share * max(a * sigmoid(-latents[-1]), floor)
                        colour = [o + share * t for o, t in zip(colour, texel, strict=True)]
                total += importance
                change = [
                    s + importance * alpha * (o - k)
                    for s, o, k in zip(change, colour, background, strict=True)
                ]
            row.append(
                [
                    k + (s / total if total > 1e-30 else 0.0)
                    for k, s in zip(background, change, strict=True)
                ]
            )
        image.append(row)
    return image


def pixel_nll(net: SPAIR, drawn: float, true: float, channels: int) -> float:
    """-log p of one value of one pixel, in nats."""
    if net.config.likelihood == "normal":
        std = float(net.noise_std)
        square = (drawn - true) ** 2 / (2 * std**2)
        return (square + math.log(std) + math.log(2 * math.pi) / 2) * channels / 3
    floor = net.config.likelihood_floor
    return -true * math.log(drawn + floor) - (1 - true) * math.log(1 - drawn + floor)


def energy_by_hand(net: SPAIR, scene: Scene, slots: Slots, b: int, beta: float) -> float:
    drawn = drawn_by_hand(net, scene, slots, b)
    total = 0.0
    for y in range(HEIGHT):
        for x in range(WIDTH):
            for k in range(3):
                true = float(scene.images[b, k, y, x])
                nll = pixel_nll(net, drawn[y][x][k], true, int(scene.channels[b]))
                total += float(scene.evidence[b]) * nll
    priors = [(0.0, 1.3)] * 2 + [(-1.5, 0.7)] * 2 + [(0.0, 1.0)] * 4
    on = [i for i in range(slots.present.shape[1]) if slots.present[b, i]]
    for i in on:
        for m, (mean, std) in enumerate(priors):
            z, s = float(slots.latents[b, i, m]), float(slots.std[b, i, m])
            square = (s**2 + (z - mean) ** 2) / std**2
            total += beta * (math.log(std / s) + square / 2 - 0.5)
    n, count = int(scene.places[b]), len(on) + int(scene.outside[b])
    odds = [(0.07 / 1.07) ** c for c in range(n + 1)]
    return total - math.log(odds[count] / sum(odds) / math.comb(n, count))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("likelihood", ["bernoulli", "normal"])
def test_energy_equals_a_loop_over_its_definition(likelihood: str, dtype: torch.dtype) -> None:
    net, (scene, slots) = network(likelihood), state()
    if dtype == torch.float64:
        net, (scene, slots) = net.double(), doubled(scene, slots)
    found = Energy(net, BETA)(scene, slots)
    expected = [energy_by_hand(net, scene, slots, b, BETA) for b in range(2)]
    assert found.tolist() == pytest.approx(expected, rel=1e-7 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("likelihood", ["bernoulli", "normal"])
def test_gradients_of_latents_equal_differences(likelihood: str) -> None:
    net = network(likelihood).double()
    scene, slots = doubled(*state())
    energy = Energy(net, BETA)

    def value(latents: Tensor) -> Tensor:
        return energy(scene, slots.changed(latents))

    assert torch.autograd.gradcheck(value, slots.latents.requires_grad_(), atol=1e-4)
    (gradient,) = torch.autograd.grad(value(slots.latents).sum(), slots.latents)
    assert bool((gradient[slots.present > 0] != 0).any(0).all())
    assert not bool(gradient[slots.present == 0].any())


@pytest.mark.parametrize("likelihood", ["bernoulli", "normal"])
def test_float32_gradients_equal_those_in_float64(likelihood: str) -> None:
    net, (scene, slots) = network(likelihood), state()
    gradients = []
    for dtype in (torch.float32, torch.float64):
        if dtype == torch.float64:
            net, (scene, slots) = net.double(), doubled(scene, slots)
        latents = slots.latents.clone().requires_grad_()
        value = Energy(net, BETA)(scene, slots.changed(latents))
        gradients.append(torch.autograd.grad(value.sum(), latents)[0].double())
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("likelihood", ["bernoulli", "normal"])
def test_empty_slots_have_no_energy(likelihood: str) -> None:
    net, (scene, slots) = network(likelihood), state()
    energy = Energy(net, BETA)
    torch.testing.assert_close(energy(scene, slots.compact()), energy(scene, slots))
    moved = torch.where(slots.present[..., None] > 0, slots.latents, 3.0)
    torch.testing.assert_close(energy(scene, slots.changed(moved)), energy(scene, slots))
    none = replace(slots, present=torch.zeros_like(slots.present))
    torch.testing.assert_close(energy(scene, none.compact()), energy(scene, none))


@pytest.mark.parametrize("likelihood", ["bernoulli", "normal"])
def test_excess_sums_to_the_difference_of_reconstruction_losses(likelihood: str) -> None:
    net, (scene, slots) = network(likelihood).double(), doubled(*state())
    energy = Energy(net, BETA)
    drawn = energy.draw(scene, slots)
    expected = [
        net.reconstruction_loss(image, scene.images, scene.channels)
        for image in (drawn, scene.images)
    ]
    excess = energy.excess(scene, slots)
    assert excess.shape == (2, HEIGHT, WIDTH)
    difference = scene.evidence * (expected[0] - expected[1])
    torch.testing.assert_close(excess.sum((1, 2)), difference)
    for b, y, x in [(0, 0, 0), (1, 7, 11), (1, 13, 18)]:
        values = zip(drawn[b, :, y, x].tolist(), scene.images[b, :, y, x].tolist(), strict=True)
        channels = int(scene.channels[b])
        pixel = sum(
            pixel_nll(net, one, true, channels) - pixel_nll(net, true, true, channels)
            for one, true in values
        )
        assert float(excess[b, y, x]) == pytest.approx(float(scene.evidence[b]) * pixel)


def test_perfect_reconstruction_has_no_excess(discs: "type[Discs]") -> None:
    world = discs()
    slots = world.slots([(14, 18, 12, 0.0), (20, 20, 9, 0.5)], [])
    scene = world.scene(world.draw(slots, (36, 36)))
    assert not bool(world.energy.excess(scene, slots).any())


def test_selected_scenes_keep_all_parts() -> None:
    scene, slots = state()
    for index in (torch.tensor([1]), torch.tensor([False, True]), slice(1, 2)):
        part, few = scene.select(index), slots.select(index)
        for field in fields(Scene):
            assert torch.equal(getattr(part, field.name), getattr(scene, field.name)[1:])
        energy = Energy(network("normal"), BETA)
        torch.testing.assert_close(energy(part, few), energy(scene, slots)[1:])


@torch.no_grad()
def test_evidence_is_the_share_of_independent_pixels() -> None:
    """White noise counts fully; the same noise in blocks of four pixels a side, a sixteenth."""
    net = network("normal")
    white = 0.2 * torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(1))
    blocks = white[..., ::4, ::4].repeat_interleave(4, -1).repeat_interleave(4, -2)
    images = (0.5 + torch.cat([white, blocks])).expand(-1, 3, -1, -1)
    one = torch.ones(2)
    scene = Scene(images, torch.full((2, 3, 1, 1), 0.5), one, one, 0 * one, 8 * one)
    slots = Slots(*(torch.zeros(2, 0, *x) for x in ((8,), (8,), (2,), (), ())))
    shares = Energy(net, 0.5).evidence(scene, slots)
    assert shares[0] > 0.9
    assert float(shares[1]) == pytest.approx(1 / 16, rel=0.2)
    assert Energy(network("bernoulli"), 0.5).evidence(scene, slots).tolist() == [1.0, 1.0]
