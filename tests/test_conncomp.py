"""ConnComp against a flood fill and the authors' rules for boxes and AP; fits."""

import os

import pytest
import torch
from torch import Tensor

from spairkit.config import Config, ConnCompConfig, DataConfig
from spairkit.data.datasets import open_dataset
from spairkit.detector import Detector
from spairkit.evaluation import evaluate
from spairkit.metrics import ap_spair
from spairkit.models.conncomp import ConnComp

PUBLISHED = {
    1: (0.01, 0.989),
    3: (0.01, 0.696),
    5: (0.02, 0.507),
    7: (0.6, 0.426),
    9: (0.52, 0.367),
}
"""Threshold and AP for each number of digits (Fig. 2; docs/model.md 9 and 12.1)."""

PACKAGED = {1: 1.0, 3: 0.5389, 5: 0.3195, 7: 0.2617, 9: 0.1617}
"""AP by the paper's rule on the first 96 test scenes of the packaged digits, by `authors_ap`."""

Box = tuple[int, int, int, int]


def flood(foreground: list[list[bool]]) -> list[list[tuple[int, int]]]:
    """Pixels (row, column) of each 4-connected component, in raster order of their first pixels."""
    height, width = len(foreground), len(foreground[0])
    seen: set[tuple[int, int]] = set()
    components = []
    for start in ((r, c) for r in range(height) for c in range(width)):
        if start in seen or not foreground[start[0]][start[1]]:
            continue
        seen.add(start)
        pixels, waiting = [], [start]
        while waiting:
            r, c = waiting.pop()
            pixels.append((r, c))
            for near in ((r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1)):
                inside = 0 <= near[0] < height and 0 <= near[1] < width
                if inside and near not in seen and foreground[near[0]][near[1]]:
                    seen.add(near)
                    waiting.append(near)
        components.append(pixels)
    return components


def span(pixels: list[tuple[int, int]]) -> Box:
    """The authors' x1, y1, x2, y2, which exclude the last row and column of pixels."""
    rows, columns = zip(*pixels, strict=True)
    return min(columns), min(rows), max(columns), max(rows)


def iou(a: Box, b: Box) -> float:
    overlap = 1
    for low, high in ((0, 2), (1, 3)):
        overlap *= max(0, min(a[high], b[high]) - max(a[low], b[low]))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return overlap / (sum(areas) - overlap) if overlap else 0.0


def authors_ap(found: list[list[Box]], true: list[list[Box]]) -> float:
    """The authors' AP (docs/model.md 11) on boxes as `span` gives them, in batches of 32."""
    total = 0.0
    for first in range(0, len(found), 32):
        batch = list(zip(found[first : first + 32], true[first : first + 32], strict=True))
        num_true = sum(len(boxes) for _, boxes in batch)
        for tenths in range(1, 10):
            hits = 0
            points: list[tuple[int, float]] = []  # hits and precision after each detection
            for boxes, truths in batch:
                free = list(truths)
                for box in boxes:
                    if truths and not free:
                        break
                    best = max(free, key=lambda other: iou(box, other), default=None)
                    if best is not None and iou(box, best) > tenths / 10:
                        free.remove(best)
                        hits += 1
                    points.append((hits, hits / (len(points) + 1)))
            precisions = [
                max((p for h, p in points if 10 * h >= recall * num_true), default=0.0)
                for recall in range(11)
            ]
            total += len(batch) * sum(precisions) / 11 / 9
    return total / len(found)


