"""Slots: selecting, compacting and joining the objects of images, against lists."""

import math

import pytest
import torch
from torch import Tensor

from spairkit.models.latents import Latents
from spairkit.models.slots import Slots

Row = tuple[list[float], list[float], list[float], float, float]


def some_slots(*numbers: int, slots: int = 0, seed: int = 0) -> Slots:
    """Images with so many objects each, in random slots of max(numbers) + 2, or `slots`."""
    random = torch.Generator().manual_seed(seed)
    batch, most = len(numbers), slots or max(numbers) + 2
    present = torch.zeros(batch, most)
    for b, number in enumerate(numbers):
        present[b, torch.randperm(most, generator=random)[:number]] = 1
    return Slots(
        torch.randn(batch, most, 8, generator=random),
        torch.rand(batch, most, 8, generator=random),
        12.0 * torch.randint(0, 4, (batch, most, 2), generator=random),
        present,
        torch.rand(batch, most, generator=random),
    )


def rows(slots: Slots, b: int) -> list[Row]:
    """Every slot of an image."""
    parts = (slots.latents, slots.std, slots.corner, slots.present, slots.saved)
    return list(zip(*(part[b].tolist() for part in parts), strict=True))


def objects(slots: Slots, b: int) -> list[Row]:
    """The slots with an object."""
    return [row for row in rows(slots, b) if row[3] > 0]


def test_names_of_the_latents() -> None:
    slots = some_slots(2, 3)
    joined = torch.cat([slots.where, slots.what, slots.depth[..., None]], dim=-1)
    assert torch.equal(joined, slots.latents)
    assert slots.where.shape[-1] == 4
    assert slots.what.shape[-1] == 3
    assert slots.count.tolist() == [2, 3]
    other = slots.changed(torch.zeros_like(slots.latents))
    assert not bool(other.latents.any())
    assert torch.equal(other.std, slots.std)


def test_one_slot_of_each_cell() -> None:
    def random(*shape: int) -> Tensor:
        return torch.rand(2, 6, *shape)

    latents = Latents(
        where_mean=random(4),
        where_std=random(4),
        what_mean=random(3),
        what_std=random(3),
        what=random(3),
        depth_mean=random(),
        depth_std=random(),
        depth=random(),
        presence_logit=random(),
        presence=torch.tensor([[0.0, 1, 0, 1, 1, 0], [0, 0, 0, 0, 0, 1]]),
        boxes=random(4),
    )
    slots = Slots.of(latents, columns=3, cell=10)
    assert slots.corner[1].tolist() == [[0, 0], [0, 10], [0, 20], [10, 0], [10, 10], [10, 20]]
    assert torch.equal(slots.where, latents.where_mean)
    assert torch.equal(slots.what, latents.what_mean)
    assert torch.equal(slots.depth, latents.depth_mean)
    assert torch.equal(slots.std, latents.std)
    assert torch.equal(slots.present, latents.presence)
    assert bool((slots.saved == math.inf).all())


def test_compact_keeps_objects_in_order() -> None:
    slots = some_slots(3, 0, 5)
    small = slots.compact()
    assert small.present.shape == (3, 5)
    for b in range(3):
        assert objects(small, b) == objects(slots, b)
        assert rows(small, b)[: len(objects(small, b))] == objects(small, b)


@pytest.mark.parametrize("slots", [some_slots(0, 0), some_slots(0, 0).compact()])
def test_compact_without_objects_leaves_no_slot(slots: Slots) -> None:
    assert slots.compact().latents.shape == (2, 0, 8)
    assert slots.compact().present.shape == (2, 0)


def test_gather_takes_the_named_slots() -> None:
    slots = some_slots(2, 3, 1)
    image, index = torch.tensor([2, 0, 0, 1]), torch.tensor([[0, 4], [3, 3], [1, 2], [4, 0]])
    found = slots.gather(image, index)
    for p, (b, places) in enumerate(zip(image.tolist(), index.tolist(), strict=True)):
        assert rows(found, p) == [rows(slots, b)[i] for i in places]


@pytest.mark.parametrize(
    "index", [torch.tensor([2, 0]), torch.tensor([True, False, True]), slice(1, 3)]
)
def test_images_selects_images(index: Tensor | slice) -> None:
    slots = some_slots(2, 3, 1)
    chosen = torch.arange(3)[index].tolist()
    found = slots.select(index)
    assert [rows(found, p) for p in range(len(chosen))] == [rows(slots, b) for b in chosen]


def test_join_puts_the_slots_of_the_other_last() -> None:
    first, second = some_slots(2, 3), some_slots(1, 0, seed=1)
    found = first.join(second)
    for b in range(2):
        assert rows(found, b) == rows(first, b) + rows(second, b)


def test_padding_adds_empty_slots() -> None:
    slots = some_slots(2, 3)
    found = slots.padded(9)
    empty = ([0.0] * 8, [1.0] * 8, [0.0, 0.0], 0.0, math.inf)
    for b in range(2):
        assert rows(found, b) == rows(slots, b) + [empty] * 4
    assert rows(slots.padded(5), 0) == rows(slots, 0)


def test_stack_joins_batches_of_different_sizes() -> None:
    batches = [some_slots(2, 3), some_slots(0, slots=1), some_slots(7, 1, 4, seed=1)]
    found = Slots.stack(batches)
    assert found.present.shape == (6, 9)
    expected = [objects(batch, b) for batch in batches for b in range(len(batch.present))]
    assert [objects(found, b) for b in range(6)] == expected
