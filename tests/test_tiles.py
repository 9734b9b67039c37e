"""Tiles: cores cover an image once; a large image gives what it gives whole."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from spairkit import detector as detector_module
from spairkit import tiles as tiles_module
from spairkit.config import DataConfig, PrepareConfig
from spairkit.counts import CountPosterior
from spairkit.data.datasets import open_dataset
from spairkit.detections import Detections
from spairkit.detector import Detector, load
from spairkit.tiles import Mosaic, Tile, elsewhere, tiles_of


@pytest.mark.parametrize("size", [(481, 480), (1000, 1700), (13, 3000), (960, 971)])
def test_cores_cover_every_pixel_once(size: tuple[int, int]) -> None:
    times = torch.zeros(size)
    for tile in tiles_of(*size, 12):
        x1, y1, x2, y2 = tile.core
        times[y1:y2, x1:x2] += 1
        assert tile.rows.start % 12 == tile.columns.start % 12 == 0
        for span, low, high, end in (
            (tile.columns, x1, x2, size[1]),
            (tile.rows, y1, y2, size[0]),
        ):
            assert high - low <= 492
            assert span.start == max(low - 72, 0)
            assert span.stop == min(high + 72, end)
        left, top, right, bottom = tile.inner
        assert tile.of(times)[top:bottom, left:right].shape == (y2 - y1, x2 - x1)
    assert (times == 1).all()


def found(boxes: list[list[float]], *, counts: CountPosterior | None = None) -> Detections:
    """Objects whose masks fill their boxes, in a tile of 40 x 40 px."""
    rows = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    label_image = torch.zeros(40, 40, dtype=torch.int32)
    for label, (x1, y1, x2, y2) in enumerate(rows.int().tolist(), start=1):
        label_image[max(y1, 0) : y2, max(x1, 0) : x2] = label
    scores = torch.linspace(0.6, 0.9, len(rows))
    labels = torch.arange(1, len(rows) + 1, dtype=torch.int32)
    what, depth = torch.zeros(len(rows), 2), torch.zeros(len(rows))
    return Detections(
        rows, scores, what, depth, label_image=label_image, labels=labels, counts=counts
    )


LEFT = Tile(slice(0, 40), slice(0, 40), (0, 0, 30, 40))
RIGHT = Tile(slice(0, 40), slice(20, 60), (30, 0, 60, 40))


def joined(left: list[list[float]], right: list[list[float]]) -> Detections:
    mosaic = Mosaic((40, 60))
    mosaic.add(LEFT, found(left))
    mosaic.add(RIGHT, found([[x1 - 20, y1, x2 - 20, y2] for x1, y1, x2, y2 in right]))
    return mosaic.found()


def test_object_belongs_to_the_tile_whose_core_holds_its_centre() -> None:
    near, far = [[20.0, 10, 28, 18]], [[38.0, 10, 46, 18]]
    for left, right in ((near, near), (near, []), (near + far[:0], far)):
        both = joined(left + far[:0], right)
        assert both.boxes.tolist() == [*near, *(far if right == far else [])]
    assert joined([[36.0, 4, 40, 8]], []).boxes.tolist() == [], "its own tile does not find it"


@pytest.mark.parametrize("shift", [-1.4, -0.5, 0.0, 0.5, 1.4])
def test_object_on_a_seam_is_found_once(shift: float) -> None:
    """Though its centre lies in both cores, or in neither."""
    seen = [[26.0 + shift, 10, 34 + shift, 18]]
    other = [[26.0 - shift, 10, 34 - shift, 18]]
    assert len(joined(seen, other)) == 1


def test_neighbours_on_a_seam_are_both_kept() -> None:
    pair = [[22.0, 10, 32, 20], [28.0, 10, 38, 20]]
    assert sorted(joined(pair, pair).boxes.tolist()) == pair


def test_masks_reach_over_seams() -> None:
    both = joined([[22.0, 10, 36, 20]], [[22.0, 10, 36, 20], [36.0, 10, 44, 20]])
    assert both.boxes.tolist() == [[22, 10, 36, 20], [36, 10, 44, 20]]
    assert both.area.tolist() == [140, 80]
    assert both.masks[15, 22:44].tolist() == [1] * 14 + [2] * 8
    assert both.label_image is not None
    assert both.label_image.shape == (40, 60)


def test_counts_of_tiles_add_up() -> None:
    mosaic = Mosaic((40, 60))
    parts = [CountPosterior.independent(torch.tensor(p)) for p in ([0.9, 0.5], [0.8])]
    mosaic.add(LEFT, found([], counts=parts[0]))
    mosaic.add(RIGHT, found([], counts=parts[1]))
    counts = mosaic.found().counts
    assert counts is not None
    expected = CountPosterior.independent(torch.tensor([0.9, 0.5, 0.8]))
    torch.testing.assert_close(counts.probabilities, expected.probabilities)


def test_objects_elsewhere_are_counted_once() -> None:
    near, far = torch.tensor([[20.0, 10, 28, 18]]), torch.tensor([[18.0, 10, 26, 18]])
    inside = torch.cat([near - torch.tensor([20.0, 0, 20, 0]), far])
    assert elsewhere([LEFT, RIGHT], [near, inside]) == [1, 0]


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles with cores of 60 px, for images of more than 9,000 px."""
    monkeypatch.setattr(tiles_module, "_CORE", 60)
    monkeypatch.setattr(tiles_module, "_HALO", 48)
    monkeypatch.setattr(detector_module, "WHOLE_PIXELS", 9000)


