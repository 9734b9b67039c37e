"""Masks: owners against a loop over pixels in float64; extents of masks; boxes of SPAIR."""

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor

from spairkit.models import masks as masks_module
from spairkit.models.masks import (
    HEIGHT_PERCENTILE,
    LEAST_CONTRAST,
    masks_of,
    owners,
    owners_by_torch,
)

if TYPE_CHECKING:
    from conftest import Discs

HEIGHT, WIDTH, SIDE = 23, 31, 5


def scene(seed: int, number: int = 7) -> dict[str, Any]:
    """Two images of overlapping objects: some doubtful, dim, absent, empty or beyond the image."""
    random = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=random)

    low = uniform(2, number, 2) * torch.tensor([WIDTH + 8.0, HEIGHT + 8.0]) - 8
    boxes = torch.cat([low, low + 1 + 14 * uniform(2, number, 2)], dim=-1)
    maps = uniform(2, number, SIDE, SIDE, 4)
    maps[..., 3] *= uniform(2, number, 1, 1)
    presence = uniform(2, number)
    if number > 4:
        presence[:, 1] = 0
        boxes[:, 2, 2] = boxes[:, 2, 0]
        maps[:, 3, ..., :3] *= 0.05
    return {
        "maps": maps,
        "boxes": boxes,
        "depth": 4 * uniform(2, number) - 2,
        "presence": presence,
        "background": 0.3 * uniform(2, 3, 1, 1),
        "importance_floor": 0.01,
    }


def shares(given: dict[str, Any], b: int) -> list[list[list[tuple[float, float]]]]:
    """[H][W][N] share and contrast of each object, texel by texel; see `owners`."""
    maps, boxes = given["maps"][b].tolist(), given["boxes"][b].tolist()
    background = given["background"][b, :, 0, 0].tolist()
    side = len(maps[0]) if maps else 0
    table = []
    for y in range(HEIGHT):
        row = []
        for x in range(WIDTH):
            pixel = []
            for i, (x1, y1, x2, y2) in enumerate(boxes):
                presence = float(given["presence"][b, i])
                if presence <= 0 or x2 - x1 < 1e-6 or y2 - y1 < 1e-6:
                    pixel.append((0.0, 0.0))
                    continue
                nearness = 1 / (1 + math.exp(float(given["depth"][b, i])))
                v = (y + 0.5 - y1) * side / (y2 - y1) - 0.5
                u = (x + 0.5 - x1) * side / (x2 - x1) - 0.5
                alpha, importance, difference = 0.0, 0.0, [0.0, 0.0, 0.0]
                for r in range(side):
                    for c in range(side):
                        share = max(0.0, 1 - abs(v - r)) * max(0.0, 1 - abs(u - c))
                        *colour, a = maps[i][r][c]
                        alpha += share * a * presence
                        floor = given["importance_floor"]
                        importance += share * max(a * presence * nearness, floor)
                        pairs = zip(difference, colour, background, strict=True)
                        difference = [d + share * (o - k) for d, o, k in pairs]
                contrast = alpha * max(abs(d) for d in difference)
                pixel.append((importance * contrast, contrast))
            row.append(pixel)
        table.append(row)
    return table


def by_torch(given: dict[str, Any], dtype: torch.dtype = torch.float32) -> Tensor:
    parts: dict[str, Any] = {
        k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in given.items()
    }
    parts["background"] = parts["background"].expand(-1, -1, HEIGHT, WIDTH)
    return owners_by_torch(**parts)


@pytest.mark.parametrize("seed", [0, 1])
def test_owners_equal_a_loop_over_pixels(seed: int) -> None:
    given = scene(seed, number=12)
    found = by_torch(
        {k: v.double() if isinstance(v, Tensor) else v for k, v in given.items()}, torch.float64
    )
    assert found.dtype == torch.int32
    owned = 0
    for b in range(2):
        for y, row in enumerate(shares(given, b)):
            for x, pixel in enumerate(row):
                able = [
                    (s, -i) for i, (s, contrast) in enumerate(pixel) if contrast > LEAST_CONTRAST
                ]
                expected = 1 - max(able)[1] if able else 0
                assert int(found[b, y, x]) == expected
                owned += expected > 0
    assert 0.2 < owned / (2 * HEIGHT * WIDTH) < 0.95


@pytest.mark.parametrize("seed", range(6))
def test_owners_by_numba_equal_plain_torch(seed: int) -> None:
    given = scene(seed, number=(0, 1, 7, 30, 30, 60)[seed])
    found = owners(**given, size=(HEIGHT, WIDTH))
    assert found.dtype == torch.int32
    assert found.shape == (2, HEIGHT, WIDTH)
    differ = found != by_torch(given)
    differ |= found != by_torch(given, torch.float64)
    for b, y, x in differ.nonzero().tolist():  # ties only
        pixel = shares(given, b)[y][x]
        ordered = sorted((s for s, contrast in pixel), reverse=True)
        near = min(abs(contrast - LEAST_CONTRAST) for _, contrast in pixel)
        assert near < 1e-6 or ordered[0] - ordered[1] < 1e-6 * ordered[0]
    assert int(differ.sum()) <= 3


