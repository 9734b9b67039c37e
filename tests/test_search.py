"""The search: small scenes whose best state is known, and the packaged model's."""

import functools
import itertools
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
from spairkit.models.parts import Part
from spairkit.models.slots import Slots
from spairkit.search import search as search_module
from spairkit.search.calibration import Calibration
from spairkit.search.moves import Moves
from spairkit.search.proposals import propose, typical_sizes
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

    def infer(
        images: Tensor, sample: bool = False, part: Part | None = None
    ) -> tuple[Latents, Tensor]:
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
    every = slots.select(torch.zeros(len(vectors), dtype=torch.int64))
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
        else slots.select(slice(0, 1)).gather(
            torch.zeros(1, dtype=torch.int64), torch.zeros(1, 0, dtype=torch.int64)
        )
    )
    monkeypatch.setattr("spairkit.search.search.propose", propose)
    monkeypatch.setattr(search, "_judged", functools.partial(search._judged, iterations=0))
    monkeypatch.setattr(search, "_refined", lambda _, state: state)
    monkeypatch.setattr("spairkit.search.search._ROUNDS", 20)
    ended, _ = search._move(world.scene(images), start, latents)
    held = world.energy.boxes(ended)[0][ended.present[0] > 0]
    expected, least = least_by_enumeration(world, images, slots)
    wanted = boxes[0][torch.tensor(expected) > 0]
    assert len(held) == len(wanted)
    for box in held:
        assert float((wanted - box).abs().amax(1).min()) < 0.05
    assert float(world.energy(world.scene(images), ended)) == pytest.approx(least, abs=0.1)


@pytest.fixture(scope="module")
def detector() -> Detector:
    return spairkit.load(device="cpu", search="full", box_contrast=0.0)


@pytest.fixture(scope="module")
def images() -> Tensor:  # [8, 3, 48, 48]
    return open_dataset(DataConfig(max_objects=9), "test").batch(torch.arange(8)).images


def assert_same_objects(first: Detections, second: Detections, tolerance: float) -> None:
    """In any order."""
    assert len(first) == len(second)
    for box in first.boxes:
        nearest = (second.boxes - box).abs().amax(1).min()
        assert float(nearest) <= tolerance


def test_the_same_call_gives_the_same_bits(detector: Detector, images: Tensor) -> None:
    first, second = detector.detect_batch(images), detector.detect_batch(images)
    for one, other in zip(first, second, strict=True):
        assert len(one) > 0
        for name in ("boxes", "scores", "what", "depth", "label_image", "labels"):
            assert torch.equal(getattr(one, name), getattr(other, name))
        assert one.counts is not None
        assert other.counts is not None
        assert torch.equal(one.counts.probabilities, other.counts.probabilities)


@pytest.mark.parametrize("size", [1, 3])
def test_objects_do_not_depend_on_the_batch(detector: Detector, images: Tensor, size: int) -> None:
    """Up to .1 px: rounding differs with the batch, and decides on which side of a pixel's edge
    `reframe` puts a box, where the renderer's gradient jumps."""
    together = detector.detect_batch(images)
    parts = [item for part in images.split(size) for item in detector.detect_batch(part)]
    for one, other in zip(together, parts, strict=True):
        assert_same_objects(one, other, 0.01)
        assert one.counts is not None
        assert other.counts is not None
        assert one.counts.interval() == other.counts.interval()
        assert one.counts.mean == pytest.approx(other.counts.mean, abs=0.01)


def test_final_energy_is_that_of_the_state_and_below_the_start(
    detector: Detector, images: Tensor
) -> None:
    search = detector.finder
    assert isinstance(search, PosteriorSearch)
    with torch.no_grad():
        found = search.find(images)
        latents, _ = search.network.infer(images)
        start = Slots.of(latents, 4, 12)
        before, after = (search.energy(found.scene, slots) for slots in (start, found.slots))
        refined = PosteriorSearch(search.network, "refine", 0.5, Calibration()).find(images)
        between = search.energy(found.scene, refined.slots)
        again = search.energy(found.scene, found.slots.compact())
    assert bool((after < before - 10).all())
    assert bool((between < before - 10).all())
    assert float(after.mean()) < float(between.mean())
    torch.testing.assert_close(after, again)


def test_saved_is_at_most_what_a_death_costs(detector: Detector, images: Tensor) -> None:
    """Each object's death, with all others as they are, from a fresh evaluation."""
    search = detector.finder
    assert isinstance(search, PosteriorSearch)
    with torch.no_grad():
        found = search.find(images[:4])
        energy = search.energy(found.scene, found.slots)
        for b, i in (found.slots.present > 0).nonzero().tolist():
            present = found.slots.present.clone()
            present[b, i] = 0
            without = search.energy(found.scene, replace(found.slots, present=present))
            assert float(found.slots.saved[b, i]) <= float(without[b] - energy[b]) + 0.01
            assert float(found.slots.saved[b, i]) > 0


def test_explanations_draw_what_was_found(detector: Detector, images: Tensor) -> None:
    found = detector.detect_batch(images[:3])
    for one, item, image in zip(found, detector.explain_batch(images[:3]), images, strict=False):
        assert torch.equal(item.detections.boxes, one.boxes)
        assert torch.equal(item.image, image)
        assert item.appearances.shape == (len(one), 14, 14, 4)
        assert float((item.reconstruction - image).abs().mean()) < 0.05


