"""The search from the parts of a watershed: its objects, and the better of two starts."""

from typing import TYPE_CHECKING, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from spairkit.detections import Detections
from spairkit.models.parts import Part
from spairkit.models.slots import Slots
from spairkit.search.calibration import Calibration
from spairkit.search.search import PosteriorSearch
from spairkit.search.trust import doubted_count
from spairkit.search.watershed_start import _chosen, watershed_slots

if TYPE_CHECKING:
    from conftest import Disc, Discs

SIZE = (48, 60)
THREE: "list[Disc]" = [(12.0, 14.0, 12.0, 0.0), (33.0, 16.0, 12.0, 0.0), (46.0, 34.0, 12.0, 0.0)]


def search_of(world: "Discs", start: Literal["encoder", "watershed"]) -> PosteriorSearch:
    return PosteriorSearch(world.network, "refine", 0.5, Calibration(), start=start)


def present_boxes(world: "Discs", slots: Slots, image: int = 0) -> Tensor:  # [n, 4]
    """Of the objects of an image, from left to right."""
    boxes = world.energy.boxes(slots)[image][slots.present[image] > 0]
    return boxes[boxes[:, 0].argsort()]


def nothing(images: Tensor) -> Tensor:
    """The boxes of an encoder that finds no object."""
    return torch.zeros(len(images), 0, 4)


def test_slots_hold_the_parts_of_each_image(discs: "type[Discs]") -> None:
    world = discs()
    images = world.draw(world.slots(THREE, [], THREE[1:2]), SIZE)
    latents, _ = world.network.infer(images)
    slots = watershed_slots(world.network, images, latents, nothing(images))
    assert slots.count.tolist() == [3, 0, 1]
    for image, true in ((0, THREE), (2, THREE[1:2])):
        found = present_boxes(world, slots, image)
        torch.testing.assert_close(found, world.boxes(true), rtol=0, atol=1.5)
    assert slots.latents.isfinite().all()
    assert slots.std.isfinite().all()
    assert (slots.saved == torch.inf).all()
    cell = world.network.config.cell
    centre = world.energy.boxes(slots).unflatten(-1, (2, 2)).mean(-2).flip(-1)
    offset = (centre - slots.corner)[slots.present > 0]
    assert (offset >= 0).all()
    assert (offset < cell).all(), "an object belongs to the cell of its centre"


def test_objects_take_deviations_of_their_cells_and_appearances_of_their_glimpses(
    discs: "type[Discs]",
) -> None:
    world = discs()
    images = world.draw(world.slots(THREE), SIZE)
    latents, _ = world.network.infer(images)
    columns = world.network.grid(*SIZE)[1]
    slots = watershed_slots(world.network, images, latents, nothing(images))
    number = (slots.corner[..., 0] * columns + slots.corner[..., 1]) / world.network.config.cell
    own = latents.std[0, number[0].long()]
    torch.testing.assert_close(slots.std[0, :, :4], own[:, :4])
    torch.testing.assert_close(slots.std[0, :, -1], own[:, -1])
    assert (slots.what == 0).all(), "the encoder made by hand gives 0 to every glimpse"
    assert (slots.depth == 0).all()


def parts(*masks: tuple[slice, slice]) -> Detections:
    """Objects of these pixels in an image of 80 x 80 pixels."""
    label_image = torch.zeros(80, 80, dtype=torch.int32)
    for number, mask in enumerate(masks, start=1):
        label_image[mask] = number
    corners = [[float(v) for v in (x.start, y.start, x.stop, y.stop)] for y, x in masks]
    return Detections(
        boxes=torch.tensor(corners).view(-1, 4),
        scores=torch.ones(len(masks)),
        what=torch.zeros(len(masks), 2),
        depth=torch.zeros(len(masks)),
        label_image=label_image,
        labels=torch.arange(1, len(masks) + 1, dtype=torch.int32),
    )


