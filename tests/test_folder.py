"""Folders of images: crops against slices, splits, COCO ground truth, damaged files."""

import json
import os
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from spairkit.config import Config, DataConfig
from spairkit.data import folder as folder_module
from spairkit.data.annotations import read_annotations
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


def test_truth_is_clipped_to_the_image(tmp_path: Path) -> None:
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
    assert a[3].boxes.tolist() == [[0, 3, 3, 7.5], [15, 8, 20, 10]]
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


WRONG: dict[str, tuple[Any, str]] = {
    "a list": ([], "it must be an object"),
    "no images": ({"annotations": []}, "images must be a list"),
    "no annotations": ({"images": [IMAGE]}, "annotations must be a list"),
    "image not an object": (coco([3], []), r"images\[0\] must be an object"),
    "no id": (coco([{"file_name": "a.png"}], []), "id must be a whole number"),
    "bool id": (coco([IMAGE | {"id": True}], []), "got True"),
    "float id": (coco([IMAGE | {"id": 1.5}], []), "got 1.5"),
    "negative id": (coco([IMAGE | {"id": -1}], []), "got -1"),
    "long id": (coco([IMAGE | {"id": 10**300}], []), "got 1000"),
    "duplicate image": (coco([IMAGE, IMAGE], []), r"images\[1\]: the id 1 is used twice"),
    "duplicate name": (coco([IMAGE, IMAGE | {"id": 2}], []), "'a.png' is used twice"),
    "bad height": (coco([IMAGE | {"height": "4"}], []), "height must be"),
    "other size": (coco([IMAGE | {"height": 4, "width": 5}], []), "has 10x10 pixels"),
    "duplicate object": (coco([IMAGE], [one([0, 0, 1, 1])] * 2), "the id 1 is used twice"),
    "no image": (coco([], [one([0, 0, 1, 1])]), "image_id 1 is not among"),
    "no category": (coco([IMAGE], [one([0, 0, 1, 1], category_id=9)]), "category_id 9 is not"),
    "bad crowd": (coco([IMAGE], [one([0, 0, 1, 1], iscrowd=2)]), "iscrowd must be"),
    "no box": (coco([IMAGE], [one(None)]), "bbox must be x, y"),
    "three numbers": (coco([IMAGE], [one([0, 0, 1])]), "bbox must be x, y"),
    "strings": (coco([IMAGE], [one([0, 0, "1", 1])]), "bbox must be x, y"),
    "bools": (coco([IMAGE], [one([0, 0, True, 1])]), "bbox must be x, y"),
    "nan": (coco([IMAGE], [one([0, 0, float("nan"), 1])]), "bbox must be x, y"),
    "infinite": (coco([IMAGE], [one([0, 0, float("inf"), 1])]), "bbox must be x, y"),
    "huge": (coco([IMAGE], [one([0, 0, 1e300, 1])]), "bbox must be x, y"),
    "huge int": (coco([IMAGE], [one([0, 0, 10**400, 1])]), "bbox must be x, y"),
    "zero width": (coco([IMAGE], [one([0, 0, 0, 1])]), "above 0"),
    "negative": (coco([IMAGE], [one([5, 5, 1, -1])]), "above 0"),
    "underflow": (coco([IMAGE], [one([5, 5, 1e-20, 1])]), "above 0"),
    "outside": (coco([IMAGE], [one([10, 0, 3, 3])]), "lies outside its image"),
    "left of the image": (coco([IMAGE], [one([-3, 0, 3, 3])]), "lies outside its image"),
    "parent folder": (coco([IMAGE | {"file_name": "../a.png"}], []), "leaves the folder"),
    "nested parent folder": (
        coco([IMAGE | {"file_name": "sub/../../a.png"}], []),
        "leaves the folder",
    ),
    "absolute": (coco([IMAGE | {"file_name": "/etc/passwd"}], []), "leaves the folder"),
    "link to outside": (coco([IMAGE | {"file_name": "out.png"}], []), "not a file in the folder"),
    "absent": (coco([IMAGE | {"file_name": "z.png"}], []), "not a file in the folder"),
    "newline": (coco([IMAGE | {"file_name": "a\nb.png"}], []), r"a\\nb.png"),
    "nul": (coco([IMAGE | {"file_name": "a\0.png"}], []), "not a file in the folder"),
    "surrogate": (coco([IMAGE | {"file_name": "\ud800.png"}], []), "not a file in the folder"),
    "long name": (coco([IMAGE | {"file_name": "x" * 4096}], []), "not a file in the folder"),
    "longer name": (coco([IMAGE | {"file_name": "x" * 4097}], []), "must be the name of a file"),
    "no name": (coco([IMAGE | {"file_name": ""}], []), "must be the name of a file"),
    "not a picture": (coco([IMAGE | {"file_name": "notes.txt"}], []), "not an image"),
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
    fill(folder, {"a.png": (10, 10)})
    fill(tmp_path, {"a.png": (10, 10)})
    (folder / "out.png").symlink_to(tmp_path / "a.png")
    (folder / "notes.txt").write_text("")
    path = annotate(folder, content)
    with pytest.raises(InputError, match=reason) as caught:
        opened(folder)
    assert str(path) in str(caught.value)
    assert str(caught.value).isprintable()


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
            for entry in read_annotations(path).values():
                assert (entry.truth.boxes[:, 2:] > entry.truth.boxes[:, :2]).all()
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
