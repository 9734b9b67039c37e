"""The search: small scenes whose best state is known, and the packaged model's."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import pytest
import torch
from torch import Tensor

import spairkit
from spairkit.boxes import box_iou
from spairkit.config import DataConfig
from spairkit.data.datasets import open_dataset
from spairkit.detections import Detections
from spairkit.detector import Detector
from spairkit.models.latents import Latents
from spairkit.models.slots import Slots
from spairkit.search.calibration import Calibration
from spairkit.search.moves import Moves
from spairkit.search.search import Found, PosteriorSearch

if TYPE_CHECKING:
    from conftest import Disc, Discs

GPU = torch.cuda.is_available()
Cells = list[tuple[int, int]]


def search_of(world: "Discs", mode: Literal["refine", "full"] = "full") -> PosteriorSearch:
    return PosteriorSearch(world.network, mode, 0.5, Calibration())


def searched(
    world: "Discs",
    monkeypatch: pytest.MonkeyPatch,
    images: Tensor,
    start: "list[Disc]",
    cells: Cells | None = None,
    mode: Literal["refine", "full"] = "full",
) -> Found:
    """What the search finds in one image, if the encoder finds `start`."""
    size = (images.shape[-2], images.shape[-1])
    latents = world.latents(world.slots(start, cells=cells), size)

    def infer(images: Tensor, sample: bool = False) -> tuple[Latents, Tensor]:
        return latents, images.new_zeros(len(images), 3, 1, 1)

    monkeypatch.setattr(world.network, "infer", infer)
    return search_of(world, mode).find(images)


def boxes_of(world: "Discs", found: Found) -> Tensor:  # [n, 4]
    """Of the objects, from left to right."""
    boxes = world.energy.boxes(found.slots)[0][found.slots.present[0] > 0]
    return boxes[boxes[:, 0].argsort()]


ONE: "list[Disc]" = [(18.0, 18.0, 12.0, 0.0)]
APART: "list[Disc]" = [(10.0, 18.0, 12.0, 0.0), (28.0, 20.0, 12.0, 0.0)]
OVERLAPPING: "list[Disc]" = [(14.0, 18.0, 12.0, 0.0), (23.0, 18.0, 12.0, 0.0)]
DIM: "list[Disc]" = [(10.0, 18.0, 12.0, 0.0), (24.0, 18.0, 12.0, -2.0)]
ONE_CELL: "list[Disc]" = [(14.0, 14.0, 8.0, 0.0), (22.0, 22.0, 8.0, 0.0)]

CASES: "dict[str, tuple[list[Disc], list[Disc], Cells | None]]" = {
    "none from none": ([], [], None),
    "none from one": ([], ONE, None),
    "one from none": (ONE, [], None),
    "one from two on it": (
        ONE,
        [(17.0, 18.0, 12.0, 0.0), (20.0, 18.0, 12.0, 0.0)],
        [(1, 1), (1, 2)],
    ),
    "one from two halves": (
        ONE,
        [(15.0, 18.0, 8.0, 0.0), (21.0, 18.0, 8.0, 0.0)],
        [(1, 1), (1, 2)],
    ),
    "two apart from none": (APART, [], None),
    "two overlapping from one of them": (OVERLAPPING, OVERLAPPING[:1], None),
    "two overlapping from one large": (OVERLAPPING, [(18.0, 18.0, 22.0, 0.0)], None),
    "two overlapping from three": (
        OVERLAPPING,
        [*OVERLAPPING, (18.0, 18.0, 12.0, 0.0)],
        [(1, 0), (1, 2), (1, 1)],
    ),
    "a dim one beside a bright one": (DIM, DIM[:1], None),
    "two of one cell from one": (ONE_CELL, ONE_CELL[:1], None),
    "two of one cell from none": (ONE_CELL, [], None),
}


@pytest.mark.parametrize("case", CASES)
def test_the_true_objects_are_found(
    discs: "type[Discs]", monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    true, start, cells = CASES[case]
    world = discs()
    images = world.draw(world.slots(true), (36, 36))
    scene = world.scene(images)
    found = searched(world, monkeypatch, images, start, cells)
    assert int(found.slots.count) == len(true)
    boxes = boxes_of(world, found)
    torch.testing.assert_close(boxes, world.boxes(true), rtol=0, atol=0.6)
    best = float(world.energy(scene, world.slots(true)))
    assert float(world.energy(scene, found.slots)) < best + 3
    first = world.slots(start, cells=cells)
    assert float(world.energy(scene, found.slots)) <= float(world.energy(scene, first)) + 1e-3


def test_two_objects_of_one_cell_share_it(
    discs: "type[Discs]", monkeypatch: pytest.MonkeyPatch
) -> None:
    world = discs()
    images = world.draw(world.slots(ONE_CELL), (36, 36))
    found = searched(world, monkeypatch, images, ONE_CELL[:1])
    assert found.slots.corner[0].tolist() == [[12.0, 12.0], [12.0, 12.0]]


def test_a_dim_object_is_dim(discs: "type[Discs]", monkeypatch: pytest.MonkeyPatch) -> None:
    world = discs()
    images = world.draw(world.slots(DIM), (36, 36))
    found = searched(world, monkeypatch, images, DIM[:1])
    what = found.slots.what[0, :, 0]
    assert sorted(what.tolist()) == pytest.approx([-2.0, 0.0], abs=0.2)


def test_refine_keeps_the_number_of_objects(
    discs: "type[Discs]", monkeypatch: pytest.MonkeyPatch
) -> None:
    world = discs()
    images = world.draw(world.slots(APART), (36, 36))
    shifted = [(11.0, 17.0, 14.0, 0.0)]
    found = searched(world, monkeypatch, images, shifted, mode="refine")
    assert int(found.slots.count) == 1
    torch.testing.assert_close(boxes_of(world, found), world.boxes(APART[:1]), rtol=0, atol=0.6)
    assert [len(costs) for costs in found.costs] == [0]
    assert float(found.slots.saved[0, 0]) > 1000


def candidates(world: "Discs") -> Slots:
    """Six objects, some of them on top of others."""
    return world.slots(
        [
            (9, 9, 10, 0.0),
            (10, 10, 12, 0.3),
            (26, 13, 11, 0.0),
            (22, 14, 12, -0.5),
            (8, 18, 8, -1.0),
            (30, 5, 8, 0.0),
        ]
    )


def least_by_enumeration(world: "Discs", images: Tensor, slots: Slots) -> tuple[list[int], float]:
    """The presence vector of the least energy of all 2^n, and this energy."""
    vectors = torch.tensor(list(itertools.product((0.0, 1.0), repeat=slots.present.shape[1])))
    every = slots.images(torch.zeros(len(vectors), dtype=torch.int64))
    scene = world.scene(images.expand(len(vectors), -1, -1, -1))
    energies = world.energy(scene, replace(every, present=vectors))
    return vectors[energies.argmin()].int().tolist(), float(energies.min())


@pytest.mark.parametrize("true", [[0, 2], [1, 3], [0, 2, 3, 5], [4], [], [1, 2, 4, 5]])
@pytest.mark.parametrize("on", [True, False])
def test_moves_without_refinement_end_at_the_least_of_all_arrangements(
    discs: "type[Discs]", monkeypatch: pytest.MonkeyPatch, true: list[int], on: bool
) -> None:
    """Births of six given objects and deaths, by the search's own rounds, against all 2^6."""
    world = discs()
    slots, size = candidates(world), (24, 36)
    shown = torch.zeros_like(slots.present)
    shown[0, true] = 1
    images = world.draw(replace(slots, present=shown), size)
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(1))
    images = (images + 0.02 * noise).clamp(0, 1)
    boxes = world.energy.boxes(slots)
    net = world.network
    monkeypatch.setattr(net, "where_of", exact_inverse(world))

    def appearance(glimpses: Tensor) -> tuple[Tensor, Tensor]:
        number = given[: glimpses.shape[0]]
        what = slots.what[0, number.clamp(min=0)][:, None].expand(-1, 2, -1)
        return what, torch.full_like(what, 0.1)

    monkeypatch.setattr(net, "appearance", appearance)
    given = torch.zeros(0, dtype=torch.int64)

    def propose(energy: object, scene: object, state: Slots, *_: object) -> Moves:
        nonlocal given
        held = world.energy.boxes(state)[0]
        absent = [
            i
            for i in range(6)
            if not any(
                state.present[0, j] > 0 and bool((held[j] - boxes[0, i]).abs().max() < 0.05)
                for j in range(held.shape[0])
            )
        ]
        present = (state.present[0] > 0).nonzero()[:, 0]
        image = torch.zeros(len(absent) + len(present), dtype=torch.int64)
        added = torch.full((len(image), 2, 4), torch.nan)
        added[: len(absent), 0] = boxes[0, absent]
        removed = torch.full((len(image), 2), -1)
        removed[len(absent) :, 0] = present
        given = torch.tensor([*absent, *[-1] * len(present)])
        return Moves(image, removed, added)

    search = search_of(world)
    latents = world.latents(world.slots([]), size)
    start = (
        slots
        if on
        else slots.images(slice(0, 1)).gather(
            torch.zeros(1, dtype=torch.int64), torch.zeros(1, 0, dtype=torch.int64)
        )
    )
    monkeypatch.setattr("spairkit.search.search.propose", propose)
    judged = search._judged
    monkeypatch.setattr(search, "_judged", lambda *parts: judged(*parts, iterations=0))
    monkeypatch.setattr(search, "_refined", lambda _, state: state)
    monkeypatch.setattr("spairkit.search.search._ROUNDS", 20)
    ended, _ = search._move(world.scene(images), start, latents)
    held = world.energy.boxes(ended)[0][ended.present[0] > 0]
    expected, least = least_by_enumeration(world, images, slots)
    wanted = boxes[0][torch.tensor(expected) > 0]
    assert len(held) == len(wanted)
    for box in held:
        assert float((wanted - box).abs().amax(1).min()) < 0.05
    assert float(world.energy(world.scene(images), ended)) == pytest.approx(least, abs=2)


def exact_inverse(world: "Discs") -> Callable[[Tensor, Tensor], Tensor]:
    return world.network.where_of
