"""Masks in a label image against loops over pixels and pairs of them, and pycocotools."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_masks
from torch import Tensor

from spairkit.label_images import (
    areas,
    coco_segmentations,
    foreground_ari,
    halved,
    intensities,
    outlines,
    relabelled,
)


def painted(height: int, width: int, labels: int, seed: int) -> Tensor:
    """A label image of blobs with labels 0 to `labels`; some labels may be absent."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.zeros(height, width, dtype=torch.int32)
    for label in range(1, labels + 1):
        y, x = (int(torch.randint(0, side, (), generator=generator)) for side in image.shape)
        h, w = torch.randint(0, 9, (2,), generator=generator).tolist()
        image[y : y + h, x : x + w] = label
    return image


def int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (33, 1), (20, 31), (64, 300)])
@pytest.mark.parametrize("seed", range(5))
def test_segmentations_equal_pycocotools(shape: tuple[int, int], seed: int) -> None:
    image = painted(*shape, labels=12, seed=seed)
    labels = torch.arange(1, 15, dtype=torch.int32).flip(0)  # 13 and 14 have no pixel
    for label, segmentation in zip(labels.tolist(), coco_segmentations(image, labels), strict=True):
        mask = np.asfortranarray((image == label).numpy().astype(np.uint8))
        theirs = coco_masks.encode(mask)
        assert segmentation["counts"] == theirs["counts"].decode()
        assert segmentation["size"] == theirs["size"] == list(shape)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.sampled_from([1, 2, 3, 5]))
def test_segmentations_of_any_pattern_equal_pycocotools(values: list[int], width: int) -> None:
    image = int32(values + [0] * (-len(values) % width)).reshape(-1, width)
    for label, segmentation in enumerate(coco_segmentations(image, int32([1, 2, 3])), start=1):
        mask = np.asfortranarray((image == label).numpy().astype(np.uint8))
        assert segmentation["counts"] == coco_masks.encode(mask)["counts"].decode()


def test_segmentations_of_long_runs_equal_pycocotools() -> None:
    image = torch.zeros(3000, 2500, dtype=torch.int32)
    image[:, 1000] = 1
    image[17, 2000:] = 1
    segmentation = coco_segmentations(image, int32([1]))[0]
    mask = np.asfortranarray(image.numpy().astype(np.uint8))
    assert segmentation["counts"] == coco_masks.encode(mask)["counts"].decode()


def test_areas_and_intensities_equal_loops() -> None:
    image = painted(30, 40, labels=9, seed=1)
    picture = torch.rand(3, 30, 40, generator=torch.Generator().manual_seed(2))
    labels = int32([4, 9, 1, 100, 4])
    area_of, intensity_of = areas(image, labels), intensities(image, labels, picture)
    for i, label in enumerate(labels.tolist()):
        area, intensity = int(area_of[i]), float(intensity_of[i])
        inside = [
            float(picture[:, y, x].double().mean())
            for y in range(30)
            for x in range(40)
            if image[y, x] == label
        ]
        assert area == len(inside)
        if inside:
            assert intensity == pytest.approx(sum(inside) / len(inside), rel=1e-6)
        else:
            assert math.isnan(intensity)
    assert (area_of.dtype, intensity_of.dtype) == (torch.int64, torch.float32)


def test_relabelling_numbers_the_chosen_objects() -> None:
    image = int32([0, 5, 2, 2, 7, 9]).reshape(2, 3)
    assert relabelled(image, int32([7, 2, 30])).tolist() == [[0, 0, 2], [2, 1, 0]]
    assert relabelled(image, int32([])).tolist() == [[0, 0, 0], [0, 0, 0]]
    assert relabelled(image, int32([2])).dtype == torch.int32


def test_no_object_has_no_areas() -> None:
    image = torch.zeros(2, 3, dtype=torch.int32)
    assert areas(image, int32([])).tolist() == []
    assert intensities(image, int32([]), torch.ones(3, 2, 3)).tolist() == []
    assert coco_segmentations(image, int32([])) == []


@pytest.mark.parametrize("seed", range(3))
def test_outlines_are_pixels_beside_objects(seed: int) -> None:
    image = painted(25, 31, labels=8, seed=seed)
    around = torch.zeros(27, 33, dtype=torch.int32)
    around[1:-1, 1:-1] = image
    drawn = outlines(image, 25, 31)
    for y in range(25):
        for x in range(31):
            own = int(image[y, x])
            places = ((y, x + 1), (y + 2, x + 1), (y + 1, x), (y + 1, x + 2))
            others = [int(around[at]) for at in places]
            touches = any(0 < other < own for other in others)
            assert drawn[y, x] == (own if touches else 0 if own else max(others))


