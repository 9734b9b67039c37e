"""Datasets opened from settings; evaluation batches that cover a split exactly once."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from spairkit.config import DataConfig
from spairkit.data.datasets import dataset_names, evaluation_batches, open_dataset
from spairkit.data.folder import ImageFolder
from spairkit.data.scenes import Scenes
from spairkit.images import read_image


def test_config_selects_the_dataset(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(tmp_path / "a.png")
    assert isinstance(open_dataset(DataConfig(), "test"), Scenes)
    folder = DataConfig(name="folder", path=str(tmp_path))
    assert isinstance(open_dataset(folder, "test"), ImageFolder)
    assert dataset_names() == ("digits", "mnist", "emnist", "cards", "folder")


def test_evaluation_covers_every_scene_once_in_order() -> None:
    scenes = Scenes(DataConfig(test_images=21), "test")
    batches = list(evaluation_batches(scenes, 8))
    assert [len(batch.counts) for batch in batches] == [8, 8, 5]
    images = torch.cat([batch.images for batch in batches])
    assert torch.equal(images, scenes.batch(torch.arange(21)).images)


def test_training_scenes_have_no_length() -> None:
    with pytest.raises(TypeError, match="no length"):
        next(evaluation_batches(Scenes(DataConfig(), "train"), 8))


@pytest.mark.parametrize("annotated", [False, True])
def test_consecutive_images_of_one_size_share_a_batch(tmp_path: Path, annotated: bool) -> None:
    rng = np.random.default_rng(0)
    sizes = [(6, 7)] * 5 + [(7, 6)] * 2 + [(6, 7)]
    names = [f"{n}.png" for n in range(len(sizes))]
    for name, size in zip(names, sizes, strict=True):
        Image.fromarray(rng.integers(0, 256, (*size, 3)).astype(np.uint8)).save(tmp_path / name)
    if annotated:
        names.remove("6.png")
        content = {
            "images": [{"id": n, "file_name": name} for n, name in enumerate(names)],
            "categories": [{"id": 0}],
            "annotations": [{"id": 4, "image_id": 2, "category_id": 0, "bbox": [1, 2, 3, 3]}],
        }
        (tmp_path / "annotations.json").write_text(json.dumps(content))
    dataset = open_dataset(DataConfig(name="folder", path=str(tmp_path)), "test")
    batches = list(evaluation_batches(dataset, 3))
    assert [len(batch.counts) for batch in batches] == [3, 2, 1 if annotated else 2, 1]
    images = [image for batch in batches for image in batch.images]
    for image, name in zip(images, names, strict=True):
        assert torch.equal(image, read_image(tmp_path / name))
    truths = [truth for batch in batches for truth in batch.truth()]
    boxes = [truth.boxes.tolist() for truth in truths]
    assert boxes == [[[1, 2, 4, 5]] if annotated and n == 2 else [] for n in range(len(names))]


def test_large_images_get_a_batch_of_their_own(tmp_path: Path) -> None:
    for n in range(2):
        Image.fromarray(np.zeros((3000, 3000), np.uint8)).save(tmp_path / f"{n}.png")
    dataset = open_dataset(DataConfig(name="folder", path=str(tmp_path)), "test")
    assert [len(batch.counts) for batch in evaluation_batches(dataset, 32)] == [1, 1]