def test_owners_take_strided_and_float64_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    given = scene(3)
    expected = owners(**given, size=(HEIGHT, WIDTH))
    strided: dict[str, Any] = given | {
        "maps": given["maps"].transpose(2, 3).contiguous().transpose(2, 3),
        "boxes": given["boxes"].repeat(1, 1, 2)[..., :4],
    }
    assert torch.equal(owners(**strided, size=(HEIGHT, WIDTH)), expected)
    double: dict[str, Any] = {
        k: v.double() if isinstance(v, Tensor) else v for k, v in given.items()
    }
    assert torch.equal(owners(**double, size=(HEIGHT, WIDTH)), by_torch(double, torch.float64))
    monkeypatch.setattr(masks_module, "runs_compiled", lambda *_: False)
    assert torch.equal(owners(**given, size=(HEIGHT, WIDTH)), by_torch(given))


def test_the_first_of_equals_owns_a_pixel() -> None:
    given = scene(0, number=1)
    twice: dict[str, Any] = {
        k: v.repeat_interleave(2, 1) if isinstance(v, Tensor) and k != "background" else v
        for k, v in given.items()
    }
    for found in (owners(**twice, size=(HEIGHT, WIDTH)), by_torch(twice)):
        assert set(found.unique().tolist()) == {0, 1}


def test_nearer_objects_own_shared_pixels() -> None:
    maps = torch.ones(1, 2, SIDE, SIDE, 4)
    boxes = torch.tensor([[[2.0, 2.0, 12.0, 12.0], [7.0, 2.0, 17.0, 12.0]]])
    ones, black = torch.ones(1, 2), torch.zeros(1, 3, 1, 1)
    for depth, owner in (([1.0, -1.0], 2), ([-1.0, 1.0], 1)):
        found = owners(maps, boxes, torch.tensor([depth]), ones, black, (14, 20), 0.0)
        assert found[0, 6, 4:7].tolist() == [1, 1, 1]
        assert found[0, 6, 8:11].tolist() == [owner] * 3
        assert found[0, 6, 13:16].tolist() == [2, 2, 2]
        assert found[0, 0].tolist() == [0] * 20


def test_objects_like_the_background_own_nothing() -> None:
    maps = torch.ones(1, 2, SIDE, SIDE, 4)
    maps[:, 0, ..., :3], maps[:, 1, ..., :3] = 0.5, 0.5 + 0.9 * LEAST_CONTRAST
    boxes = torch.tensor([[[2.0, 2.0, 12.0, 12.0], [7.0, 2.0, 17.0, 12.0]]])
    grey = torch.full((1, 3, 1, 1), 0.5)
    arguments = (boxes, torch.zeros(1, 2), torch.ones(1, 2), grey, (14, 20), 0.0)
    assert not bool(owners(maps, *arguments).any())
    maps[:, 1, ..., 0] = 0.5 + 1.1 * LEAST_CONTRAST
    assert set(owners(maps, *arguments).unique().tolist()) == {0, 2}


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("seed", range(4))
def test_masks_equal_a_loop(seed: int, share: float) -> None:
    random = np.random.default_rng(seed)
    owner = random.integers(0, 5, (17, 26)).astype(np.int32) * 2
    owner[random.random(owner.shape) < 0.3] = 0
    owner[3, 4], owner[owner == 4] = 19, 0  # one object has one pixel, one has none
    contrast = random.random(owner.shape).astype(np.float32)
    contrast[owner == 8] = 0.0
    found = masks_of(owner, contrast, share)
    slots, boxes, labels = [], [], np.zeros_like(owner)
    for label in sorted(set(owner.flat) - {0}):
        values = sorted(float(contrast[y, x]) for y, x in np.argwhere(owner == label))
        height = values[math.floor((len(values) - 1) * 0.8)]
        pixels = [
            (y, x)
            for y, x in np.argwhere(owner == label)
            if contrast[y, x] > np.float32(share) * height
        ]
        for y, x in pixels:
            labels[y, x] = label
        if pixels:
            ys, xs = [y for y, _ in pixels], [x for _, x in pixels]
            slots.append(label - 1)
            boxes.append([min(xs), min(ys), max(xs) + 1, max(ys) + 1])
    assert HEIGHT_PERCENTILE == 80
    assert found.slots.tolist() == slots
    assert found.boxes.tolist() == boxes
    assert (found.label_image == labels).all()
    assert [part.dtype.str[1:] for part in (found.label_image, found.boxes, found.slots)] == [
        "i4",
        "f4",
        "i8",
    ]


def test_a_single_bright_pixel_is_not_the_height() -> None:
    owner, contrast = np.zeros((12, 12), np.int32), np.zeros((12, 12), np.float32)
    owner[2:10, 3:9], contrast[2:10, 3:9] = 1, 0.3
    contrast[5, 5] = 1.0
    assert masks_of(owner, contrast, 0.5).boxes.tolist() == [[3, 2, 9, 10]]


