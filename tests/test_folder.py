"""Folders of images: crops against slices, splits, COCO ground truth, damaged files."""

import json
import os
import random
import re
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from spairkit.config import Config, DataConfig, PrepareConfig
from spairkit.data import folder as folder_module
from spairkit.data.annotations import read_annotations
from spairkit.data.datasets import evaluation_batches, prepared
from spairkit.data.folder import ImageFolder
from spairkit.data.glyphs import Split
from spairkit.data.scenes import Batch
from spairkit.errors import InputError
from spairkit.images import read_image, read_pixels, write_picture, write_png
from spairkit.storage.runs import Run


def fill(folder: Path, sizes: dict[str, tuple[int, int]]) -> None:
    """Saves images of noise, in which a crop occurs at one place only."""
    rng = np.random.default_rng(0)
    for name, size in sizes.items():
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*size, 3)).astype(np.uint8)).save(folder / name)


def opened(folder: Path, split: Split = "train", **options: Any) -> ImageFolder:
    settings = {"image_height": 8, "image_width": 9} | options
    return ImageFolder(DataConfig(name="folder", path=str(folder), **settings), split)


def coco(images: list[Any], annotations: list[Any], **more: Any) -> dict[str, Any]:
    return {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 2}, {"id": 5}],
        **more,
    }


def one(bbox: Any, number: int = 1, **more: Any) -> dict[str, Any]:
    return {"id": number, "image_id": 1, "category_id": 5, "bbox": bbox, **more}


IMAGE = {"id": 1, "file_name": "a.png"}


def annotate(folder: Path, content: Any) -> Path:
    path = folder / "annotations.json"
    path.write_text(json.dumps(content))
    return path


def place(crop: torch.Tensor, image: torch.Tensor) -> list[tuple[int, int]]:
    """Every (top, left) at which the crop occurs in the image."""
    windows = image.unfold(1, crop.shape[1], 1).unfold(2, crop.shape[2], 1)
    same = (windows == crop[:, None, None]).all(0).flatten(2).all(2)
    return [(top, left) for top, left in same.nonzero().tolist()]


def assert_equal(first: Batch, second: Batch) -> None:
    assert torch.equal(first.images, second.images)
    assert torch.equal(first.counts, second.counts)
    assert first.boxes.equal(second.boxes)
    assert first.labels.equal(second.labels)


def test_crops_cover_every_position(tmp_path: Path) -> None:
    fill(tmp_path, {"a.png": (10, 12), "b.png": (8, 9)})
    batch = opened(tmp_path).batch(torch.arange(300))
    assert batch.images.shape == (300, 3, 8, 9)
    assert batch.boxes.shape == (300, 0, 4)
    images = [read_image(tmp_path / name) for name in ("a.png", "b.png")]
    seen = [[found for crop in batch.images for found in place(crop, image)] for image in images]
    assert len(seen[0]) + len(seen[1]) == 300
    assert len(seen[1]) == pytest.approx(150, abs=40)
    assert set(seen[0]) == {(top, left) for top in range(3) for left in range(4)}


def test_every_second_crop_of_a_sparse_image_has_a_bright_place(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 30, (200, 300, 1)).repeat(3, 2)
    bright = [(20, 40), (120, 280), (188, 8)]  # blocks of 4 x 4, two of them at the ends
    for top, left in bright:
        image[top : top + 4, left : left + 4] = 255
    Image.fromarray(image.astype(np.uint8)).save(tmp_path / "a.png")
    pixels = read_image(tmp_path / "a.png")
    crops = opened(tmp_path, crops="objects").batch(torch.arange(400)).images
    uniform = opened(tmp_path).batch(torch.arange(400)).images
    there = [(crop > 0.9).any().item() for crop in crops]
    assert 150 < sum(there) < 260
    same = [torch.equal(one, other) for one, other in zip(crops, uniform, strict=True)]
    assert 150 < sum(same) < 250, "the others are those of uniform crops"
    held = [0, 0, 0]
    rows = set()
    for crop in (crop for crop, is_same in zip(crops, same, strict=True) if not is_same):
        ((top, left),) = place(crop, pixels)
        for i, (y, x) in enumerate(bright):
            inside = top <= y and y + 4 <= top + 8 and left <= x and x + 4 <= left + 9
            held[i] += inside
            rows |= {y - top} if inside and i == 0 else set()
    assert sum(held) == len(same) - sum(same)
    assert min(held) > 40
    assert rows == {0, 1, 2, 3, 4}
    dark = np.zeros((40, 50, 3), np.uint8)
    Image.fromarray(dark).save(tmp_path / "a.png")
    assert not opened(tmp_path, crops="objects").batch(torch.arange(20)).images.any()