def test_a_large_part_replaces_fragments_and_not_objects_that_touch() -> None:
    image = torch.zeros(3, 80, 80)
    image[:, 20:44, 20:44] = 0.6
    whole = parts(np.s_[20:44, 20:44])
    fragments = parts(np.s_[20:24, 20:25], np.s_[38:42, 30:35], np.s_[60:72, 60:72])
    nobody = torch.zeros(0, 4)
    chosen = _chosen(fragments, whole, image, nobody)
    assert chosen.tolist() == [[60, 60, 72, 72], [20, 20, 44, 44]]
    halves = parts(np.s_[20:44, 20:32], np.s_[20:44, 32:44])
    assert _chosen(halves, whole, image, nobody).tolist() == halves.boxes.tolist()
    seen = torch.tensor([[20.0, 20, 44, 44]])
    assert _chosen(halves, whole, image, seen).tolist() == halves.boxes.tolist()
    ragged = parts(np.s_[20:44, 20:24], np.s_[20:44, 24:28])
    assert _chosen(ragged, whole, image, nobody).tolist() == ragged.boxes.tolist()
    assert _chosen(ragged, whole, image, seen).tolist() == [[20, 20, 44, 44]], "the encoder's"
    empty = parts()
    assert _chosen(empty, whole, image, nobody).tolist() == [[20, 20, 44, 44]]
    assert _chosen(halves, empty, image, nobody).tolist() == halves.boxes.tolist()
    assert _chosen(empty, empty, image, nobody).shape == (0, 4)
    assert _chosen(empty, whole, 0 * image, nobody).shape == (0, 4), "nothing to trust"


@pytest.mark.parametrize("box_contrast", [0.0, 0.5])
def test_boxes_of_the_model_and_of_masks_are_given(
    discs: "type[Discs]", box_contrast: float
) -> None:
    world = discs()
    images = world.draw(world.slots(THREE), SIZE)
    (found,) = search_of(world, "watershed").detect(images, box_contrast=box_contrast)
    boxes = found.boxes[found.boxes[:, 0].argsort()]
    torch.testing.assert_close(boxes, world.boxes(THREE), rtol=0, atol=1.5)
    halves = 2 * boxes
    assert bool((halves == halves.round()).all()) == (box_contrast > 0)


def test_a_part_gives_its_objects_and_counts_those_of_its_core(discs: "type[Discs]") -> None:
    world = discs()
    whole = world.draw(world.slots(THREE), SIZE)
    part = Part(corner=(0, 24), size=SIZE, core=(16, 0, 36, 48), outside=1)
    search = search_of(world, "watershed")
    found = search.find(whole[..., 24:], part=part)
    shifted = world.boxes(THREE[1:]) - torch.tensor([24.0, 0.0, 24.0, 0.0])
    torch.testing.assert_close(present_boxes(world, found.slots), shifted, rtol=0, atol=1.5)
    (described,) = search.describe(found, 0.5, None)
    assert described.counts is not None
    one = doubted_count(described.scores[1:])
    assert described.counts.mean == pytest.approx(one.mean), "the first lies outside the core"


def test_images_without_parts_give_no_slots(discs: "type[Discs]") -> None:
    world = discs()
    images = torch.zeros(2, 3, *SIZE)
    latents, _ = world.network.infer(images)
    assert watershed_slots(world.network, images, latents, nothing(images)).present.shape == (2, 0)
    for start in ("encoder", "watershed"):
        found = search_of(world, start).detect(images)
        assert [len(item) for item in found] == [0, 0]


def test_a_watershed_finds_what_the_encoder_has_missed(discs: "type[Discs]") -> None:
    """The encoder made by hand finds no object."""
    world = discs()
    images = world.draw(world.slots(THREE, []), SIZE)
    missed = search_of(world, "encoder").detect(images)
    assert [len(item) for item in missed] == [0, 0]
    found = search_of(world, "watershed").detect(images)
    assert [len(item) for item in found] == [3, 0]
    boxes = found[0].boxes[found[0].boxes[:, 0].argsort()]
    torch.testing.assert_close(boxes, world.boxes(THREE), rtol=0, atol=1.5)
    assert (found[0].scores > 0.5).all()


