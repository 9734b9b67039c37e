"""Images drawn by code: boxes against pixels, and the folders that `data make` writes."""

import json
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from spairkit.cli.main import main
from spairkit.config import DataConfig
from spairkit.data.folder import ImageFolder
from spairkit.data.synthetic import (
    BESIDE,
    KINDS,
    Array,
    _boxes,
    _onto,
    _placed,
    drawn,
    encoded,
)


@cache
def image_of(kind: str) -> tuple[Array, Array]:
    """The first image of a kind, and its boxes."""
    return drawn(kind, 0, 0)


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main([*words])
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.parametrize(
    ("kind", "shape", "dtype", "sides"),
    [
        ("cells", (360, 480), np.uint16, (16, 34)),
        ("sprites", (240, 320, 4), np.uint8, (10, 30)),
        ("brightfield", (2000, 3000, 3), np.uint8, (26, 51)),
    ],
)
def test_boxes_have_the_sides_that_are_promised_and_lie_inside(
    kind: str, shape: tuple[int, ...], dtype: type, sides: tuple[int, int]
) -> None:
    image, boxes = image_of(kind)
    assert image.shape == shape
    assert image.dtype == dtype
    assert KINDS[kind].size == shape[:2]
    extent = boxes[:, 2:] - boxes[:, :2]
    assert extent.max() <= sides[1]
    whole = (boxes[:, :2] > 0).all(1) & (boxes[:, 2:] < shape[1::-1]).all(1)
    assert extent[whole].min() >= sides[0]
    assert boxes.min() >= 0
    assert (boxes[:, 2:] <= shape[1::-1]).all()
    assert len(boxes) == {"cells": 32, "brightfield": 1500}.get(kind, len(boxes))


def test_boxes_of_sprites_hold_all_that_is_unlike_the_ground() -> None:
    """The ground is grey-green, within .03 times five of its mean; every sprite is colourful."""
    image, boxes = drawn("sprites", 3, 1)
    pixels = image[..., :3] / 255
    unlike = np.abs(pixels - [0.32, 0.36, 0.30]).max(2) > 0.2
    assert (image[..., 3] == 255).all()
    inside = np.zeros_like(unlike)
    for x1, y1, x2, y2 in boxes:
        assert not inside[y1:y2, x1:x2].any()  # sprites do not overlap
        inside[y1:y2, x1:x2] = True
        part = unlike[y1:y2, x1:x2]
        assert part.mean() > 0.3
        assert all(edge.any() for edge in (part[0], part[-1], part[:, 0], part[:, -1]))
    assert not unlike[~inside].any()


def test_objects_stand_out_from_what_surrounds_them() -> None:
    for kind, sign in (("cells", 1), ("brightfield", -1)):
        image, boxes = image_of(kind)
        grey = image.astype(float) if image.ndim == 2 else image.mean(2)
        middle, rim = [], []
        for x1, y1, x2, y2 in boxes[:50]:
            x, y = (x1 + x2) // 2, (y1 + y2) // 2
            middle.append(grey[y - 2 : y + 3, x - 2 : x + 3].mean())
            rim.append(np.median(grey[max(y1 - 6, 0) : y2 + 6, max(x1 - 6, 0) : x2 + 6]))
        assert np.mean(sign * (np.array(middle) - rim) > 0) == 1


def test_light_behind_cells_is_uneven() -> None:
    image, _ = image_of("cells")
    low = np.percentile(image.reshape(6, 60, 8, 60), 20, axis=(1, 3))
    assert low.max() - low.min() > 1500  # cells have peaks of 700 to 2,200


def test_images_are_a_function_of_seed_and_index() -> None:
    first, boxes = drawn("sprites", 5, 2)
    again, same = drawn("sprites", 5, 2)
    assert np.array_equal(first, again)
    assert np.array_equal(boxes, same)
    for other in (drawn("sprites", 6, 2), drawn("sprites", 5, 3)):
        assert not np.array_equal(first, other[0])


@pytest.mark.parametrize("kind", ["cells", "sprites"])
def test_files_keep_every_pixel(kind: str) -> None:
    image, _ = image_of(kind)
    read = np.asarray(Image.open(BytesIO(encoded(kind, image))))
    assert read.dtype == image.dtype
    assert np.array_equal(read, image)