def test_crops_are_slices_of_images(tmp_path: Path) -> None:
    fill(tmp_path, {"a.png": (10, 12), "b.png": (8, 9)})
    images = [read_image(tmp_path / name) for name in ("a.png", "b.png")]
    folder = opened(tmp_path)
    crops = folder.batch(torch.arange(20)).images
    assert all(any(place(crop, image) for image in images) for crop in crops)
    assert all(
        torch.equal(one[2], image) for one, image in zip(folder.images(), images, strict=True)
    )


def test_small_images_are_padded_with_their_edge_pixels(tmp_path: Path) -> None:
    fill(tmp_path, {"a.png": (5, 20), "b.png": (3, 4)})
    images = [read_image(tmp_path / name) for name in ("a.png", "b.png")]
    for crop in opened(tmp_path).batch(torch.arange(20)).images:
        if found := place(crop[:, :3, :4], images[1]):
            assert found == [(0, 0)]
            assert torch.equal(crop[:, 3:], crop[:, 2:3].expand(-1, 5, -1))
            assert torch.equal(crop[:, :, 4:], crop[:, :, 3:4].expand(-1, -1, 5))
        else:
            assert len(place(crop[:, :5], images[0])) == 1
            assert torch.equal(crop[:, 5:], crop[:, 4:5].expand(-1, 3, -1))


def test_crops_are_a_pure_function_of_the_index(tmp_path: Path) -> None:
    fill(tmp_path, {f"{n}.png": (12, 12) for n in range(4)})
    whole = opened(tmp_path).batch(torch.arange(30))
    back = opened(tmp_path).batch(torch.arange(29, -1, -1))
    assert_equal(Batch(whole.images.flip(0), whole.boxes, whole.labels, whole.counts), back)
    part = opened(tmp_path).batch(torch.arange(10, 20))
    assert torch.equal(part.images, whole.images[10:20])
    for other in (opened(tmp_path, "validation"), opened(tmp_path, seed=1)):
        assert not torch.equal(other.batch(torch.arange(30)).images, whole.images)