def test_explanation_has_the_objects_of_the_detection(discs: "type[Discs]") -> None:
    world = discs()
    images = world.draw(world.slots(THREE), SIZE)
    search = search_of(world, "watershed")
    (explanation,), (found,) = search.explain(images), search.detect(images)
    torch.testing.assert_close(explanation.detections.boxes, found.boxes)
    assert len(explanation.appearances) == 3
    assert float((explanation.reconstruction - images[0]).abs().mean()) < 0.02


@pytest.mark.parametrize("true", [THREE, THREE[:1], []])
def test_the_start_of_lower_energy_stays_for_each_image(
    discs: "type[Discs]", true: "list[Disc]"
) -> None:
    """Two images whose starts are the other way round."""
    world = discs()
    images = world.draw(world.slots(true, THREE[:2]), SIZE)
    scene = world.scene(images)
    first, second = world.slots(THREE[:2], THREE[:2]), world.slots(true, THREE[1:])
    kept = search_of(world, "watershed")._lower(scene, [first, second])
    assert kept.count.tolist() == [len(true), 2]
    torch.testing.assert_close(present_boxes(world, kept, 0), world.boxes(true))
    torch.testing.assert_close(present_boxes(world, kept, 1), world.boxes(THREE[:2]))
    lowest = torch.minimum(world.energy(scene, first), world.energy(scene, second))
    torch.testing.assert_close(world.energy(scene, kept), lowest)


def test_an_object_that_refinement_has_moved_away_returns(discs: "type[Discs]") -> None:
    world = discs()
    near: list[Disc] = [(13.0, 14.0, 12.0, 1.0), THREE[1], THREE[2]]
    far: list[Disc] = [near[0], (36.0, 20.0, 12.0, 1.0), (46.0, 34.0, 20.0, 1.0)]
    cells = [(1, 1), (1, 2), (2, 3)]
    before, after = (world.slots(state, cells=cells) for state in (THREE, far))
    kept = search_of(world, "watershed")._returned(before, after)
    torch.testing.assert_close(present_boxes(world, kept), world.boxes(near))
    assert kept.what[0, :, 0].tolist() == [1.0, 0.0, 0.0]


def test_objects_that_the_encoder_finds_too_are_surer(
    discs: "type[Discs]", monkeypatch: pytest.MonkeyPatch
) -> None:
    world = discs()
    images = world.draw(world.slots(THREE), SIZE)
    latents = world.latents(world.slots(THREE[1:2]), SIZE)
    monkeypatch.setattr(
        world.network, "infer", lambda images, part=None: (latents, images.new_zeros(1, 3, 1, 1))
    )
    (found,) = search_of(world, "watershed").detect(images)
    scores = found.scores[found.boxes[:, 0].argsort()].tolist()
    assert len(scores) == 3
    assert scores[1] > max(scores[0], scores[2]) + 0.2


def test_objects_without_trust_are_neither_given_nor_counted(
    discs: "type[Discs]", monkeypatch: pytest.MonkeyPatch
) -> None:
    world = discs()
    images = world.draw(world.slots(THREE), SIZE)

    def trust(found: Detections, image: Tensor, encoded: Tensor) -> Tensor:
        return torch.where(found.boxes[:, 0] < 20, 0.05, 0.5)

    monkeypatch.setattr("spairkit.search.search.trust", trust)
    (found,) = search_of(world, "watershed").detect(images)
    assert len(found) == 2
    assert (found.boxes[:, 0] > 20).all()
    assert found.counts is not None
    assert found.counts.mean == pytest.approx(doubted_count(found.scores).mean)
    (every,) = search_of(world, "watershed").detect(images, threshold=0.0)
    assert len(every) == 3
    assert every.scores.min() < 0.5


def test_a_threshold_selects_by_the_final_confidence(discs: "type[Discs]") -> None:
    world = discs()
    small: Disc = (46.0, 34.0, 8.0, 0.0)
    images = world.draw(world.slots([THREE[0], small]), SIZE)
    search = search_of(world, "watershed")
    (found,) = search.detect(images)
    assert len(found) == 2
    low, high = sorted(found.scores.tolist())
    assert 0.5 < low < high - 0.01, "a small mask ranks below a full one"
    (chosen,) = search.detect(images, threshold=(low + high) / 2)
    assert chosen.scores.tolist() == [high]
