"""Crops that a device cuts from images that it holds, against those that are cut on the CPU."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from spairkit.config import DataConfig, PrepareConfig
from spairkit.data import crops as crops_module
from spairkit.data import folder as folder_module
from spairkit.data.crops import ImagesOnDevice, images_on_device
from spairkit.data.folder import ImageFolder
from spairkit.data.scenes import Batch
from spairkit.images import read_pixels

CPU = torch.device("cpu")
GREY = PrepareConfig(contrast="direction", direction=(0.3, 0.6, 0.1), scale=0.7)


def fill(folder: Path) -> None:
    """Images of every type, some of them smaller than a crop, and what is true of two."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (20, 30, 4)).astype(np.uint8)).save(folder / "a.png")
    Image.fromarray(rng.integers(0, 65536, (9, 9)).astype(np.uint16)).save(folder / "b.tif")
    Image.fromarray(rng.integers(0, 256, (5, 40)).astype(np.uint8)).save(folder / "c.png")
    Image.fromarray(rng.random((16, 7)).astype(np.float32)).save(folder / "d.tif")
    images = [{"id": n, "file_name": name} for n, name in enumerate(("a.png", "c.png"))]
    boxes = [(0, [3, 4, 9, 8]), (0, [1, 1, 28, 18]), (1, [20, 0, 8, 5])]
    objects = [
        {"id": n, "image_id": image, "category_id": 5, "bbox": box, "iscrowd": int(n == 1)}
        for n, (image, box) in enumerate(boxes)
    ]
    truth = {"images": images, "annotations": objects, "categories": [{"id": 5}]}
    (folder / "annotations.json").write_text(json.dumps(truth))


def opened(folder: Path, prepare: PrepareConfig | None = None, **settings: Any) -> ImageFolder:
    config = DataConfig(name="folder", path=str(folder), image_height=8, image_width=9, **settings)
    return ImageFolder(config, "train", CPU, prepare)


def room_for(folder: ImageFolder) -> ImagesOnDevice:
    return ImagesOnDevice(folder._prepared_sizes, folder._channels, CPU)


def assert_same_bits(batch: Batch, expected: Batch) -> None:
    for name in ("images", "boxes", "labels", "counts", "crowds"):
        value, other = getattr(batch, name), getattr(expected, name)
        assert (value is None and other is None) or torch.equal(value, other), name
    assert batch.images.is_contiguous()


@pytest.mark.parametrize("kind", ["uniform", "objects"])
@pytest.mark.parametrize(
    "prepare",
    [PrepareConfig(), PrepareConfig(black=0.1, white=0.7), PrepareConfig(scale=1.3), GREY],
    ids=["plain", "levels", "scaled", "grey"],
)
def test_crops_have_the_bits_of_those_cut_on_the_cpu(
    tmp_path: Path, prepare: PrepareConfig, kind: str
) -> None:
    fill(tmp_path)
    folder = opened(tmp_path, prepare, crops=kind)
    images = room_for(folder)
    for start in (0, 20, 40):
        indices = torch.arange(start, start + 20)
        made = folder.cuts(images, indices)
        assert (made.missing == {}) == (start > 0)
        expected = opened(tmp_path, prepare, crops=kind).batch(indices)
        assert_same_bits(made.to(CPU), expected)
    assert expected.counts.any()
    assert expected.crowds is not None


def test_images_are_decoded_and_copied_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if the cache holds one at a time, and if a batch is given up."""
    fill(tmp_path)
    monkeypatch.setattr(folder_module, "_CACHE_BYTES", 1)
    monkeypatch.setattr(folder_module, "_WINDOW", 5)
    expected = opened(tmp_path).batch(torch.arange(100))
    folder = opened(tmp_path)
    images, read, copied = room_for(folder), [], []
    fresh = images.put

    def counted(path: Path) -> Tensor:
        read.append(path.name)
        return read_pixels(path)

    def put(image: int, values: Tensor) -> None:
        copied.append(image)
        fresh(image, values)

    monkeypatch.setattr(folder_module, "read_pixels", counted)
    monkeypatch.setattr(images, "put", put)
    given_up = folder.cuts(images, torch.arange(100))
    assert sorted(given_up.missing) == [0, 1, 2, 3]
    assert images.there == set()
    assert_same_bits(folder.cuts(images, torch.arange(100)).to(CPU), expected)
    read.clear()
    assert_same_bits(folder.cuts(images, torch.arange(100)).to(CPU), expected)
    assert not read
    assert sorted(copied) == [0, 1, 2, 3]


def test_damaged_files_give_the_crops_of_the_next_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path)
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:600])
    monkeypatch.setattr(folder_module, "_DECODED_PIXELS", 1)
    folder, other = opened(tmp_path), opened(tmp_path)
    with pytest.warns(UserWarning, match="skipped 1 of 4"):
        made = folder.cuts(room_for(folder), torch.arange(40)).to(CPU)
    with pytest.warns(UserWarning, match="skipped 1 of 4"):
        expected = other.batch(torch.arange(40))
    assert_same_bits(made, expected)


def test_a_gpu_holds_images_that_take_a_quarter_of_its_free_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes, gpu, free = [(10, 20), (5, 5)], torch.device("cuda"), 4 * 4 * 3 * 225
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 1 << 40))
    monkeypatch.setattr(crops_module, "ImagesOnDevice", lambda sizes, *_: room_of(sizes))

    def room_of(sizes: list[tuple[int, int]]) -> ImagesOnDevice:
        return ImagesOnDevice(sizes, 1, CPU)

    assert images_on_device(sizes, 3, gpu) is not None
    assert images_on_device(sizes, 3, CPU) is None
    free -= 1
    assert images_on_device(sizes, 3, gpu) is None
    assert images_on_device(sizes, 1, gpu) is not None


def test_folder_without_room_on_a_gpu_is_cropped_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path)
    folder = opened(tmp_path)
    indices = torch.arange(40)
    made = folder.ahead(with_truth=True)(indices)
    assert isinstance(made, Batch)
    assert_same_bits(made, folder.batch(indices))
    monkeypatch.setattr(folder_module, "images_on_device", ImagesOnDevice)
    assert_same_bits(folder.ahead(with_truth=True)(indices).to(CPU), made)


@pytest.mark.parametrize("held", [False, True])
def test_batches_without_truth_have_the_same_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: bool
) -> None:
    fill(tmp_path)
    folder, indices = opened(tmp_path), torch.arange(40)
    if held:
        monkeypatch.setattr(folder_module, "images_on_device", ImagesOnDevice)
    made = folder.ahead(with_truth=False)(indices).to(CPU)
    expected = folder.batch(indices)
    assert torch.equal(made.images, expected.images)
    assert expected.counts.any()
    assert not made.counts.any()


def test_no_crops_are_none(tmp_path: Path) -> None:
    fill(tmp_path)
    folder, none = opened(tmp_path), torch.arange(0)
    assert_same_bits(folder.cuts(room_for(folder), none).to(CPU), folder.batch(none))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_crops_of_a_gpu_have_the_bits_of_the_cpu(tmp_path: Path) -> None:
    fill(tmp_path)
    gpu = torch.device("cuda")
    config = DataConfig(name="folder", path=str(tmp_path), image_height=8, image_width=9)
    make = ImageFolder(config, "train", gpu, GREY).ahead(with_truth=True)
    for start in (0, 20):
        indices = torch.arange(start, start + 20)
        made = make(indices)
        assert not isinstance(made, Batch)
        expected = opened(tmp_path, GREY).batch(indices)
        assert_same_bits(made.to(gpu).to(CPU), expected)