def test_cache_is_bounded_and_does_not_change_crops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With memory for two of six images, each window of indices uses two at most."""
    fill(tmp_path, {f"{n}.png": (12, 12) for n in range(6)})
    images = [read_image(tmp_path / f"{n}.png") for n in range(6)]
    monkeypatch.setattr(folder_module, "_CACHE_BYTES", 1000)
    monkeypatch.setattr(folder_module, "_WINDOW", 16)
    crops = opened(tmp_path)
    reads = 0

    def counted(path: Path) -> torch.Tensor:
        nonlocal reads
        reads += 1
        return read_pixels(path)

    monkeypatch.setattr(folder_module, "read_pixels", counted)
    used = []
    for start in range(0, 320, 16):
        made = crops.batch(torch.arange(start, start + 16)).images
        used.append({n for crop in made for n in range(6) if place(crop, images[n])})
    assert all(1 <= len(files) <= 2 for files in used)
    assert set.union(*used) == set(range(6))
    assert reads <= 40
    again = opened(tmp_path).batch(torch.arange(304, 320)).images
    assert torch.equal(again, made)


def test_only_folders_of_many_files_are_split(tmp_path: Path) -> None:
    def names(split: Split) -> list[str]:
        return [name for name, _, _, _ in opened(tmp_path, split).images()]

    fill(tmp_path, {f"{n}.png": (4, 4) for n in range(9)})
    assert names("train") == names("validation") == names("test")
    fill(tmp_path, {f"{n}.png": (4, 4) for n in range(9, 10)})
    assert len(names("validation")) >= 1
    fill(tmp_path, {f"sub/{n}.png": (4, 4) for n in range(90)})
    train, validation, test = names("train"), names("validation"), names("test")
    assert sorted(train + validation) == test == sorted(test)
    assert 3 <= len(validation) <= 20
    # adding a file moves no other to another split
    fill(tmp_path, {"late.png": (4, 4)})
    assert set(train) <= set(names("train"))
    assert set(validation) <= set(names("validation"))


def test_length_is_that_of_the_split(tmp_path: Path) -> None:
    fill(tmp_path, {f"{n}.png": (4, 4) for n in range(20)})
    validation = opened(tmp_path, "validation", validation_images=70)
    assert 1 <= len(validation) == len(list(validation.images())) < 20
    assert len(opened(tmp_path, "test")) == 20
    with pytest.raises(TypeError, match="no length"):
        len(opened(tmp_path, "train"))


def test_truth_of_an_image_is_as_annotated(tmp_path: Path) -> None:
    fill(tmp_path, {"a.png": (10, 20), "b.png": (6, 6), "c.png": (6, 6)})
    objects = [one([-2, 3, 5, 4.5]), one([15, 8, 100, 100], 2, category_id=2)]
    objects.append(one([0, 0, 1, 1], 3, iscrowd=1))
    images = [{"id": 1, "file_name": "a.png", "height": 10, "width": 20}]
    images.append({"id": 7, "file_name": "./b.png"})
    annotate(tmp_path, coco(images, objects))
    folder = opened(tmp_path, "test")
    assert folder.has_truth
    (a, b, c) = folder.images()
    assert [(name, number) for name, number, _, _ in (a, b, c)] == [
        ("a.png", 1),
        ("b.png", 7),
        ("c.png", 8),
    ]
    assert torch.equal(a[2], read_image(tmp_path / "a.png"))
    assert a[3] is not None
    assert a[3].boxes.tolist() == [[-2, 3, 3, 7.5], [15, 8, 115, 108]]
    assert a[3].crowds.tolist() == [[0, 0, 1, 1]]
    assert a[3].labels.tolist() == [5, 2]
    assert b[3] is not None
    assert len(b[3]) == 0
    assert c[3] is None


def test_truth_follows_the_crop(tmp_path: Path) -> None:
    fill(tmp_path, {"a.png": (16, 16)})
    boxes = [[2, 3, 4, 5], [10, 0, 3, 16], [0, 14, 16, 2]]
    annotate(tmp_path, coco([IMAGE], [one(box, n) for n, box in enumerate(boxes)]))
    image = read_image(tmp_path / "a.png")
    batch = opened(tmp_path).batch(torch.arange(50))
    for crop, truth in zip(batch.images, batch.truth(), strict=True):
        ((top, left),) = place(crop, image)
        expected = []
        for x, y, width, height in boxes:
            x1, y1 = max(x - left, 0), max(y - top, 0)
            x2, y2 = min(x + width - left, 9), min(y + height - top, 8)
            if x1 < x2 and y1 < y2:
                expected.append([x1, y1, x2, y2])
        assert truth.boxes.tolist() == expected
        assert truth.labels.tolist() == [5] * len(expected)
    counts = batch.counts.tolist()
    assert len(set(counts)) > 1
    for labels, count in zip(batch.labels, counts, strict=True):
        assert (labels[count:] == -1).all()


def test_padding_contains_no_truth(tmp_path: Path) -> None:
    fill(tmp_path, {"a.png": (5, 5)})
    annotate(tmp_path, coco([IMAGE], [one([3, 3, 2, 2])]))
    batch = opened(tmp_path).batch(torch.arange(3))
    assert batch.boxes.tolist() == [[[3, 3, 5, 5]]] * 3


def test_image_ids_without_annotations_follow_file_order(tmp_path: Path) -> None:
    fill(tmp_path, {"b.png": (4, 4), "a.png": (4, 4)})
    folder = opened(tmp_path, "test")
    assert not folder.has_truth
    assert [(name, number, truth) for name, number, _, truth in folder.images()] == [
        ("a.png", 1, None),
        ("b.png", 2, None),
    ]


NO_NAME = "no file_name is an image of this folder"
WRONG: dict[str, tuple[Any, str]] = {
    "a list": ([], "it must be an object"),
    "no images": ({"annotations": []}, "images must be a list"),
    "no list of boxes": ({"images": [IMAGE], "annotations": 3}, "annotations must be a list"),
    "image not an object": (coco([3], []), r"images\[0\] must be an object"),
    "no id": (coco([{"file_name": "a.png"}], []), "id must be a whole number"),
    "bool id": (coco([IMAGE | {"id": True}], []), "got True"),
    "float id": (coco([IMAGE | {"id": 1.5}], []), "got 1.5"),
    "negative id": (coco([IMAGE | {"id": -1}], []), "got -1"),
    "long id": (coco([IMAGE | {"id": 10**300}], []), "got 1000"),
    "duplicate image": (coco([IMAGE, IMAGE], []), r"images\[1\]: the id 1 is used twice"),
    "duplicate name": (coco([IMAGE, IMAGE | {"id": 2}], []), "'a.png' is used twice"),
    "other size": (coco([IMAGE | {"height": 4, "width": 5}], []), "has 10x10 pixels"),
    "duplicate object": (coco([IMAGE], [one([0, 0, 1, 1])] * 2), "the id 1 is used twice"),
    "bad category": (coco([IMAGE], [one([0, 0, 1, 1], category_id="a")]), "category_id must be"),
    "bad crowd": (coco([IMAGE], [one([0, 0, 1, 1], iscrowd=2)]), "iscrowd must be"),
    "no box": (coco([IMAGE], [one(None)]), "bbox must be x, y"),
    "three numbers": (coco([IMAGE], [one([0, 0, 1])]), "bbox must be x, y"),
    "strings": (coco([IMAGE], [one([0, 0, "1", 1])]), "bbox must be x, y"),
    "bools": (coco([IMAGE], [one([0, 0, True, 1])]), "bbox must be x, y"),
    "nan": (coco([IMAGE], [one([0, 0, float("nan"), 1])]), "bbox must be x, y"),
    "infinite": (coco([IMAGE], [one([0, 0, float("inf"), 1])]), "bbox must be x, y"),
    "huge": (coco([IMAGE], [one([0, 0, 1e300, 1])]), "bbox must be x, y"),
    "huge int": (coco([IMAGE], [one([0, 0, 10**400, 1])]), "bbox must be x, y"),
    "negative": (coco([IMAGE], [one([5, 5, 1, -1])]), "no negative side"),
    "outside": (coco([IMAGE], [one([10, 0, 3, 3])]), "lies outside its image"),
    "left of the image": (coco([IMAGE], [one([-3, 0, 3, 3])]), "lies outside its image"),
    "parent folder": (coco([IMAGE | {"file_name": "../a.png"}], []), NO_NAME),
    "nested parent folder": (coco([IMAGE | {"file_name": "sub/../../a.png"}], []), NO_NAME),
    "absolute": (coco([IMAGE | {"file_name": "/etc/passwd"}], []), NO_NAME),
    "absent": (coco([IMAGE | {"file_name": "z.png"}], []), NO_NAME),
    "newline": (coco([IMAGE | {"file_name": "a\nb.png"}], []), r"a\\nb.png"),
    "nul": (coco([IMAGE | {"file_name": "a\0.png"}], []), NO_NAME),
    "surrogate": (coco([IMAGE | {"file_name": "\ud800.png"}], []), NO_NAME),
    "long name": (coco([IMAGE | {"file_name": "x" * 4096}], []), NO_NAME),
    "longer name": (coco([IMAGE | {"file_name": "x" * 4097}], []), "must be the name of a file"),
    "no name": (coco([IMAGE | {"file_name": ""}], []), "must be the name of a file"),
    "not a picture": (coco([IMAGE | {"file_name": "notes.txt"}], []), NO_NAME),
    "one file in two forms": (
        coco(
            [IMAGE | {"file_name": "u\u0308.png"}, IMAGE | {"id": 2, "file_name": "\xfc.png"}], []
        ),
        "images 1 and 2 are both",
    ),
    "crowded image": (
        coco([IMAGE], [one([0, 0, 1, 1], n) for n in range(10_001)]),
        "over 10,000",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_annotations_give_one_line_errors(tmp_path: Path, kind: str) -> None:
    content, reason = WRONG[kind]
    folder = tmp_path / "folder"
    folder.mkdir()
    fill(folder, {"a.png": (10, 10), "\xfc.png": (10, 10)})
    fill(tmp_path, {"a.png": (10, 10)})
    (folder / "notes.txt").write_text("")
    path = annotate(folder, content)
    with pytest.raises(InputError, match=reason) as caught:
        opened(folder)
    assert str(path) in str(caught.value)
    assert str(caught.value).isprintable()


# content, and what the warning says was passed over
HARMLESS: dict[str, tuple[Any, str]] = {
    "fractional size": (coco([IMAGE | {"height": 10.0, "width": 1e1}], [one([1, 2, 3, 4])]), ""),
    "id as a fraction": (coco([IMAGE | {"id": 1.0}], [one([1, 2, 3, 4])]), ""),
    "size null": (coco([IMAGE | {"height": None, "width": None}], [one([1, 2, 3, 4])]), ""),
    "one side": (coco([IMAGE | {"width": 10}], [one([1, 2, 3, 4])]), ""),
    "size as words": (coco([IMAGE | {"height": "?", "width": -1}], [one([1, 2, 3, 4])]), ""),
    "no categories": ({"images": [IMAGE], "annotations": [one([1, 2, 3, 4])]}, ""),
    "null categories": (coco([IMAGE], [one([1, 2, 3, 4])], categories=None), ""),
    "other category": (coco([IMAGE], [one([1, 2, 3, 4], category_id=9)]), ""),
    "no category": (coco([IMAGE], [one([1, 2, 3, 4], category_id=None)]), ""),
    "iscrowd as a truth": (coco([IMAGE], [one([1, 2, 3, 4], iscrowd=False)]), ""),
    "no area": (
        coco([IMAGE], [one([1, 2, 3, 4]), one([5, 5, 0, 2], 2), one([5, 5, 2, 0.0], 3)]),
        r"passed over boxes of no area \(2\)$",
    ),
    "underflow": (
        coco([IMAGE], [one([1, 2, 3, 4]), one([5, 5, 1e-20, 1], 2)]),
        r"boxes of no area \(1\)$",
    ),
    "crowd without a box": (
        coco([IMAGE], [one([1, 2, 3, 4]), one([0] * 4, 2, iscrowd=1), one(None, 3, iscrowd=1)]),
        r"boxes of no area \(2\)$",
    ),
    "image not listed": (
        coco([IMAGE], [one([1, 2, 3, 4]), one([1, 1, 1, 1], 2) | {"image_id": 8}]),
        r"boxes of images that are not listed \(1\)$",
    ),
    "absent file": (
        coco([IMAGE, {"id": 2, "file_name": "z.png"}, {"id": 3, "file_name": "../a.png"}],
             [one([1, 2, 3, 4]), one([5, 5, 0, 2], 2)]),
        r"boxes of no area \(1\), names that are no image of the folder \(2\)$",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", HARMLESS)
def test_harmless_entries_are_passed_over_and_counted(tmp_path: Path, kind: str) -> None:
    content, told = HARMLESS[kind]
    fill(tmp_path, {"a.png": (10, 10)})
    annotate(tmp_path, content)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for split in ("train", "validation", "test"):
            ((_, number, _, truth),) = opened(tmp_path, split).images()
    assert len(caught) == bool(told), "each folder is told of once"
    if told:
        assert re.search(told, str(caught[0].message))
    assert number == 1
    assert truth is not None
    assert truth.boxes.tolist() == [[1, 2, 4, 6]]


def test_file_without_annotations_gives_ids_only(tmp_path: Path) -> None:
    fill(tmp_path, {"a.png": (10, 10), "b.png": (10, 10)})
    annotate(tmp_path, {"images": [IMAGE | {"id": 7}], "categories": [{"id": 3, "name": "cell"}]})
    folder = opened(tmp_path, "test")
    assert not folder.has_truth
    assert [number for _, number in folder.files()] == [7, 8]
    assert folder.categories == [3]
    assert folder.batch(torch.arange(3)).counts.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("content", "categories"),
    [
        (coco([IMAGE], []), [2, 5]),
        (coco([IMAGE], [], categories=[{"id": 7, "name": "x"}, {"id": 3}, {"id": 7}]), [7, 3]),
        ({"images": [IMAGE], "annotations": [one([1, 2, 3, 4], category_id=9)]}, [9]),
        ({"images": [IMAGE], "annotations": []}, []),
    ],
)
def test_categories_are_those_of_the_annotations(
    tmp_path: Path, content: Any, categories: list[int]
) -> None:
    fill(tmp_path, {"a.png": (10, 10)})
    annotate(tmp_path, content)
    assert opened(tmp_path).categories == categories


def test_links_and_other_unicode_forms_are_found(tmp_path: Path) -> None:
    """Case 19 of the reported ones, and data sets that are made of links."""
    folder = tmp_path / "folder"
    folder.mkdir()
    fill(tmp_path, {"elsewhere.png": (10, 10)})
    (folder / "link.png").symlink_to(tmp_path / "elsewhere.png")
    fill(folder, {"zelle\u0301.png": (10, 10), "sub/\xfc.png": (10, 10)})
    names = ("link.png", "zell\xe9.png", "sub/u\u0308.png")
    annotate(
        folder,
        coco(
            [{"id": n, "file_name": name} for n, name in enumerate(names)],
            [one([n, 0, 1, 1], n, image_id=n) for n in range(3)],
        ),
    )
    found = {number: truth for _, number, _, truth in opened(folder, "test").images()}
    assert {n: truth.boxes.tolist() for n, truth in found.items() if truth is not None} == {
        n: [[n, 0, n + 1, 1]] for n in range(3)
    }


def test_wrong_annotations_are_left_out_where_no_truth_is_needed(tmp_path: Path) -> None:
    fill(tmp_path, {"a.png": (10, 10), "b.png": (10, 10)})
    annotate(tmp_path, coco([IMAGE | {"id": 6}], [one([0, 0, float("nan"), 1], image_id=6)]))
    config = DataConfig(name="folder", path=str(tmp_path))
    with pytest.warns(UserWarning, match=r"bbox must be .*; the annotations are left out, and ids"):
        folder = ImageFolder(config, "test", needs_truth=False)
    assert [number for _, number in folder.files()] == [1, 2]
    assert not folder.has_truth


def test_crowds_follow_the_crop_and_the_scale(tmp_path: Path) -> None:
    fill(tmp_path, {"a.png": (16, 16)})
    region = [2, 3, 10, 5]
    annotate(tmp_path, coco([IMAGE], [one([4, 4, 2, 2]), one(region, 2, iscrowd=1)]))
    image = read_image(tmp_path / "a.png")
    batch = opened(tmp_path).batch(torch.arange(50))
    for crop, truth in zip(batch.images, batch.truth(), strict=True):
        ((top, left),) = place(crop, image)
        x1, y1 = max(2 - left, 0), max(3 - top, 0)
        x2, y2 = min(12 - left, 9), min(8 - top, 8)
        assert truth.crowds.tolist() == ([[x1, y1, x2, y2]] if x1 < x2 and y1 < y2 else [])
    config = DataConfig(name="folder", path=str(tmp_path))
    whole = ImageFolder(config, "test", prepare=PrepareConfig(scale=2))
    (truth,) = whole.crops().truth()
    assert truth.crowds.tolist() == [[4, 6, 24, 16]]
    (seen,) = (prepared(b, PrepareConfig(scale=2)) for b in evaluation_batches(whole, 4))
    assert seen.truth()[0].crowds.tolist() == [[4, 6, 24, 16]]


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_turn_with_the_image(tmp_path: Path, orientation: int, suffix: str) -> None:
    """The object stays in its box, whether the entry's size is the stored or the upright one."""
    stored = np.zeros((24, 32), np.uint8)
    stored[3:9, 20:24] = 240
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"quality": 100} if suffix == "jpg" else {}
    name = f"p.{suffix}"
    Image.fromarray(stored).save(tmp_path / name, exif=exif, **options)
    entry = {"id": 1, "file_name": name}
    boxes = [one([20, 3, 4, 6]), one([0, 0, 32, 24], 2, iscrowd=1)]
    in_doubt = orientation in (2, 3, 4)
    for size in ({"height": 24, "width": 32}, {}):
        annotate(tmp_path, coco([entry | size], boxes))
        told = in_doubt or (orientation > 1 and not size)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            folder_module._warn_once.cache_clear()
            ((_, _, image, truth),) = opened(tmp_path, "test").images()
        assert [str(w.message).endswith("as the images are (1)") for w in caught] == [True] * told
        assert truth is not None
        assert truth.crowds.tolist() == [[0, 0, image.shape[2], image.shape[1]]]
        ((x1, y1, x2, y2),) = truth.boxes.int().tolist()
        assert (image[:, y1:y2, x1:x2] > 0.8).all()
        assert (image > 0.8).sum() == 3 * 24
    if orientation > 4:
        assert truth is not None
        ((x1, y1, x2, y2),) = truth.boxes.tolist()
        size = {"height": 32, "width": 24}
        annotate(tmp_path, coco([entry | size], [one([x1, y1, x2 - x1, y2 - y1])]))
        ((_, _, _, upright),) = opened(tmp_path, "test").images()
        assert upright is not None
        assert upright.boxes.tolist() == [[x1, y1, x2, y2]]
        annotate(tmp_path, coco([entry | {"height": 31, "width": 24}], boxes))
        with pytest.raises(InputError, match=r"has 32x24 pixels .*, not 31x24"):
            opened(tmp_path)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"images": ' + b"9" * 5000 + b"}", "not JSON"),
    ],
)
def test_invalid_json_is_refused(tmp_path: Path, data: bytes, reason: str) -> None:
    path = tmp_path / "annotations.json"
    path.write_bytes(data)
    with pytest.raises(InputError, match=reason) as caught:
        read_annotations(path)
    assert str(caught.value).isprintable()


