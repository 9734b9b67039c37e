"""Proposals: each kind of move where it belongs, and nowhere else."""

import math
from typing import TYPE_CHECKING

import numpy as np
import pytest

from spairkit.models.slots import Slots
from spairkit.search.proposals import propose, typical_sizes

if TYPE_CHECKING:
    from conftest import Disc, Discs

Change = tuple[int, list[int], list[list[float]]]
SIZE = 48, 60


def proposed(
    world: "Discs",
    true: "list[Disc]",
    slots: Slots,
    near: list[list[list[float]]] | None = None,
    presence_logit: float = -8.0,
) -> list[Change]:
    """Image, slots that go and boxes that come of each move; all images show `true`."""
    images = world.draw(world.slots(true), SIZE).expand(len(slots.present), -1, -1, -1)
    latents = world.latents(world.slots(*[[]] * len(images)), SIZE, presence_logit)
    regions = None if near is None else [np.array(part).reshape(-1, 4) for part in near]
    typical = typical_sizes(world.energy, slots, latents)
    moves = propose(
        world.energy, world.scene(images.contiguous()), slots, latents, typical, regions
    )
    return [
        (
            int(moves.image[p]),
            [i for i in moves.removed[p].tolist() if i >= 0],
            [box for box in moves.added[p].tolist() if not math.isnan(box[0])],
        )
        for p in range(len(moves))
    ]


def kinds(changes: list[Change]) -> set[tuple[int, int]]:
    """How many go and how many come."""
    return {(len(gone), len(new)) for _, gone, new in changes}


def test_nothing_is_proposed_for_a_perfect_state(discs: "type[Discs]") -> None:
    true = [(14.0, 18.0, 12.0, 0.0), (34.0, 30.0, 10.0, 0.5)]
    world = discs()
    assert proposed(world, true, world.slots(true)) == []
    assert proposed(world, [], world.slots([])) == []


def test_an_object_is_born_where_the_image_is_not_explained(discs: "type[Discs]") -> None:
    world, true = discs(), [(14.0, 18.0, 12.0, 0.0), (40.0, 30.0, 12.0, 0.0)]
    changes = proposed(world, true, world.slots(true[:1]))
    assert kinds(changes) == {(0, 1)}
    assert len(changes) == 1
    ((x1, y1, x2, y2),) = changes[0][2]
    assert ((x1 + x2) / 2, (y1 + y2) / 2) == pytest.approx((40, 30), abs=1)
    assert (x2 - x1, y2 - y1) == pytest.approx((12, 12), abs=0.1)


def test_cells_in_doubt_are_born_with_their_box(discs: "type[Discs]") -> None:
    """Only where there is excess, and only with some doubt."""
    world, true = discs(), [(30.0, 30.0, 12.0, 0.0)]
    cells = world.latents(world.slots([]), SIZE).boxes[0].tolist()
    certain = proposed(world, true, world.slots([]))
    doubtful = proposed(world, true, world.slots([]), presence_logit=-1.0)
    assert kinds(doubtful) == {(0, 1)}
    more = [new[0] for _, _, new in doubtful if new not in [other for *_, other in certain]]
    assert 1 <= len(more) <= 9
    for box in more:
        assert min(max(abs(a - b) for a, b in zip(box, cell, strict=True)) for cell in cells) < 1e-3
        assert box[0] < 36
        assert box[2] > 24


def test_overlapping_objects_may_die_or_merge(discs: "type[Discs]") -> None:
    true = [(14.0, 18.0, 12.0, 0.0), (20.0, 18.0, 12.0, 0.0), (48.0, 40.0, 12.0, 0.0)]
    world = discs()
    changes = proposed(world, true, world.slots(true))
    assert sorted(gone for _, gone, new in changes if not new) == [[0], [1]]
    merges = [(gone, new) for _, gone, new in changes if len(gone) == 2]
    assert [gone for gone, _ in merges] == [[0, 1]]
    assert merges[0][1][0] == pytest.approx([8, 12, 26, 24], abs=1e-3)
    assert len(changes) == 3


