"""Watershed: discs, noise, passes and peaks, scores, and images without objects."""

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy import ndimage

from spairkit.config import Config, WatershedConfig
from spairkit.detections import Detections, Truth
from spairkit.detector import Detector
from spairkit.metrics import average_precision
from spairkit.models.watershed import Watershed, _largest, find_parts, split

Array = npt.NDArray[np.float64]


def disc(size: tuple[int, int], y: float, x: float, diameter: float) -> npt.NDArray[np.bool_]:
    rows, columns = np.ogrid[: size[0], : size[1]]
    inside: npt.NDArray[np.bool_] = (rows - y) ** 2 + (columns - x) ** 2 <= diameter**2 / 4
    return inside


def noise(seed: int, *size: int) -> Array:
    return np.random.default_rng(seed).normal(0, 1, size)


def rods(
    size: tuple[int, int],
    centres: list[tuple[float, float]],
    angle: float,
    length: float,
    width: float,
) -> Array:
    """Rods with round ends, of brightness .6 on .1; the angle is in degrees."""
    y, x = np.mgrid[: size[0], : size[1]] + 0.5
    image = np.full(size, 0.1)
    along = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    for cy, cx in centres:
        u = (x - cx) * along[0] + (y - cy) * along[1]
        v = (y - cy) * along[0] - (x - cx) * along[1]
        beyond = np.maximum(np.abs(u) - (length - width) / 2, 0)
        image[np.hypot(beyond, v) < width / 2] = 0.6
    return image


@pytest.mark.parametrize("diameter", [4.0, 7.0, 12.0, 40.0])
def test_separate_discs_of_any_size_are_found_exactly(diameter: float) -> None:
    size = (round(8 * diameter), round(10 * diameter))
    places = [(2.0, 2.0), (2.0, 5.5), (5.5, 2.0), (5.5, 7.0)]
    discs = [disc(size, y * diameter, x * diameter, diameter) for y, x in places]
    parts = find_parts(0.1 + 0.8 * np.sum(discs, axis=0), diameter)
    assert len(parts.boxes) == 4
    for number, mask in enumerate(discs, start=1):
        found = parts.label_image == number
        assert (found & mask).sum() / (found | mask).sum() > 0.85


def test_boxes_hold_masks_to_half_a_pixel() -> None:
    image = noise(0, 80, 90) * 0.02
    for y, x in ((20, 20), (20, 31), (50, 60), (3, 70), (78, 30)):
        image[disc((80, 90), y, x, 12)] += 0.5
    parts = find_parts(image, 12)
    assert len(parts.boxes) == 5
    assert set(np.unique(parts.label_image)) == set(range(6))
    for number, box in enumerate(parts.boxes, start=1):
        rows, columns = np.nonzero(parts.label_image == number)
        ends = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        assert np.abs(box - ends).max() <= 0.5
    firsts = [np.flatnonzero(parts.label_image == number)[0] for number in range(1, 6)]
    assert firsts == sorted(firsts)


@pytest.mark.parametrize("apart", [9.0, 10.0, 11.0])
@pytest.mark.parametrize("angle", [0.0, 0.4, 0.8, 1.57])
def test_touching_discs_are_parted_and_a_single_disc_is_not(apart: float, angle: float) -> None:
    dy, dx = apart * np.sin(angle) / 2, apart * np.cos(angle) / 2
    both = disc((50, 50), 25 - dy, 25 - dx, 12) | disc((50, 50), 25 + dy, 25 + dx, 12)
    parts = find_parts(0.8 * both, 12)
    assert len(parts.boxes) == 2
    areas = np.bincount(parts.label_image.ravel())[1:]
    assert areas.min() > 0.8 * areas.max()
    alone = find_parts(0.8 * disc((50, 50), 25 - dy, 25 - dx, 12), 12)
    assert len(alone.boxes) == 1


@pytest.mark.parametrize("offset", [0.0, 0.3])
@pytest.mark.parametrize("strength", [0.0, 1e-6, 0.001, 0.05, 0.3])
def test_empty_images_noise_and_slopes_hold_nothing(strength: float, offset: float) -> None:
    slope = np.add.outer(np.linspace(0, 0.15, 120), np.linspace(0, 0.1, 150))
    image = offset + strength * noise(1, 120, 150)
    assert len(find_parts(image, 12).boxes) == 0
    assert len(find_parts(image + slope, 12).boxes) == 0


def test_dim_objects_are_found_above_the_noise() -> None:
    """On uneven light that exceeds their contrast, where one threshold cannot tell them."""
    size = (120, 160)
    places = [(y, x) for y in range(20, 110, 25) for x in range(20, 150, 30)]
    image = np.add.outer(np.zeros(120), np.linspace(0, 0.6, 160)) + 0.03 * noise(2, *size)
    for y, x in places:
        image[disc(size, y, x, 12)] += 0.2
    parts = find_parts(image, 12)
    assert len(parts.boxes) == len(places)
    centres = (parts.boxes[:, :2] + parts.boxes[:, 2:] - 1) / 2
    for y, x in places:
        assert np.abs(centres - (x, y)).max(1).min() < 2