def test_special_and_oversized_annotations_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "annotations.json"
    with path.open("wb") as file:
        file.truncate(10 << 30)
    with pytest.raises(InputError, match="larger than 256 MiB"):
        read_annotations(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(InputError, match="not a regular file"):
        read_annotations(path)


def test_damaged_annotations_load_or_are_refused(tmp_path: Path) -> None:
    fill(tmp_path, {"a.png": (10, 10)})
    path = annotate(tmp_path, coco([IMAGE], [one([1, 2, 3, 4], n) for n in range(3)]))
    whole = path.read_bytes()
    rng = random.Random(0)
    reasons = []
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 2, 5))):
            data[rng.randrange(len(data))] = rng.choice(b'0123456789-.eE[]{},:"abc \xff')
        path.write_bytes(data)
        try:
            for entry in read_annotations(path).images.values():
                boxes = entry.truth.boxes if entry.truth else torch.zeros(0, 4)
                assert (boxes[:, 2:] > boxes[:, :2]).all()
        except InputError as error:
            reasons.append(str(error))
    assert 100 < len(reasons) < 300
    assert all(reason.isprintable() for reason in reasons)


def truncate(path: Path) -> None:
    """Leaves the header and a part of the pixels."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def without(folder: Path, name: str, copy: Path) -> None:
    """A copy of the folder that lacks one file."""
    for path in folder.iterdir():
        if path.name != name:
            (copy / path.name).write_bytes(path.read_bytes())


@pytest.mark.parametrize("split", ["train", "validation", "test"])
@pytest.mark.parametrize("header", [False, True])
def test_damaged_files_are_skipped_and_named(tmp_path: Path, header: bool, split: Split) -> None:
    """The folder is as if the file were not there, whether its header or its pixels are damaged."""
    folder, copy = tmp_path / "whole", tmp_path / "copy"
    folder.mkdir()
    copy.mkdir()
    fill(folder, {f"{n}.png": (12, 12) for n in range(12)})
    damaged = opened(folder, "validation").files()[0][0]  # else it might be left without any
    without(folder, damaged.name, copy)
    if header:
        damaged.write_bytes(b"nothing")
    else:
        truncate(damaged)
    found, expected = opened(folder, split), opened(copy, split)
    (reason,) = found.skipped
    assert reason.startswith(f"{damaged}: ")
    assert found.num_files == 12
    assert expected.skipped == []
    assert_equal(found.batch(torch.arange(40)), expected.batch(torch.arange(40)))
    assert [name for name, *_ in found.images()] == [name for name, *_ in expected.images()]


def test_annotated_ids_stay_when_a_file_is_damaged(tmp_path: Path) -> None:
    fill(tmp_path, {f"{name}.png": (12, 12) for name in "abc"})
    annotate(tmp_path, coco([IMAGE, {"id": 4, "file_name": "c.png"}], [one([1, 1, 4, 4])]))
    truncate(tmp_path / "a.png")
    folder = opened(tmp_path, "test")
    assert [(name, number) for name, number, *_ in folder.images()] == [("b.png", 5), ("c.png", 4)]
    assert folder.has_truth


def test_damage_found_late_gives_other_crops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a large folder; the crops do not depend on when the damage was found."""
    fill(tmp_path, {f"{n}.png": (12, 12) for n in range(5)})
    whole = opened(tmp_path).batch(torch.arange(60)).images
    images = [read_image(tmp_path / f"{n}.png") for n in range(5)]
    truncate(tmp_path / "2.png")
    monkeypatch.setattr(folder_module, "_DECODED_PIXELS", 100)
    folder = opened(tmp_path)
    assert folder.skipped == []
    with pytest.warns(UserWarning, match=r"skipped 1 of 5: .*2\.png: a damaged image"):
        first = folder.batch(torch.arange(60))
    assert len(folder.skipped) == 1
    again = opened(tmp_path)
    with pytest.warns(UserWarning, match="skipped 1 of 5"):
        parts = [again.batch(torch.arange(start, start + 20)) for start in (40, 20, 0)]
    assert torch.equal(torch.cat([part.images for part in reversed(parts)]), first.images)
    for crop, before in zip(first.images, whole, strict=True):
        if place(before, images[2]):
            assert place(crop, images[3])
        else:
            assert torch.equal(crop, before)
    with pytest.warns(UserWarning, match="skipped 1 of 5"):
        names = [name for name, *_ in opened(tmp_path, "test").images()]
    assert names == ["0.png", "1.png", "3.png", "4.png"]