def test_images_without_objects_have_none(discs: "type[Discs]") -> None:
    world = discs()
    for images in (torch.zeros(2, 3, 30, 40), torch.full((2, 3, 30, 40), 0.01)):
        for item in search_of(world).detect(images):
            assert len(item) == 0
            assert item.counts is not None
            assert item.counts.probability(0) > 0.9
            assert item.label_image is not None
            assert not bool(item.label_image.any())
    assert [len(item.appearances) for item in search_of(world).explain(images)] == [0, 0]


def test_images_of_a_batch_are_searched_by_themselves(discs: "type[Discs]") -> None:
    """An empty image between others, with objects for moves of several kinds."""
    world = discs()
    slots = world.slots(OVERLAPPING, [], ONE_CELL, ONE)
    found = search_of(world).detect(world.draw(slots, (36, 36)), box_contrast=0.0)
    for item, true in zip(found, (OVERLAPPING, [], ONE_CELL, ONE), strict=True):
        assert len(item) == len(true)
        iou = box_iou(item.boxes, world.boxes(true))
        assert len(true) == 0 or float(iou.amax(0).min()) > 0.85
        assert item.counts is not None
        assert item.counts.probability(len(true)) > 0.5


def test_scores_and_counts_come_from_the_calibration(discs: "type[Discs]") -> None:
    world = discs()
    images = world.draw(world.slots(APART, ONE), (36, 36))
    calibration = Calibration(midpoint=3000.0, slope=1.0, temperature=5.0)
    search = PosteriorSearch(world.network, "full", 0.5, calibration)
    with torch.no_grad():
        found = search.find(images)
    found = replace(found, costs=[torch.tensor([5.0]), torch.zeros(0)])
    described = search.describe(found, 0.0, 0.0)
    scores = calibration.score(found.slots.saved)
    on = found.slots.present > 0
    missed = float(torch.sigmoid(torch.tensor(-1.0)))
    for b, item in enumerate(described):
        assert torch.equal(item.scores, scores[b, on[b]])
        assert item.counts is not None
        mean = float(scores[b, on[b]].sum()) + (missed if b == 0 else 0)
        assert item.counts.mean == pytest.approx(mean, rel=1e-5)
    threshold = float(described[0].scores.mean())
    few = search.describe(found, threshold, 0.0)[0]
    assert torch.equal(few.scores, scores[0][scores[0] > threshold])
    assert few.counts is not None
    assert few.counts.mean == described[0].counts.mean  # type: ignore[union-attr]


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
def test_the_search_finds_the_same_on_a_gpu(detector: Detector, images: Tensor) -> None:
    there = spairkit.load(device="cuda", search="full", box_contrast=0.0)
    here, found = detector.detect_batch(images), there.detect_batch(images)
    again = there.detect_batch(images)
    for one, other, same in zip(here, found, again, strict=True):
        assert_same_objects(one, other, 0.5)
        assert torch.equal(other.boxes, same.boxes)
        assert one.counts is not None
        assert other.counts is not None
        assert other.counts.mean == pytest.approx(one.counts.mean, abs=0.1)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("case", CASES)
def test_small_scenes_are_solved_on_a_gpu(discs: "type[Discs]", case: str) -> None:
    world = discs()
    true = CASES[case][0]
    images = world.draw(world.slots(true), (36, 36))
    world.network.cuda()
    (found,) = search_of(world).detect(images.cuda(), box_contrast=0.0)
    assert len(found) == len(true)
    boxes = found.boxes[found.boxes[:, 0].argsort()]
    torch.testing.assert_close(boxes, world.boxes(true), rtol=0, atol=0.6)


@torch.no_grad()
def test_moves_made_together_change_the_energy_by_their_sum() -> None:
    """Windows overlap although the regions that change do not."""
    data = DataConfig(
        image_height=144, image_width=144, min_objects=20, max_objects=20, max_overlap=0.6
    )
    images = open_dataset(data, "test").batch(torch.arange(2)).images
    finder = spairkit.load(device="cpu", search="refine").finder
    assert isinstance(finder, PosteriorSearch)
    found = finder.find(images)
    latents, _ = finder.network.infer(images)
    scene, slots = found.scene, found.slots
    typical = typical_sizes(finder.energy, slots, latents)
    moves = propose(finder.energy, scene, slots, latents, typical)
    sides = torch.full((len(moves),), 48.0)
    outcomes = finder._judged(scene, slots, latents, moves, sides)
    chosen, _ = search_module._best(moves, outcomes, 2)
    assert len(chosen) > 1
    after = search_module._applied(slots, moves, outcomes, chosen)
    change = finder.energy(scene, after) - finder.energy(scene, slots)
    for b in range(2):
        here = [p for p in chosen if int(moves.image[p]) == b]
        assert float(change[b]) == pytest.approx(float(outcomes.change[here].sum()), abs=0.5)


def test_an_image_of_one_cell_holds_two_objects_at_most() -> None:
    images = torch.rand(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    for found in spairkit.load(device="cpu", search="full").detect_batch(images):
        assert len(found) <= 2
