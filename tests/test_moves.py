"""Moves: what each changes in its window is what it changes in the whole image."""

import math
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Literal

import pytest
import torch
from torch import Tensor

from spairkit.models.slots import Slots
from spairkit.search.energy import Scene
from spairkit.search.moves import Moves, Outcomes, judge, overlap, support

if TYPE_CHECKING:
    from conftest import Discs

SIZE = 76, 100  # of the images, px; windows are smaller
SIDE = 48
NONE = [math.nan] * 4


def doubled(scene: Scene, slots: Slots) -> tuple[Scene, Slots]:
    """In float64."""
    return (
        Scene(*(getattr(scene, field.name).double() for field in fields(scene))),
        Slots(*(getattr(slots, field.name).double() for field in fields(slots))),
    )


def random_state(world: "Discs", seed: int) -> tuple[Scene, Slots, Tensor]:
    """Two noisy images with many overlapping objects, at the rim and beyond it too, some absent.

    Returns:
        Scene, slots and the encoder's standard deviations [B, K, M].
    """
    random = torch.Generator().manual_seed(seed)
    number = 14

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=random)

    images = []
    for _ in range(2):
        x, y = uniform(-5, SIZE[1] + 5, number), uniform(-5, SIZE[0] + 5, number)
        x[:4], y[:4] = torch.tensor([2.0, 99.0, 60.0, 1.0]), torch.tensor([3.0, 74.0, 75.0, 50.0])
        diameter, what = uniform(5, 19, number), uniform(-1, 1, number)
        rows = torch.stack([x, y, diameter, what], dim=-1).tolist()
        images.append([(row[0], row[1], row[2], row[3]) for row in rows])
    slots = world.slots(*images)
    corner = slots.corner.clone()
    limit = corner.new_tensor([SIZE[0] // 12 * 12, SIZE[1] // 12 * 12])
    corner = torch.minimum(corner.clamp(min=0), limit)
    where = world.network.where_of(torch.stack([world.boxes(discs) for discs in images]), corner)
    depth = uniform(-2, 2, 2, number)
    latents = torch.cat([where, slots.what, depth[..., None]], dim=-1)
    present = (uniform(0, 1, 2, number) < 0.8).float()
    present[:, :4] = 1
    std = uniform(0.05, 0.5, 2, number, latents.shape[-1])
    slots = Slots(latents, std, corner, present, slots.saved)
    pictures = world.draw(slots, SIZE) + uniform(-0.2, 0.3, 2, 3, *SIZE)
    scene = world.scene(pictures.clamp(0, 1))
    scene = replace(scene, background=uniform(0, 0.2, 2, 3, 1, 1))
    height, width = world.network.grid(*SIZE)
    return scene, slots, uniform(0.05, 0.5, 2, height * width, latents.shape[-1])


def every_move(world: "Discs", slots: Slots, seed: int) -> Moves:
    """Deaths of all objects, births anywhere, and merges and splits of neighbours."""
    random = torch.Generator().manual_seed(seed)
    boxes = world.energy.boxes(slots)
    image: list[int] = []
    removed: list[list[int]] = []
    added: list[list[list[float]]] = []

    def add(b: int, gone: list[int], new: list[list[float]]) -> None:
        image.append(b)
        removed.append([*gone, -1, -1][:2])
        added.append([*new, NONE, NONE][:2])

    for b in range(2):
        on = (slots.present[b] > 0).nonzero()[:, 0].tolist()
        for i in on:
            add(b, [i], [])
            x1, y1, x2, y2 = boxes[b, i].tolist()
            w, h = 0.7 * (x2 - x1), 0.7 * (y2 - y1)
            add(b, [i], [[x1, y1, x1 + w, y1 + h], [x2 - w, y2 - h, x2, y2]])
            for j in on:
                union = torch.cat([boxes[b, [i, j], :2].amin(0), boxes[b, [i, j], 2:].amax(0)])
                if j > i and float((union[2:] - union[:2]).max()) < 30:
                    add(b, [i, j], [union.tolist()])
        for _ in range(6):
            x, y, w, h = torch.rand(4, generator=random).tolist()
            low = [x * SIZE[1] - 6, y * SIZE[0] - 6]
            add(b, [], [[*low, low[0] + 5 + 10 * w, low[1] + 5 + 10 * h]])
    return Moves(
        torch.tensor(image), torch.tensor(removed), torch.tensor(added, dtype=slots.latents.dtype)
    )


def made(slots: Slots, moves: Moves, outcomes: Outcomes, p: int) -> Slots:
    """The state [1, N + 2, ...] of the image of move p, with this move made."""
    b = int(moves.image[p])
    state = slots.select(slice(b, b + 1))
    after = outcomes.slots.select(slice(p, p + 1))
    latents, present = state.latents.clone(), state.present.clone()
    for place, slot in enumerate(outcomes.index[p].tolist()):
        if slot >= 0:
            latents[0, slot] = after.latents[0, place]
    for slot in moves.removed[p].tolist():
        if slot >= 0:
            present[0, slot] = 0
    parts = {field.name: getattr(after, field.name)[:, -2:] for field in fields(Slots)}
    return replace(state, latents=latents, present=present).join(Slots(**parts))


@pytest.mark.parametrize("iterations", [0, 20])
@pytest.mark.parametrize("likelihood", ["bernoulli", "normal"])
def test_a_move_changes_the_energy_of_the_window_and_the_image_equally(
    discs: "type[Discs]", likelihood: Literal["bernoulli", "normal"], iterations: int
) -> None:
    world = discs(likelihood=likelihood, importance_floor=0.01)
    scene, slots, std = random_state(world, seed=1)
    moves = every_move(world, slots, seed=2)
    if iterations:
        moves = moves.select(slice(None, None, 3))
    world.network.double()
    scene, slots = doubled(scene, slots)
    moves = replace(moves, added=moves.added.double())
    outcomes = judge(world.energy, scene, slots, std.double(), moves, SIDE, iterations)
    known = outcomes.change.isfinite()
    assert len(moves) > 20
    assert float(known.double().mean()) > 0.8
    before = world.energy(scene, slots)
    drawn = world.energy.draw(scene, slots)
    y, x = torch.arange(SIZE[0])[:, None] + 0.5, torch.arange(SIZE[1]) + 0.5
    for p in known.nonzero()[:, 0].tolist():
        b = int(moves.image[p])
        part, state = scene.select(slice(b, b + 1)), made(slots, moves, outcomes, p)
        change = float(world.energy(part, state) - before[b])
        assert float(outcomes.change[p]) == pytest.approx(change, abs=1e-5)
        assert int(state.count - slots.count[b]) == int(moves.balance[p])
        x1, y1, x2, y2 = outcomes.region[p]
        beyond = (x < x1) | (x > x2) | (y < y1) | (y > y2)
        image = world.energy.draw(part, state)[0]
        torch.testing.assert_close(image[:, beyond], drawn[b][:, beyond], rtol=0, atol=1e-12)


@pytest.mark.parametrize("iterations", [0, 20])
def test_windows_are_exact_in_float32(discs: "type[Discs]", iterations: int) -> None:
    world = discs()
    scene, slots, std = random_state(world, seed=3)
    moves = every_move(world, slots, seed=4)
    outcomes = judge(world.energy, scene, slots, std, moves, SIDE, iterations)
    scene64, slots64 = doubled(scene, slots)
    world.network.double()
    before = world.energy(scene64, slots64)
    for p in outcomes.change.isfinite().nonzero()[:, 0].tolist():
        b = int(moves.image[p])
        state = doubled(scene, made(slots, moves, outcomes, p))[1]
        change = float(world.energy(scene64.select(slice(b, b + 1)), state) - before[b])
        assert float(outcomes.change[p]) == pytest.approx(change, abs=3e-3)


def test_new_objects_lie_in_their_boxes(discs: "type[Discs]") -> None:
    """In the image's coordinates, with the deviations of their cell, and without ghosts."""
    world = discs()
    scene, slots, std = random_state(world, seed=5)
    moves = every_move(world, slots, seed=6)
    outcomes = judge(world.energy, scene, slots, std, moves, SIDE, iterations=0)
    boxes = world.energy.boxes(outcomes.slots)
    for p in range(len(moves)):
        comes = ~moves.added[p, :, 0].isnan()
        assert torch.equal(outcomes.slots.present[p, -2:] > 0, comes)
        torch.testing.assert_close(boxes[p, -2:][comes], moves.added[p][comes], rtol=0, atol=0.02)
        for i in comes.nonzero()[:, 0].tolist():
            row, column = (outcomes.slots.corner[p, i - 2] / 12).tolist()
            assert (row, column) == (int(row), int(column))
            centre = (moves.added[p, i, :2] + moves.added[p, i, 2:]) / 2
            assert abs(12 * column + 6 - float(centre[0].clamp(0, SIZE[1] - 1))) <= 6.01
            assert abs(12 * row + 6 - float(centre[1].clamp(0, SIZE[0] - 1))) <= 6.01
            cell = int(row) * (-(-SIZE[1] // 12)) + int(column)
            new, given = outcomes.slots.std[p, i - 2], std[moves.image[p], cell]
            assert torch.equal(new[:4], given[:4])
            assert torch.equal(new[-1], given[-1])
            torch.testing.assert_close(new[4:-1], torch.full((2,), 2 / (1 + math.exp(3))))
            assert float(outcomes.slots.saved[p, i - 2]) == math.inf


def test_windows_as_large_as_the_image_know_every_move(discs: "type[Discs]") -> None:
    world = discs()
    scene, slots, std = random_state(world, seed=7)
    moves = every_move(world, slots, seed=8).select(slice(None, None, 4))
    for iterations in (0, 5):
        large = judge(world.energy, scene, slots, std, moves, 1000, iterations)
        assert bool(large.change.isfinite().all())


def test_moves_that_leave_the_window_are_unknown(discs: "type[Discs]") -> None:
    """A disc of 40 px does not fit into a window of 32 px."""
    world = discs()
    slots = world.slots([(50, 40, 40, 0.0), (20, 12, 10, 0.0)])
    scene = world.scene(world.draw(slots, SIZE))
    std = torch.full((1, 63, 7), 0.1)
    moves = Moves.deaths(torch.tensor([0, 0]), torch.tensor([0, 1]))
    outcomes = judge(world.energy, scene, slots, std, moves, 32, iterations=0)
    assert outcomes.change.isfinite().tolist() == [False, True]


def test_births_larger_than_the_window_are_unknown(discs: "type[Discs]") -> None:
    world = discs()
    slots = world.slots([(20, 12, 10, 0.0)])
    scene = world.scene(world.draw(slots, SIZE))
    added = torch.tensor([[[30.0, 20.0, 70.0, 60.0], NONE], [[40.0, 30.0, 60.0, 50.0], NONE]])
    moves = Moves(torch.tensor([0, 0]), torch.full((2, 2), -1), added)
    std = torch.full((1, 63, 7), 0.1)
    outcomes = judge(world.energy, scene, slots, std, moves, 32, iterations=0)
    assert outcomes.change.isfinite().tolist() == [False, True]


def test_moves_after_which_an_object_grows_out_of_the_window_are_unknown(
    discs: "type[Discs]",
) -> None:
    """The disc has 40 px; the object that is left when the small one dies grows from 26 px."""
    world = discs()
    slots = world.slots([(40, 36, 26, 0.0), (40, 36, 6, 0.0)])
    scene = world.scene(world.draw(world.slots([(40, 36, 40, 0.0)]), SIZE))
    moves = Moves.deaths(torch.tensor([0]), torch.tensor([1]))
    std = torch.full((1, 63, 7), 0.1)
    known = [
        bool(judge(world.energy, scene, slots, std, moves, side, iterations).change.isfinite())
        for side, iterations in ((32, 0), (32, 20), (100, 20))
    ]
    assert known == [True, False, True]


def test_a_move_does_not_depend_on_the_others(discs: "type[Discs]") -> None:
    world = discs()
    scene, slots, std = random_state(world, seed=9)
    moves = every_move(world, slots, seed=10)
    together = judge(world.energy, scene, slots, std, moves, SIDE, iterations=5)
    for p in range(0, len(moves), 7):
        index = torch.tensor([p])
        alone = judge(world.energy, scene, slots, std, moves.select(index), SIDE, iterations=5)
        change = float(together.change[p])
        assert float(alone.change) == pytest.approx(change, abs=0.05)
        one = together.select(index)
        torch.testing.assert_close(alone.region, one.region, rtol=0, atol=0.1)
        kept = alone.index[0][alone.index[0] >= 0].tolist()
        assert one.index[0][one.index[0] >= 0].tolist() == kept


def test_only_objects_near_the_move_are_refined(discs: "type[Discs]") -> None:
    world = discs()
    slots = world.slots([(15, 20, 12, 0.3), (24, 20, 12, 0.0), (45, 20, 12, 0.8)])
    scene = world.scene(world.draw(world.slots([(24, 20, 11, 0.0), (45, 20, 12, 0.0)]), (40, 60)))
    std = torch.full((1, 20, 7), 0.1)
    moves = Moves.deaths(torch.tensor([0]), torch.tensor([0]))
    outcomes = judge(world.energy, scene, slots, std, moves, 60, iterations=20)
    place = {slot: i for i, slot in enumerate(outcomes.index[0].tolist()) if slot >= 0}
    assert sorted(place) == [1]
    after = outcomes.slots.latents[0]
    assert not torch.equal(after[place[1]], slots.latents[0, 1])
    assert any(torch.equal(latents, slots.latents[0, 2]) for latents in after)
    assert float(outcomes.change) < 0


def test_moves_of_images_without_slots(discs: "type[Discs]") -> None:
    world = discs()
    slots = world.slots([], [])
    scene = world.scene(world.draw(world.slots([(20, 20, 12, 0.0)], []), (36, 36)))
    added = torch.tensor([[[14.0, 14.0, 26.0, 26.0], NONE]] * 2)
    moves = Moves(torch.tensor([0, 1]), torch.full((2, 2), -1), added)
    std = torch.full((2, 9, 7), 0.1)
    for iterations in (0, 20):
        change = judge(world.energy, scene, slots, std, moves, 36, iterations).change
        assert change[0] < -1000
        assert change[1] > 30


def test_balance_counts_what_comes_less_what_goes() -> None:
    box = [0.0, 0.0, 1.0, 1.0]
    moves = Moves(
        torch.zeros(4, dtype=torch.int64),
        torch.tensor([[3, -1], [-1, -1], [1, 2], [1, -1]]),
        torch.tensor([[NONE, NONE], [box, NONE], [box, NONE], [box, box]]),
    )
    assert moves.balance.tolist() == [-1, 1, -1, 1]
    assert len(moves) == 4
    assert moves.select(torch.tensor([2, 0])).balance.tolist() == [-1, -1]


def test_support_and_overlap_of_regions() -> None:
    boxes = torch.tensor([[0.0, 10.0, 14.0, 24.0], [5.0, 5.0, 5.0, 5.0]])
    assert support(boxes, 14).tolist() == [[-1.0, 9.0, 15.0, 25.0], [4.5, 4.5, 5.5, 5.5]]
    first = torch.tensor([0.0, 0.0, 4.0, 4.0])
    others = torch.tensor([[3.0, 3.0, 9.0, 9.0], [4.0, 0.0, 8.0, 4.0], [-2.0, 1.0, 9.0, 2.0]])
    assert overlap(first, others).tolist() == [True, False, True]