@pytest.mark.parametrize("limit", [100, 1 << 26])
def test_folder_of_damaged_files_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(folder_module, "_DECODED_PIXELS", limit)
    fill(tmp_path, {f"{n}.png": (12, 12) for n in range(5)})
    for path in tmp_path.iterdir():
        truncate(path)
    with pytest.raises(InputError, match=r"image can be read: skipped 5 of 5: .*; and 2 more"):
        opened(tmp_path)


def test_image_file_is_a_folder_of_one(tmp_path: Path) -> None:
    fill(tmp_path, {"a.png": (12, 14), "b.png": (12, 14)})
    annotate(tmp_path, coco([IMAGE], [one([1, 2, 3, 4])]))
    for split in ("train", "validation", "test"):
        folder = opened(tmp_path / "a.png", split)
        assert [path for path, _ in folder.files()] == [tmp_path / "a.png"]
        assert folder.has_truth
    ((name, number, image, truth),) = folder.images()
    assert (name, number) == ("a.png", 1)
    assert torch.equal(image, read_image(tmp_path / "a.png"))
    assert truth is not None
    assert truth.boxes.tolist() == [[1, 2, 4, 6]]
    other = opened(tmp_path / "b.png", "test")
    assert not other.has_truth
    assert [name for name, *_ in other.images()] == ["b.png"]


