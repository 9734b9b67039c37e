"""Which images a config asks for, opened."""

from collections.abc import Iterator
from typing import get_args, get_type_hints

import torch

from spairkit.config import DataConfig
from spairkit.data.folder import ImageFolder, stacked
from spairkit.data.glyphs import Split
from spairkit.data.scenes import Batch, Scenes

Dataset = Scenes | ImageFolder

_MAX_PIXELS = 1 << 24


def dataset_names() -> tuple[str, ...]:
    """The names that `data.name` takes."""
    return get_args(get_type_hints(DataConfig)["name"])


def open_dataset(config: DataConfig, split: Split, device: torch.device | str = "cpu") -> Dataset:
    """The dataset that `config` names, giving batches on `device`.

    Raises:
        InputError: its files are missing, damaged or unfit, or its options contradict each other.
    """
    kind = ImageFolder if config.name == "folder" else Scenes
    return kind(config, split, device)


def evaluation_batches(dataset: Dataset, batch_size: int) -> Iterator[Batch]:
    """All of a split, once and in order, `batch_size` images at a time; the last may be fewer.

    Scenes: the indices from 0 to their length. A folder: whole images, of which only those of
    one size that follow each other share a batch, up to 16 million pixels; where a folder has
    annotations, images that they do not list are left out.

    Raises:
        TypeError: scenes of the train split, which have no end.
        InputError: an image is damaged.
    """
    if isinstance(dataset, ImageFolder):
        yield from stacked(
            dataset.images(), batch_size, max_pixels=_MAX_PIXELS, only_known=dataset.has_truth
        )
        return
    for start in range(0, len(dataset), batch_size):
        yield dataset.batch(torch.arange(start, min(start + batch_size, len(dataset))))
