"""Refinement: it converges, image by image, and leaves alone what is not free."""

from typing import TYPE_CHECKING

import pytest
import torch

from spairkit.models.slots import Slots
from spairkit.search.energy import Energy, Scene
from spairkit.search.refine import CHECK_EVERY, refine

if TYPE_CHECKING:
    from conftest import Discs

TRUE = [(14.0, 18.0, 12.0, 0.0), (23.0, 17.0, 11.0, -0.5), (30.0, 33.0, 13.0, 0.5)]
SIZE = 48, 48


def shaken(world: "Discs", seed: int, by: float = 0.2) -> tuple[Scene, Slots]:
    """A scene of three discs, and a state with errors in all latents."""
    slots = world.slots(TRUE)
    scene = world.scene(world.draw(slots, SIZE))
    random = torch.Generator().manual_seed(seed)
    noise = by * torch.randn(slots.latents.shape, generator=random)
    return scene, slots.changed(slots.latents + noise)


@pytest.mark.parametrize("seed", range(8))
def test_refinement_finds_the_true_objects(discs: "type[Discs]", seed: int) -> None:
    world = discs()
    scene, slots = shaken(world, seed)
    true, start = float(world.energy(scene, world.slots(TRUE))), float(world.energy(scene, slots))
    assert start > true + 400
    found, lowest = refine(world.energy, scene, slots, tolerance=2 / 3, most=100)
    longer, least = refine(world.energy, scene, slots, tolerance=0.0, most=400)
    assert float(lowest) < true + 2
    assert float(least) <= float(lowest) < float(least) + 2
    assert float(world.energy(scene, found)) == pytest.approx(float(lowest), abs=1e-3)
    boxes = world.energy.boxes(found)[0]
    torch.testing.assert_close(boxes, world.boxes(TRUE), rtol=0, atol=0.5)
    latents = longer.latents.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(world.energy(scene, longer.changed(latents)).sum(), latents)
    assert float(gradient.abs().max()) < 2.0


def test_a_step_too_far_is_not_convergence(discs: "type[Discs]") -> None:
    """The third energy is lower than the next eight; the way down goes on after them."""
    world = discs()
    energies: list[float] = []

    class Recording(Energy):
        def __call__(self, scene: Scene, slots: Slots) -> torch.Tensor:
            value = super().__call__(scene, slots)
            energies.append(float(value.detach()))
            return value

    scene, slots = shaken(world, 7)
    _, lowest = refine(Recording(world.network, 0.5), scene, slots, tolerance=2 / 3, most=100)
    assert min(energies[3 : 2 * CHECK_EVERY]) > energies[2] + 2
    assert float(lowest) < energies[2] - 40


def test_energy_never_rises(discs: "type[Discs]") -> None:
    """The best state is returned, not the last; also from a minimum."""
    world = discs()
    scene, slots = shaken(world, 1)
    before = float(world.energy(scene, slots))
    for most in (1, 2, 5, 17, 60):
        found, lowest = refine(world.energy, scene, slots, tolerance=0.0, most=most)
        assert float(lowest) <= before
        assert float(world.energy(scene, found)) == pytest.approx(float(lowest), abs=1e-3)
        before = float(lowest)
    best, least = refine(world.energy, scene, slots, tolerance=0.0, most=400)
    _, lowest = refine(world.energy, scene, best, tolerance=2 / 3, most=100)
    assert float(least) - 0.5 < float(lowest) <= float(least)


def test_no_iterations_measure_the_energy(discs: "type[Discs]") -> None:
    world = discs()
    scene, slots = shaken(world, 0)
    found, lowest = refine(world.energy, scene, slots, tolerance=2 / 3, most=0)
    assert found is slots
    assert torch.equal(lowest, world.energy(scene, slots))


def both(first: tuple[Scene, Slots], *others: tuple[Scene, Slots]) -> tuple[Scene, Slots]:
    """A batch of several scenes."""
    pairs = (first, *others)
    names = ("images", "background", "channels", "evidence", "outside", "places")
    joined = (torch.cat([getattr(scene, name) for scene, _ in pairs]) for name in names)
    return Scene(*joined), Slots.stack([slots for _, slots in pairs])