@pytest.mark.parametrize("blur", [1.0, 2.0])
def test_masks_end_at_about_half_the_height_of_bright_and_dim_discs(blur: float) -> None:
    """On a ground that is not black."""
    size = (60, 160)
    discs = [disc(size, 30, 20 + 40 * n, 14) for n in range(4)]
    heights = (0.6, 0.3, 0.15, 0.6)
    image = 0.2 + ndimage.gaussian_filter(
        sum(height * mask for height, mask in zip(heights, discs, strict=True)), blur
    )
    parts = find_parts(image, 12)
    assert len(parts.boxes) == 4
    for column, mask in zip((20, 60, 100, 140), discs, strict=True):
        found = parts.label_image == parts.label_image[30, column]
        assert abs(found.sum() / mask.sum() - 1) < 0.15
        assert (found & mask).sum() / (found | mask).sum() > 0.85


def test_largest_piece_of_each_label_is_kept() -> None:
    generator = np.random.default_rng(0)
    for shape in ((1, 1), (1, 9), (12, 15), (20, 7)):
        for _ in range(10):
            labels = generator.integers(0, 4, shape).astype(np.int32)
            found = _largest(labels)
            for name in range(1, 4):
                pieces, num = ndimage.label(labels == name)
                areas = np.bincount(pieces.ravel(), minlength=num + 1)[1:]
                kept = np.unique(pieces[found == name])
                assert len(kept) == min(num, 1)
                if num:
                    assert (found == name).sum() == areas.max() == areas[kept[0] - 1]
            assert set(np.unique(found)) <= {0, 1, 2, 3}
            assert np.all((found == 0) | (found == labels))


def test_rings_are_filled_and_the_ground_among_objects_is_not() -> None:
    size = (100, 100)
    ring = disc(size, 20, 20, 14) & ~disc(size, 20, 20, 6)
    assert find_parts(0.7 * ring, 14).label_image[20, 20] == 1
    fence = np.zeros(size)
    fence[20:80, 20:80] = 0.7
    fence[30:70, 30:70] = 0
    assert not find_parts(fence, 12).label_image[40:60, 40:60].any()


def test_specks_are_dropped() -> None:
    image = 0.8 * disc((60, 60), 30, 30, 12)
    image[10:12, 10:12] = 0.8
    image[50, 10:12] = 0.8
    assert len(find_parts(image, 12).boxes) == 1


@pytest.mark.parametrize("angle", [0, 20, 45, 70, 90])
def test_rods_stay_whole_where_their_width_hardly_changes(angle: float) -> None:
    image = rods((96, 96), [(24, 48), (48, 48), (72, 48)], angle, length=15, width=5)
    found = find_parts(ndimage.gaussian_filter(image, 0.6) + noise(1, 96, 96) * 0.04, 12)
    assert len(found.boxes) == 3


def test_split_equals_a_plain_flood() -> None:
    """From the highest pixel down; a pixel takes the part of its highest neighbour."""
    generator = np.random.default_rng(3)
    for trial in range(20):
        shape = tuple(generator.integers(1, 14, 2))
        height = generator.integers(0, 30, shape).astype(float) + 1
        mask = generator.random(shape) < 0.8
        relief, gap = float(generator.choice([0.0, 0.2])), float(generator.choice([0.0, 1.5]))
        thin = float(generator.choice([0.0, 15.0]))
        found = split(height, mask, relief=relief, gap=gap, thin=thin)
        np.testing.assert_array_equal(found > 0, mask)
        expected = flooded(height, mask, relief, gap, thin)
        # as partitions, and numbered by first pixels
        pairs = set(zip(found[mask].tolist(), expected[mask].tolist(), strict=True))
        assert len(pairs) == len(np.unique(found[mask])) == len(np.unique(expected[mask])), trial
        _, firsts = np.unique(found[mask], return_index=True)
        assert np.all(np.diff(firsts) > 0)


def flooded(
    height: Array, mask: npt.NDArray[np.bool_], relief: float, gap: float, thin: float
) -> Array:
    order = sorted(zip(*np.nonzero(mask), strict=True), key=lambda p: (-height[p], p))
    rank = {place: number for number, place in enumerate(order)}
    up: dict[tuple[int, int], tuple[int, int]] = {}
    edges = []
    for y, x in order:
        near = [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx]
        near = [place for place in near if place in rank]
        best = min([*near, (y, x)], key=lambda place: rank[place])
        up[y, x] = best
        edges += [((y, x), place, min(height[y, x], height[place])) for place in near]

    def top(place: tuple[int, int]) -> tuple[int, int]:
        while up[place] != place:
            place = up[place]
        return place

    tops = {place: top(place) for place in order}
    into = {place: place for place in set(tops.values())}

    def peak(place: tuple[int, int]) -> tuple[int, int]:
        place = tops[place]
        while into[place] != place:
            place = into[place]
        return place

    key = {place: number for number, place in enumerate(sorted(into))}
    passes: dict[tuple[int, int], float] = {}
    for one, other, level in edges:
        pair = tuple(sorted((key[tops[one]], key[tops[other]])))
        if pair[0] != pair[1]:
            passes[pair] = max(passes.get(pair, -1.0), level)  # type: ignore[index, arg-type]
    names = sorted(into)
    for (one_key, other_key), level in sorted(passes.items(), key=lambda p: (-p[1], p[0])):
        one, other = peak(names[one_key]), peak(names[other_key])
        if one == other:
            continue
        low, high = sorted((one, other), key=lambda place: -rank[place])
        distance = np.hypot(low[0] - high[0], low[1] - high[1])
        least = max(relief, 0.15) if height[high] < thin else relief
        if distance <= gap or height[low] - level < least * height[low]:
            into[low] = high
    labels = np.zeros(height.shape)
    for place in order:
        labels[place] = key[peak(place)] + 1
    return labels