def scene(height: int, width: int, objects: int) -> Tensor:
    config = DataConfig(
        image_height=height, image_width=width, min_objects=objects, max_objects=objects,
        max_overlap=0.0,
    )  # fmt: skip
    return open_dataset(config, "test").batch(torch.arange(1)).images[0]


def assert_same(cut: Detections, whole: Detections) -> None:
    """The same objects, in any order."""
    assert len(cut) == len(whole) > 0
    assert cut.label_image is not None
    assert whole.label_image is not None
    apart = (cut.boxes[:, None] - whole.boxes).abs().amax(2)
    assert sorted(apart.argmin(1).tolist()) == list(range(len(whole)))
    again = whole[apart.argmin(1)]
    assert (cut.boxes - again.boxes).abs().max() < 0.5
    torch.testing.assert_close(cut.scores, again.scores, atol=1e-3, rtol=0)
    differing = cut.masks != again.masks
    assert differing.float().mean() < 1e-3


@pytest.mark.parametrize("mode", ["off", "full"])
def test_large_image_gives_what_it_gives_whole(
    mode: Any, small_tiles: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector, image = load(device="cpu", search=mode), scene(100, 130, 9)
    phases: list[str] = []
    detector.on_progress = lambda phase, share: phases.append(phase)
    cut, explained = detector.detect(image), detector.explain(image)
    assert {phase.split(":")[0] for phase in phases} == {f"tile {n} of 6" for n in range(1, 7)}
    monkeypatch.setattr(detector_module, "WHOLE_PIXELS", 1 << 20)
    whole, expected = detector.detect(image), detector.explain(image)
    assert_same(cut, whole)
    assert_same(explained.detections, whole)
    assert torch.equal(explained.image, image)
    assert (explained.reconstruction - expected.reconstruction).abs().mean() < 1e-3
    assert explained.appearances.shape == expected.appearances.shape
    if mode == "full":
        assert cut.counts is not None
        assert whole.counts is not None
        assert cut.counts.mean == pytest.approx(whole.counts.mean, abs=0.1)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("mode", ["RGB", "I;16"])
def test_files_in_tiles_give_what_their_pixels_give(tmp_path: Path, mode: str) -> None:
    """A large file is never a whole image in float32; boxes and masks are in its pixels."""
    image = scene(100, 110, 8)
    grey = (image[0] * 255).round().byte().numpy()
    if mode == "I;16":
        picture = Image.fromarray(grey.astype(np.uint16) * 257)
    else:
        picture = Image.fromarray(grey).convert(mode)
    picture.save(tmp_path / "a.png")
    detector = load(device="cpu", search="off")
    for config in (
        PrepareConfig(),
        PrepareConfig(scale=1.5),
        PrepareConfig(contrast="direction", background="image", levels="image"),
    ):
        prepared = Detector(
            detector.network, replace(detector.config, data=FOLDER, prepare=config), search="off"
        )
        of_file = prepared.detect(tmp_path / "a.png")
        assert_same(of_file, prepared.detect(image))
        assert of_file.label_image is not None
        assert of_file.label_image.shape == (100, 110)
        (of_many,) = prepared.detect_many([tmp_path / "a.png"])
        assert torch.equal(of_many.boxes, of_file.boxes)
        explained = prepared.explain(tmp_path / "a.png")
        assert explained.image.shape == explained.reconstruction.shape == (3, 100, 110)
        assert torch.equal(explained.detections.boxes, of_file.boxes)


FOLDER = DataConfig(name="folder", path="anywhere")