def test_images_of_any_size_and_mode_share_a_folder(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (20, 30, 4)).astype(np.uint8)).save(tmp_path / "a.png")
    Image.fromarray(rng.integers(0, 65536, (9, 9)).astype(np.uint16)).save(tmp_path / "b.tif")
    Image.fromarray(rng.integers(0, 256, (5, 40)).astype(np.uint8)).save(tmp_path / "c.jpg")
    Image.fromarray(rng.normal(size=(16, 16)).astype(np.float32)).save(tmp_path / "d.tif")
    (tmp_path / "notes.txt").write_text("about the images")
    batch = opened(tmp_path).batch(torch.arange(40))
    assert batch.images.shape == (40, 3, 8, 9)
    assert batch.images.isfinite().all()
    shapes = [tuple(image.shape[1:]) for _, _, image, _ in opened(tmp_path, "test").images()]
    assert shapes == [(20, 30), (9, 9), (5, 40), (16, 16)]


def test_what_spairkit_wrote_is_no_image_of_a_folder(tmp_path: Path) -> None:
    fill(tmp_path, {"a.png": (12, 12), "mine/b.png": (12, 12), "mine/c.png": (12, 12)})
    write_picture(tmp_path / "a-spairkit.png", torch.zeros(3, 12, 12))
    write_picture(tmp_path / "mine" / "anything.png", torch.zeros(3, 12, 12))
    config = Config(data=DataConfig(name="folder", path=str(tmp_path)))
    run = Run.create(tmp_path / "mine" / "attempt", config)
    run.truncate_metrics(0)
    write_png(run.path / "example.png", torch.zeros(3, 12, 12))
    names = [name for name, *_ in opened(tmp_path, "test").images()]
    assert names == ["a.png", "mine/b.png", "mine/c.png"]