def test_objects_lie_apart_or_are_left_out() -> None:
    draws = np.random.default_rng(0)
    centres, sides = _placed(draws, (200, 300), draws.uniform(10, 30, 80), 1.2)
    assert len(centres) == len(sides) > 40
    for n in range(len(sides)):
        for m in range(n):
            apart = np.hypot(*(centres[n] - centres[m]))
            assert apart >= 1.2 * (sides[n] + sides[m]) / 2
    assert (centres >= sides[:, None] / 2 + 1).all()
    assert (centres <= [200, 300] - sides[:, None] / 2 - 1).all()
    crowded, kept = _placed(draws, (40, 40), np.full(9, 20.0), 1.0)
    assert 1 <= len(crowded) == len(kept) < 9


def test_parts_are_laid_onto_the_image_where_they_lie_in_it() -> None:
    parts = np.arange(1.0, 9).reshape(2, 2, 2)
    for way, join in ((np.add, sum), (np.maximum, max)):
        image, expected = np.zeros((3, 4)), np.zeros((3, 4))
        corner = np.array([[-1, 2], [0, 3]])
        _onto(image, parts, corner, way)
        for part, (top, left) in zip(parts, corner, strict=True):
            for i in range(2):
                for j in range(2):
                    if 0 <= top + i < 3 and 0 <= left + j < 4:
                        place = top + i, left + j
                        expected[place] = join((expected[place], part[i, j]))
        assert np.array_equal(image, expected)


def test_boxes_are_tight_around_masks() -> None:
    draws = np.random.default_rng(1)
    masks = draws.random((20, 7, 7)) < 0.2
    masks[:, 3, 3] = True
    corner = draws.integers(-3, 5, (20, 2))
    for mask, (top, left), box in zip(masks, corner, _boxes(masks, corner), strict=True):
        y, x = np.nonzero(mask)
        assert box.tolist() == [
            left + x.min(),
            top + y.min(),
            left + x.max() + 1,
            top + y.max() + 1,
        ]
    clipped = _boxes(masks, corner, (6, 5))
    assert clipped.min() >= 0
    assert (clipped <= [5, 6, 5, 6]).all()


@pytest.mark.parametrize("kind", ["cells", "sprites"])
def test_data_make_writes_a_folder_to_train_on(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "made"
    words = ("--data", kind, "--count", "2", "--set", "data.seed=3")
    assert run("data", "make", str(folder), *words) == 0
    assert "wrote 2 images, broken.png, notes.txt and annotations.json" in capsys.readouterr().err
    suffix = KINDS[kind].suffix
    names = {f"00000{suffix}", f"00001{suffix}", "annotations.json", *BESIDE}
    assert {path.name for path in folder.iterdir()} == names
    read = ImageFolder(DataConfig(name="folder", path=str(folder)), "test")
    assert [reason.partition(": ")[0] for reason in read.skipped] == [str(folder / "broken.png")]
    images = list(read.images())
    assert len(images) == 2
    for index, (_, number, image, truth) in enumerate(images):
        pixels, boxes = drawn(kind, 3, index)
        whole = torch.from_numpy(pixels.astype(np.float32) / np.iinfo(pixels.dtype).max)
        expected = whole[..., :3].permute(2, 0, 1) if whole.ndim == 3 else whole.expand(3, -1, -1)
        torch.testing.assert_close(image, expected)
        assert truth is not None
        assert number == index + 1
        assert torch.equal(truth.boxes, torch.from_numpy(boxes).float())
    content = json.loads((folder / "annotations.json").read_text())
    assert content["categories"] == [{"id": 1, "name": KINDS[kind].category}]


def test_slide_is_one_large_file(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    assert run("data", "make", str(folder), "--data", "brightfield") == 0
    assert {path.name for path in folder.iterdir()} == {"00000.jpg", "annotations.json", *BESIDE}
    image, boxes = image_of("brightfield")
    read = ImageFolder(DataConfig(name="folder", path=str(folder)), "test")
    [(_, _, pixels, truth)] = read.images()
    assert truth is not None
    assert torch.equal(truth.boxes, torch.from_numpy(boxes).float())
    lost = pixels - torch.from_numpy(image / 255).permute(2, 0, 1)
    assert lost.square().mean().sqrt() < 0.02  # by the compression


@pytest.mark.parametrize("kind", list(KINDS))
def test_other_settings_are_refused(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--data", kind, "--set", "data.max_objects=3")
    assert run("data", "make", str(tmp_path / "made"), *words) == 2
    assert f"--data {kind} has one setting, data.seed" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_training_asks_for_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("train", "--data", "sprites") == 2
    assert "spairkit data make FOLDER --data sprites" in capsys.readouterr().err