def test_contrast_ranks_at_least_as_well_as_mean_intensity() -> None:
    """Dim true discs beside bright rubble on a bright ground."""
    size = (160, 200)
    image = 0.02 * noise(5, *size) + np.add.outer(np.zeros(160), np.linspace(0, 0.5, 200))
    boxes = []
    for y in range(20, 150, 26):
        for x in range(20, 190, 34):
            image[disc(size, y, x, 12)] += 0.35
            boxes.append([x - 6, y - 6, x + 7, y + 7])
            image[disc(size, y + 13, min(x + 16, 193), 6)] += 0.12
    parts = find_parts(image, 12)
    means = [image[parts.label_image == n + 1].mean() for n in range(len(parts.boxes))]
    truth = [Truth(torch.tensor(boxes, dtype=torch.float32), torch.zeros(len(boxes)).long())]

    def ap(scores: torch.Tensor) -> float:
        num = len(scores)
        found = Detections(
            torch.from_numpy(parts.boxes), scores, torch.zeros(num, 0), torch.zeros(num)
        )
        return average_precision([found], truth)

    assert len(parts.boxes) > len(boxes)
    assert (parts.scores > 0.5).all()
    assert (parts.scores <= 1).all()
    ours, theirs = ap(torch.from_numpy(parts.scores)), ap(torch.tensor(means).float())
    assert ours > theirs + 0.02


def test_model_detects_and_explains_each_image_by_its_lightest_channel() -> None:
    images = torch.zeros(3, 3, 40, 50)
    images[0, 2][torch.from_numpy(disc((40, 50), 20, 20, 12))] = 0.9
    images[1, :, 5:12, 5:12] = 0.6
    images[1, :, 25:32, 35:42] = 0.4
    model = Watershed(WatershedConfig(diameter=10))
    found = model.detect(images)
    assert [len(item) for item in found] == [1, 2, 0]
    for image, item, seen in zip(images, found, model.explain(images), strict=True):
        torch.testing.assert_close(seen.detections.boxes, item.boxes)
        torch.testing.assert_close(seen.image, image)
        assert seen.appearances.shape == (len(item), 21, 21, 4)
        assert item.labels is not None
        assert item.labels.tolist() == list(range(1, len(item) + 1))
        assert seen.reconstruction.shape == image.shape
        assert (seen.reconstruction - image).abs().mean() < 0.02
        assert item.area.sum() == (item.masks > 0).sum()
    assert model.state_dict()["diameter"] == 10


def test_threshold_selects_by_score() -> None:
    image = torch.zeros(3, 40, 50)
    image[:, 5:15, 5:15] = 0.9
    image[:, 25:35, 30:40] = 0.3
    model = WatershedConfig(diameter=10)
    detector = Detector(Watershed(model), Config(model=model))
    dim, bright = sorted(detector.detect(image).scores.tolist())
    assert 0.5 < dim < bright < 1
    for threshold, number in ((0.0, 2), ((dim + bright) / 2, 1), (0.99, 0)):
        seen = detector.explain(image, threshold=threshold)
        found = detector.detect(image, threshold=threshold)
        assert len(found) == len(seen.detections) == len(seen.appearances) == number
        assert len(found.masks.unique()) == number + 1
        assert len(seen.reconstruction.flatten(1).unique(dim=1).T) == number + 1


@pytest.mark.parametrize("size", [(1, 1), (1, 30), (3, 2), (5, 5)])
def test_tiny_images_are_taken(size: tuple[int, int]) -> None:
    assert find_parts(np.ones(size), 12).label_image.shape == size
    find_parts(np.random.default_rng(0).random(size), 2)


def test_mistakes_are_reported() -> None:
    with pytest.raises(ValueError, match=r"grey must be \[H, W\]"):
        find_parts(np.zeros((3, 4, 5)), 12)
    with pytest.raises(ValueError, match="diameter must be above 0"):
        find_parts(np.zeros((4, 5)), 0)
    with pytest.raises(ValueError, match="NaN"):
        Watershed(WatershedConfig()).detect(torch.full((1, 3, 4, 4), float("nan")))