def test_objects_that_barely_touch_do_not_merge(discs: "type[Discs]") -> None:
    """They overlap by less than a tenth, or their union is larger than two objects."""
    world = discs()
    for true in (
        [(14.0, 18.0, 12.0, 0.0), (25.5, 18.0, 12.0, 0.0)],
        [(10.0, 18.0, 12.0, 0.0), (20.0, 18.0, 12.0, 0.0), (20.0, 22.0, 30.0, 0.0)][:3],
    ):
        changes = proposed(world, true, world.slots(true))
        merged = [gone for _, gone, new in changes if len(gone) == 2 and len(new) == 1]
        assert [0, 2] not in merged
        assert len(true) > 2 or merged == []
        assert sum(len(gone) == 1 and not new for _, gone, new in changes) == len(true)


def test_badly_explained_objects_may_split(discs: "type[Discs]") -> None:
    world = discs()
    true = [(14.0, 18.0, 12.0, 0.0), (26.0, 18.0, 12.0, 0.0), (48.0, 40.0, 12.0, 0.0)]
    changes = proposed(world, true, world.slots([(20, 18, 24, 0.0), (48, 40, 12, 0.0)]))
    splits = [new for _, gone, new in changes if len(gone) == 1 and len(new) == 2]
    assert len(splits) == 4
    assert all(gone == [0] for _, gone, new in changes if len(new) == 2)
    for parts in splits:
        low, high = np.min(parts, axis=0)[:2], np.max(parts, axis=0)[2:]
        assert [*low, *high] == pytest.approx([8, 6, 32, 30], abs=1e-3)
    side_by_side = [parts for parts in splits if parts[0][1] == parts[1][1]]
    assert len(side_by_side) == 1
    (left, right) = side_by_side[0]
    assert left[2] - left[0] == pytest.approx(right[2] - right[0])
    assert 0.6 * 24 - 0.01 <= left[2] - left[0] <= 0.85 * 24 + 0.01


def test_only_moves_near_the_given_regions_are_returned(discs: "type[Discs]") -> None:
    world = discs()
    true = [(10.0, 10.0, 12.0, 0.0), (48.0, 36.0, 12.0, 0.0)]
    slots = world.slots([], [], [])
    everywhere = proposed(world, true, slots)
    assert [b for b, *_ in everywhere] == [0, 0, 1, 1, 2, 2]
    near = [[], [[4.0, 4.0, 16.0, 16.0]], [[0.0, 0.0, 3.0, 3.0], [50.0, 38.0, 60.0, 48.0]]]
    few = proposed(world, true, slots, near)
    assert [b for b, *_ in few] == [1, 2]
    centres = [[(box[0] + box[2]) / 2, (box[1] + box[3]) / 2] for _, _, (box,) in few]
    assert centres[0] == pytest.approx([10, 10], abs=1)
    assert centres[1] == pytest.approx([48, 36], abs=1)


def test_empty_slots_are_never_moved(discs: "type[Discs]") -> None:
    world = discs()
    true = [(14.0, 18.0, 12.0, 0.0), (20.0, 18.0, 12.0, 0.0)]
    slots = world.slots(true, [])
    changes = proposed(world, true, slots)
    assert all(not gone for b, gone, _ in changes if b == 1)
    assert any(new for b, _, new in changes if b == 1)


def test_typical_sizes_are_medians_of_objects_or_else_of_cells(discs: "type[Discs]") -> None:
    world = discs()
    slots = world.slots([(9, 9, 8, 0.0), (30, 30, 12, 0.0), (30, 10, 20, 0.0)], [])
    latents = world.latents(slots, SIZE)
    sizes = typical_sizes(world.energy, slots, latents)
    assert sizes[0] == pytest.approx([12, 12], abs=1e-3)
    sides = (latents.boxes[1, :, 2:] - latents.boxes[1, :, :2]).median(0).values
    assert sizes[1] == pytest.approx(sides.tolist(), abs=1e-3)