def test_masks_of_a_blurred_spot_end_at_half_its_height() -> None:
    place = np.arange(41.0) - 20
    spot = np.exp(-(place[:, None] ** 2 + place**2) / (2 * 4.0**2))
    owner = (spot > 0.4).astype(np.int32)  # owned pixels reach beyond the half
    for peak in (1.0, 0.1):
        height = peak * np.sort(spot[owner == 1])[int((owner.sum() - 1) * 0.8)]
        labels = masks_of(owner, (peak * spot).astype(np.float32), 0.5).label_image
        assert ((labels == 1) == ((owner == 1) & (peak * spot > height / 2))).all()


def test_no_owner_and_no_contrast_give_no_mask() -> None:
    nothing = np.zeros((4, 6), np.int32)
    for owner in (nothing, np.ones_like(nothing)):
        found = masks_of(owner, np.zeros((4, 6), np.float32), 0.1)
        assert found.slots.shape == (0,)
        assert found.boxes.shape == (0, 4)
        assert not found.label_image.any()


def test_detections_have_masks_and_boxes_round_them(discs: "type[Discs]") -> None:
    world = discs()
    slots = world.slots(
        [(10, 12, 12, 0.0), (30, 30, 14, -1.0), (-30, 5, 10, 0.0), (40, 10, 10, 0.0)],
        [(20, 20, 16, 0.0)],
    )
    present = slots.present.clone()
    present[0, 3] = 0
    slots = replace(slots, present=present)
    images = world.draw(slots, (48, 48))
    scores = torch.tensor([[0.9, 0.8, 0.7, 0.6], [0.5, 0.0, 0.0, 0.0]])
    found = world.network.detections(images, torch.zeros(2, 3, 1, 1), slots, scores, 0.0)
    assert [len(item) for item in found] == [3, 1]
    first = found[0]
    assert first.labels is not None
    assert first.label_image is not None
    assert first.labels.tolist() == [1, 2, 3]
    torch.testing.assert_close(first.scores, scores[0, :3])
    assert set(first.label_image.unique().tolist()) == {0, 1, 2}
    for i, box in enumerate(first.boxes[:2].tolist()):
        y, x = (first.label_image == i + 1).nonzero().unbind(1)
        extent = [x.min(), y.min(), x.max() + 1, y.max() + 1]
        assert box == [int(edge) for edge in extent]
        assert bool((images[0, 0][first.label_image == i + 1] > 0.05).all())
    assert first.boxes[0].tolist() == [4, 6, 16, 18]
    assert first.boxes[2].tolist() == [0, 0, 1, 10]  # without a mask: whole pixels in the image
    assert first.area.tolist()[2] == 0
    assert first.area.tolist()[0] == pytest.approx(math.pi * 36, rel=0.2)


def test_box_contrast_0_keeps_the_boxes_of_z_where(discs: "type[Discs]") -> None:
    world = discs(box_contrast=0.3)
    slots = world.slots([(10.3, 12.2, 12.5, 0.0), (-30, 5, 10, 0.0)])
    images = world.draw(slots, (30, 30))
    scores, black = torch.ones(1, 2), torch.zeros(1, 3, 1, 1)
    found = world.network.detections(images, black, slots, scores, 0.0, 0.0)[0]
    torch.testing.assert_close(found.boxes, world.energy.boxes(slots)[0])
    owner = owners(
        world.network.decode(slots.what),
        world.energy.boxes(slots),
        slots.depth,
        scores,
        black,
        (30, 30),
        world.network.config.importance_floor,
    )
    half = masks_of(owner[0].numpy(), images[0].amax(0).numpy(), 0.5)
    assert found.label_image is not None
    assert (found.label_image.numpy() == half.label_image).all()
    given = world.network.detections(images, black, slots, scores, 0.0, 0.3)[0]
    default = world.network.detections(images, black, slots, scores, 0.0)[0]
    assert torch.equal(given.boxes, default.boxes)
    assert torch.equal(given.boxes, given.boxes.round())


def test_doubtful_objects_own_pixels_that_no_other_claims(discs: "type[Discs]") -> None:
    world = discs()
    slots = world.slots([(14, 14, 12, 0.0), (20, 14, 12, 0.0)])
    images, black = world.draw(slots, (28, 34)), torch.zeros(1, 3, 1, 1)
    for scores, owner in (([0.9, 0.3], 1), ([0.3, 0.9], 2)):
        found = world.network.detections(images, black, slots, torch.tensor([scores]), 0.0)[0]
        assert found.label_image is not None
        assert found.label_image[14, 9:12].tolist() == [1, 1, 1]
        assert found.label_image[14, 16:18].tolist() == [owner, owner]
        assert found.label_image[14, 22:25].tolist() == [2, 2, 2]


def test_spair_without_objects_has_an_empty_label_image(discs: "type[Discs]") -> None:
    found = discs().network.detect(torch.rand(2, 3, 20, 30))
    assert [len(item) for item in found] == [0, 0]
    for item in found:
        assert item.label_image is not None
        assert item.label_image.shape == (20, 30)
        assert not bool(item.label_image.any())