def test_images_that_converge_early_do_not_change_the_others(discs: "type[Discs]") -> None:
    world = discs()
    easy = world.scene(world.draw(world.slots(TRUE), SIZE)), world.slots(TRUE)
    empty = world.scene(torch.zeros(1, 3, *SIZE)), world.slots([])
    hard = [shaken(world, seed) for seed in (0, 2)]
    scene, slots = both(easy, hard[0], empty, hard[1])
    found, lowest = refine(world.energy, scene, slots, tolerance=2 / 3, most=100)
    for b, (part, alone) in enumerate((easy, hard[0], empty, hard[1])):
        one, least = refine(world.energy, part, alone, tolerance=2 / 3, most=100)
        here = found.select(slice(b, b + 1))
        count = alone.present.shape[1]
        torch.testing.assert_close(here.latents[:, :count], one.latents, rtol=0, atol=2e-3)
        assert float(lowest[b]) == pytest.approx(float(least), abs=0.05)
        assert torch.equal(here.present, slots.present[b : b + 1])


def test_converged_images_are_not_computed_again(discs: "type[Discs]") -> None:
    world = discs()
    sizes: list[int] = []

    class Counting(Energy):
        def __call__(self, scene: Scene, slots: Slots) -> torch.Tensor:
            sizes.append(len(scene.images))
            return super().__call__(scene, slots)

    energy = Counting(world.network, 0.5)
    easy = world.scene(world.draw(world.slots(TRUE), SIZE)), world.slots(TRUE)
    scene, slots = both(easy, shaken(world, 0), easy)
    refine(energy, scene, slots, tolerance=2 / 3, most=100)
    assert sizes[:CHECK_EVERY] == [3] * CHECK_EVERY
    assert sizes[-1] == 1
    assert len(sizes) < 100


def test_only_free_and_present_objects_move(discs: "type[Discs]") -> None:
    world = discs()
    scene, slots = shaken(world, 0)
    slots = slots.padded(4)
    free = torch.tensor([[0.0, 1.0, 0.0, 1.0]])
    found, lowest = refine(world.energy, scene, slots, free, tolerance=2 / 3, most=40)
    moved = (found.latents != slots.latents).all(-1)[0].tolist()
    assert moved == [False, True, False, False]
    assert torch.equal(found.latents[:, [0, 2, 3]], slots.latents[:, [0, 2, 3]])
    assert float(lowest) < float(world.energy(scene, slots)) - 10


def test_hopeless_images_give_up(discs: "type[Discs]") -> None:
    world = discs()
    steps = []

    class Counting(Energy):
        def __call__(self, scene: Scene, slots: Slots) -> torch.Tensor:
            steps.append(len(scene.images))
            return super().__call__(scene, slots)

    energy = Counting(world.network, 0.5)
    scene, slots = shaken(world, 0)
    _, least = refine(world.energy, scene, slots, tolerance=2 / 3, most=100)
    for target, hopeless in ((least - 1e6, True), (least + 5, False), (None, False)):
        steps.clear()
        _, lowest = refine(energy, scene, slots, tolerance=2 / 3, most=100, target=target)
        assert (len(steps) <= 2 * CHECK_EVERY) == hopeless
        if not hopeless:
            assert torch.equal(lowest, least)


def test_each_image_has_its_own_target(discs: "type[Discs]") -> None:
    world = discs()
    scene, slots = both(shaken(world, 0), shaken(world, 0))
    _, least = refine(world.energy, scene, slots, tolerance=2 / 3, most=100)
    target = torch.tensor([float(least[0]) - 1e6, float(least[0])])
    _, lowest = refine(world.energy, scene, slots, tolerance=2 / 3, most=100, target=target)
    assert float(lowest[0]) > float(least[0]) + 1
    assert float(lowest[1]) == pytest.approx(float(least[1]), abs=0.05)