def test_validation_takes_the_same_crops_of_every_file(tmp_path: Path) -> None:
    fill(tmp_path, {f"{n}.png": (30, 40) for n in range(4)})
    images = [read_image(tmp_path / f"{n}.png") for n in range(4)]
    folder = opened(tmp_path, "validation", validation_images=10)
    crops = folder.crops()
    assert crops.images.shape == (10, 3, 8, 9)
    assert crops is folder.crops()
    assert_equal(crops, opened(tmp_path, "validation", validation_images=10).crops())
    for index, crop in enumerate(crops.images):
        assert place(crop, images[index % 4])
    assert_equal(crops, folder.batch(torch.arange(10)))


def test_validation_takes_small_images_once(tmp_path: Path) -> None:
    fill(tmp_path, {f"{n}.png": (8, 9) for n in range(4)})
    crops = opened(tmp_path, "validation").crops()
    assert len(crops.images) == 4
    for n, crop in enumerate(crops.images):
        assert torch.equal(crop, read_image(tmp_path / f"{n}.png"))


def test_crops_of_a_validation_are_few_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_module, "_CROPPED_PIXELS", 8 * 9 * 3)
    fill(tmp_path, {"0.png": (30, 40)})
    assert len(opened(tmp_path, "validation").crops().images) == 3