def random_images(seed: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(3, 3, height, width, generator=generator)
    # large patches, single pixels, diagonals, and one image that is all background
    images[0] = (images[0, :1] > 0.6).float()
    images[1] *= 0
    return images


def detector(threshold: float) -> Detector:
    config = ConnCompConfig(threshold=threshold)
    return Detector(ConnComp(config), Config(model=config))


@pytest.mark.parametrize("min_area", [1, 2, 5, 1000])
def test_small_components_are_left_out(min_area: int) -> None:
    images = random_images(3, 16, 16)
    model = ConnComp(ConnCompConfig(threshold=1.7, min_area=min_area))
    for image, item, seen in zip(images, model.detect(images), model.explain(images), strict=True):
        components = flood((image.double().sum(0) >= 1.7).tolist())
        spans = [span(pixels) for pixels in components if len(pixels) >= min_area]
        assert item.boxes.tolist() == [[x1, y1, x2 + 1, y2 + 1] for x1, y1, x2, y2 in spans]
        torch.testing.assert_close(seen.detections.boxes, item.boxes)
        assert len(seen.appearances) == len(spans)


@pytest.mark.parametrize("seed", range(6))
def test_detections_equal_a_flood_fill(seed: int) -> None:
    height, width = [(1, 1), (1, 9), (7, 5), (16, 16), (13, 30), (40, 3)][seed]
    images = random_images(seed, height, width)
    model = ConnComp(ConnCompConfig(threshold=1.7))
    found = model.detect(images)
    assert len(found) == 3
    for image, item in zip(images, found, strict=True):
        foreground = (image.double().sum(0) >= 1.7).tolist()
        spans = [span(pixels) for pixels in flood(foreground)]
        boxes = [[x1, y1, x2 + 1, y2 + 1] for x1, y1, x2, y2 in spans]
        assert item.boxes.tolist() == boxes
        assert item.scores.tolist() == [1.0] * len(boxes)
        assert item.what.shape == (len(boxes), 0)
        assert item.boxes.dtype == torch.float32


def test_pixels_touching_at_a_corner_are_separate_objects() -> None:
    images = torch.zeros(2, 3, 4, 4)
    images[0, :, [0, 1], [0, 1]] = 1
    # components do not continue in the next image either
    images[:, :, 3, 3] = 1
    found = ConnComp(ConnCompConfig(threshold=0.5)).detect(images)
    assert found[0].boxes.tolist() == [[0, 0, 1, 1], [1, 1, 2, 2], [3, 3, 4, 4]]
    assert found[1].boxes.tolist() == [[3, 3, 4, 4]]


def test_distance_is_summed_over_the_channels() -> None:
    config = ConnCompConfig(threshold=0.625, background="given", colour=(0.5, 0.25, 1.0))
    images = torch.tensor(config.colour)[None, :, None, None].repeat(1, 1, 1, 5)
    images[0, :, 0, 1] += torch.tensor([0.25, -0.25, -0.125])  # .625 in all
    images[0, :, 0, 3] += torch.tensor([0.25, 0.25, -0.0625])
    found = ConnComp(config).detect(images)[0]
    assert found.boxes.tolist() == [[1, 0, 2, 1]]


@pytest.mark.parametrize("objects", PUBLISHED)
def test_ap_on_packaged_digits_equals_the_authors_rule(objects: int) -> None:
    """End to end from pixels to AP, against the authors' rules for boxes, truth and AP."""
    threshold, _ = PUBLISHED[objects]
    data = DataConfig(min_objects=objects, max_objects=objects)
    batch = open_dataset(data, "test").batch(torch.arange(96))
    foreground = (batch.images.double().sum(1) >= threshold).tolist()
    found = [[span(pixels) for pixels in flood(rows)] for rows in foreground]
    true: list[list[Box]] = [
        [(int(x1), int(y1), int(x2) - 1, int(y2) - 1) for x1, y1, x2, y2 in item.boxes.tolist()]
        for item in batch.truth()
    ]
    expected = authors_ap(found, true)
    figures = evaluate(detector(threshold), [batch]).overall
    assert figures.ap_spair == pytest.approx(expected, abs=1e-12)
    assert figures.ap_spair == pytest.approx(PACKAGED[objects], abs=5e-4)
    counts = [len(boxes) == objects for boxes in found]
    assert figures.count_accuracy == pytest.approx(sum(counts) / 96)


def test_authors_pixel_correction_applies_to_whole_pixel_boxes() -> None:
    batch = open_dataset(DataConfig(max_objects=1), "test").batch(torch.arange(32))
    found = ConnComp(ConnCompConfig(threshold=0.01)).detect(batch.images)
    assert ap_spair(found, batch.truth(), whole_pixels=True) == 1
    assert ap_spair(found, batch.truth()) < 0.9
    assert detector(0.01).whole_pixels


@pytest.mark.skipif("SPAIRKIT_MNIST" not in os.environ, reason="SPAIRKIT_MNIST names no file")
@pytest.mark.parametrize("objects", PUBLISHED)
def test_ap_on_mnist_matches_the_paper(objects: int) -> None:
    """Fig. 2's row of ConnComp, on digits of the paper's size (docs/model.md 10)."""
    threshold, published = PUBLISHED[objects]
    path = os.environ["SPAIRKIT_MNIST"]
    data = DataConfig(name="mnist", path=path, min_objects=objects, max_objects=objects)
    scenes = open_dataset(data, "train")
    batches = (scenes.batch(torch.arange(i, i + 32)) for i in range(0, 1024, 32))
    figures = evaluate(detector(threshold), batches).overall
    assert figures.ap_spair == pytest.approx(published, abs=0.03)


def test_reconstruction_has_one_colour_per_object() -> None:
    config = ConnCompConfig(threshold=0.3, background="given", colour=(0.0, 0.0, 0.5))
    images = torch.tensor(config.colour)[None, :, None, None].repeat(2, 1, 3, 4)
    images[0, :, 0, 0] = torch.tensor([1.0, 0.0, 0.5])
    images[0, :, 1, 0] = torch.tensor([0.5, 0.25, 0.5])
    images[0, :, 2, 3] = torch.tensor([0.0, 0.25, 0.5])  # too near the background
    image = torch.stack([item.reconstruction for item in ConnComp(config).explain(images)])
    expected = images.clone()
    expected[0, :, :2, 0] = torch.tensor([0.75, 0.125, 0.5])[:, None]
    expected[0, :, 2, 3] = torch.tensor(config.colour)
    torch.testing.assert_close(image, expected)


def test_appearances_exclude_neighbouring_objects() -> None:
    images = torch.zeros(2, 3, 30, 30)
    images[0, :, :21, 0] = 1  # an L, and a square inside its box
    images[0, :, 20, :21] = 1
    images[0, 0, 5:10, 5:10] = 1
    shown = [item.appearances for item in ConnComp(ConnCompConfig(threshold=0.5)).explain(images)]
    assert [item.shape for item in shown] == [(2, 21, 21, 4), (0, 21, 21, 4)]
    alpha = torch.zeros(21, 21)
    alpha[:, 0] = alpha[20] = 1
    torch.testing.assert_close(shown[0][0, ..., 3], alpha)
    torch.testing.assert_close(shown[0][1], torch.tensor([1.0, 0, 0, 1]).expand(21, 21, 4))


def test_background_is_fitted_to_images() -> None:
    images = torch.zeros(2, 3, 1, 5)
    images[:, 0, 0] = torch.tensor([0.2, 0.2, 0.4, 0.6, 1.0])
    for background, red in (("black", 0.0), ("mode", 0.2), ("median", 0.4), ("given", 0.75)):
        model = ConnComp(ConnCompConfig(background=background, colour=(0.75, 0, 0)))  # type: ignore[arg-type]
        model.fit_background(images)
        assert model.background_colour.tolist() == pytest.approx([red, 0, 0])


def test_other_shapes_and_values_are_refused() -> None:
    network = ConnComp(ConnCompConfig())
    for images in (torch.zeros(3, 4, 4), torch.zeros(1, 1, 4, 4), torch.zeros(1, 3, 0, 4)):
        with pytest.raises(ValueError, match=r"images must be \[B, 3, H, W\]"):
            network.detect(images)
    with pytest.raises(ValueError, match="must be floating-point"):
        network.detect(torch.zeros(1, 3, 4, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match="must be finite"):
        network.detect(torch.full((1, 3, 4, 4), float("nan")))