def test_outlines_stay_one_pixel_wide_in_enlargements() -> None:
    image = torch.zeros(4, 5, dtype=torch.int32)
    image[1:3, 1:3] = 3
    drawn = outlines(image, 40, 50)
    expected = np.zeros((40, 50), int)
    expected[9:31, 10:30] = expected[10:30, 9:31] = 3
    expected[10:30, 10:30] = 0
    assert (drawn == expected).all()


def test_outlines_are_drawn_in_reductions() -> None:
    image = torch.zeros(40, 60, dtype=torch.int32)
    image[8:32, 12:36] = 1
    drawn = outlines(image, 10, 15)
    assert not drawn[2:8, 3:9].any()
    assert drawn.sum() == drawn[1:9, 2:10].sum() == 4 * 6


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"as large as the masks, \[2, 3\], got \[3, 2\]"):
        intensities(torch.zeros(2, 3, dtype=torch.int32), int32([]), torch.ones(3, 3, 2))


def test_halved_labels_keep_place_and_size_on_average() -> None:
    shifts, sizes = [], []
    for start in range(8):
        pixels = np.zeros((2, 40), np.int32)
        pixels[:, start + 4 : start + 15] = 7
        (half,) = halved(pixels)
        places = np.flatnonzero(half == 7)
        shifts.append(places.mean() + 0.5 - (start + 4 + 5.5) / 2)
        sizes.append(len(places))
    assert np.mean(shifts) == pytest.approx(0)
    assert np.mean(sizes) == pytest.approx(5.5)
    assert np.abs(shifts).max() <= 0.5
    wide = np.zeros((2, 8), np.int32)
    wide[:, 2:6] = 7
    assert halved(wide).tolist() == [[0, 7, 7, 0]]


def rand_index_over_pairs(found: Tensor, true: Tensor) -> float:
    """The adjusted Rand index of Hubert and Arabie, by a loop over pairs of foreground pixels."""
    pixels = [
        (f, t)
        for f, t in zip(found.flatten().tolist(), true.flatten().tolist(), strict=True)
        if t > 0
    ]
    pairs = list(combinations(pixels, 2))
    both = sum(a[0] == b[0] and a[1] == b[1] for a, b in pairs)
    in_found = sum(a[0] == b[0] for a, b in pairs)
    in_true = sum(a[1] == b[1] for a, b in pairs)
    chance = in_found * in_true / len(pairs)
    return float((both - chance) / ((in_found + in_true) / 2 - chance))


@pytest.mark.parametrize("seed", range(6))
def test_foreground_ari_matches_pairs_of_pixels(seed: int) -> None:
    found, true = painted(14, 15, 5, seed), painted(14, 15, 5, seed + 100)
    true[:3, :4], true[9:, 9:] = 6, 7  # two objects at least
    expected = rand_index_over_pairs(found, true)
    assert foreground_ari(found, true) == pytest.approx(expected, abs=1e-12)
    # names of labels and what lies on the background do not matter
    renamed = torch.where(found > 0, 9 - found, 0)
    assert foreground_ari(renamed, true) == pytest.approx(expected, abs=1e-12)
    elsewhere = torch.where(true > 0, found, found + 20)
    assert foreground_ari(elsewhere, true) == pytest.approx(expected, abs=1e-12)


def test_foreground_ari_of_simple_images() -> None:
    true = torch.tensor([[0, 1, 1], [0, 2, 2]], dtype=torch.int32)
    assert foreground_ari(true, true) == 1.0
    assert foreground_ari(torch.zeros_like(true), true) == 0.0  # all is one object
    assert foreground_ari(torch.arange(6).reshape(2, 3), true) == 0.0
    one = torch.tensor([[0, 3, 3]])
    assert foreground_ari(torch.tensor([[0, 5, 5]]), one) == 1.0
    assert foreground_ari(torch.tensor([[0, 5, 6]]), one) == 0.0
    assert foreground_ari(one, torch.tensor([[0, 0, 1]])) == 1.0  # one pixel
    with pytest.raises(ValueError, match="must have an object"):
        foreground_ari(true, torch.zeros_like(true))
    with pytest.raises(ValueError, match=r"differ in size: \[1, 3\], \[2, 3\]"):
        foreground_ari(one, true)
