"""Opens the datasets that a config names."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch

from spairkit.config import AIRConfig, ClassicalConfig, Config, DataConfig, PrepareConfig
from spairkit.data.cards import Cards
from spairkit.data.folder import NOTHING, ImageFolder, batch_of
from spairkit.data.glyphs import Split
from spairkit.data.scenes import Batch, Scenes
from spairkit.data.synthetic import KINDS
from spairkit.errors import InputError
from spairkit.images import SUFFIXES, same_sized
from spairkit.names import is_utf8
from spairkit.preparation import prepare_images

Dataset = Scenes | ImageFolder

CARDS = {"name": "cards", "min_objects": 7, "max_objects": 7, "max_overlap": 1 / 3}
"""Values of `DataConfig` for the cards of Table 1 (docs/model.md 10)."""

_MAX_PIXELS = 1 << 24


def dataset_names() -> tuple[str, ...]:
    """The values of `data.name`."""
    return get_args(get_type_hints(DataConfig)["name"])


def open_dataset(
    config: DataConfig,
    split: Split,
    device: torch.device | str = "cpu",
    prepare: PrepareConfig | None = None,
) -> Dataset:
    """The dataset that `config` names, giving batches on `device`.

    Args:
        prepare: of a folder's crops; None: none.

    Raises:
        InputError: its files are missing, damaged or unfit, or its options contradict each other.
    """
    if config.name == "folder":
        return ImageFolder(config, split, device, prepare)
    if config.name == "cards":
        return Cards(config, split, device)
    return Scenes(config, split, device)


def data_settings(word: str) -> dict[str, Any]:
    """The config values that `--data word` stands for.

    Args:
        word: the name of a dataset, a folder of images, one image file, or an MNIST file (EMNIST,
            if its name says emnist).

    Raises:
        InputError: it is none of these.
    """
    names = [name for name in dataset_names() if name != "folder"]
    path = Path(word)
    if word == "cards":
        return {"data": dict(CARDS)}
    if word in names:
        return {"data": {"name": word}}
    if path.exists() and not is_utf8(str(path.resolve())):
        raise InputError(
            f"{path.resolve()}: this name is not UTF-8, so a config cannot hold it; rename it"
        )
    if path.is_dir():
        return {"data": {"name": "folder", "path": str(path.resolve())}}
    if path.suffix.lower() in SUFFIXES and path.is_file():
        return {"data": {"name": "folder", "path": str(path.resolve())}}
    if word in ("invaders", *KINDS):
        raise InputError(
            f"{word}: write a folder first (spairkit data make FOLDER --data {word}), and give "
            "that folder"
        )
    if path.is_file():
        name = "emnist" if "emnist" in path.name.lower() else "mnist"
        return {"data": {"name": name, "path": str(path.resolve())}}
    raise InputError(f"{word}: no such folder or file, and no dataset ({', '.join(names)})")


def described(data: DataConfig, split: str, *, trained_on: bool = True) -> str:
    """Describes the images of a split, for `Report.measured_on`.

    `trained_on` says whether the model was trained on images of this folder.
    """
    if data.name == "folder":
        if split == "test":
            included = ", including the training images" if trained_on else ""
            return f"all images of {data.path}{included}"
        return f"{split} images of {data.path}"
    glyphs = (
        "UCI optical digits" if data.name == "digits" else f"{data.name}, {Path(data.path).name}"
    )
    images = data.test_images if split == "test" else data.validation_images
    least, most = data.min_objects, data.max_objects
    number = f"{least} to {most} glyphs" if least != most else f"{most} glyph{'s' * (most != 1)}"
    if data.name == "cards":
        number, glyphs = f"{most} cards", "SET"
    size, cut = (data.image_height, data.image_width), ""
    if size != data.whole_size and split == "test":
        size = data.whole_size
    elif size != data.whole_size:
        cut = " cut from {} × {} px".format(*data.whole_size)
    return (
        f"{split} split: {images} scenes of {size[0]} × {size[1]} px{cut}, "
        f"{number} of {data.glyph_size} px ({glyphs}), seed {data.seed}"
    )


def open_splits(config: Config, device: torch.device | str = "cpu") -> tuple[Dataset, Dataset]:
    """The images that a run trains on, and those that it is validated on.

    Raises:
        InputError: as `open_dataset`; ground truth that the run needs is missing; or images
            differ in size.
    """
    train, validation = (
        open_dataset(config.data, split, device, config.prepare)
        for split in ("train", "validation")
    )
    model = config.model
    if (
        config.train.select == "ap"
        and not isinstance(model, ClassicalConfig)
        and not validation.has_truth
    ):
        raise InputError(
            "train.select = 'ap' needs ground truth, but these images have no annotations.json; "
            "use 'elbo'"
        )
    if model.count_is_given and not (train.has_truth and validation.has_truth):
        raise InputError(
            "model.count = 'given' needs the true number of objects, but these images have no "
            "annotations.json; use 'inferred'"
        )
    if isinstance(model, AIRConfig):
        wanted = config.data.image_height, config.data.image_width
        if config.data.whole_size != wanted:
            raise InputError(
                f"{model.kind.upper()} takes images of one size; set data.scene_height and "
                "data.scene_width to 0"
            )
        folders = [item for item in (train, validation) if isinstance(item, ImageFolder)]
        others = sorted({size for folder in folders for size in folder.sizes} - {wanted})
        if others:
            raise InputError(
                f"{model.kind.upper()} takes images of one size, here {wanted[0]}x{wanted[1]} px, "
                f"but one has {others[0][0]}x{others[0][1]} px; set data.image_height and "
                "data.image_width to their size, or train SPAIR, which takes any size"
            )
    return train, validation


def prepared(batch: Batch, config: PrepareConfig) -> Batch:
    """A batch as a model sees it, of scenes or of whole images of a folder; boxes follow."""
    images = prepare_images(batch.images, config)
    (rows, columns), (height, width) = images.shape[-2:], batch.images.shape[-2:]
    scale = batch.boxes.new_tensor([columns / width, rows / height] * 2)
    crowds = None if batch.crowds is None else batch.crowds * scale
    return replace(batch, images=images, boxes=batch.boxes * scale, crowds=crowds)


def evaluation_batches(dataset: Dataset, batch_size: int) -> Iterator[Batch]:
    """The images of a split in order, in batches of at most `batch_size`.

    A folder gives whole images; consecutive ones of one size share a batch, up to 16 million
    pixels. If it has annotations, images without any entry are left out.

    Raises:
        TypeError: the train split of scenes has no end.
        InputError: an image is damaged.
    """
    if isinstance(dataset, ImageFolder):
        known = (
            (truth or NOTHING, image)
            for _, _, image, truth in dataset.images()
            if truth is not None or not dataset.has_truth
        )
        for group in same_sized(known, batch_size, _MAX_PIXELS):
            truths, images = zip(*group, strict=True)
            yield batch_of(images, truths, images[0].shape[1:])
        return
    for start in range(0, len(dataset), batch_size):
        yield dataset.batch(torch.arange(start, min(start + batch_size, len(dataset))))


def validation_batches(
    dataset: Dataset, batch_size: int, prepare: PrepareConfig
) -> Iterator[Batch]:
    """The images of a validation during training as a model sees them, the same every time.

    They are the scenes of the split, or crops of a folder, so that memory is bounded by the size of
    a crop. Errors as in `evaluation_batches`.
    """
    if not isinstance(dataset, ImageFolder):
        for batch in evaluation_batches(dataset, batch_size):
            yield prepared(batch, prepare)
        return
    crops = dataset.crops()
    for start in range(0, len(crops.images), batch_size):
        yield crops.part(slice(start, start + batch_size))