def test_validation_crops_are_of_annotated_files(tmp_path: Path) -> None:
    fill(tmp_path, {f"{name}.png": (12, 12) for name in "abc"})
    annotate(tmp_path, coco([IMAGE], [one([0, 0, 12, 12])]))
    image = read_image(tmp_path / "a.png")
    crops = opened(tmp_path, "validation", validation_images=6).crops()
    assert all(place(crop, image) for crop in crops.images)
    assert crops.counts.tolist() == [1] * 6


def test_image_changed_during_use_is_reported(tmp_path: Path) -> None:
    fill(tmp_path, {"a.png": (10, 10)})
    folder = opened(tmp_path)
    fill(tmp_path, {"a.png": (11, 10)})
    with pytest.raises(InputError, match="changed during use"):
        folder.batch(torch.arange(2))


def test_images_are_sorted_by_path(tmp_path: Path) -> None:
    fill(tmp_path, dict.fromkeys(("b.png", "a/z.png", "a.png", "B.png"), (4, 4)))
    names = [name for name, _, _, _ in opened(tmp_path, "test").images()]
    assert all(first < second for first, second in pairwise(names))


def test_wrong_indices_are_refused(tmp_path: Path) -> None:
    fill(tmp_path, {"a.png": (4, 4)})
    with pytest.raises(ValueError, match=r"int64 \[B\]"):
        opened(tmp_path).batch(torch.zeros(3))
    assert opened(tmp_path).batch(torch.arange(0)).images.shape == (0, 3, 8, 9)
