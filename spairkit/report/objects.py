"""The objects that a trained model finds in a few images, kept in the run for its report.

RUN/objects/objects.json   an `Objects`
RUN/objects/*.png          pictures of images and of groups of objects
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
from PIL import Image
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from torch import Tensor

from spairkit.counts import CountPosterior
from spairkit.data.datasets import Dataset
from spairkit.data.folder import ImageFolder
from spairkit.detections import Detections, Truth
from spairkit.detector import Detector
from spairkit.errors import InputError
from spairkit.floor import floor_of
from spairkit.groups import grouped
from spairkit.metrics import agreement
from spairkit.names import in_utf8
from spairkit.report.drawing import display_levels, draw_boxes, encoded, picture_scale
from spairkit.storage import durable

MAX_IMAGES = 64
"""Images that are looked at."""

_FOLDER, _FILE = "objects", "objects.json"
_SECONDS = 30.0  # after which no further image is begun
_MAX_SIDE = 1024  # px; of a larger image the middle is looked at
_BATCH_SIZE = 16
_PICTURES = 4
_SIDE, _MAX_PICTURE_SIDE = 360, 720
_CROPS, _CROP_COLUMNS, _CROP_SIDE, _CROP_GAP = 12, 6, 56, 4
_CROP_MARGIN = 1.25  # side of a crop, as a share of the longer side of the box
_LEAST_CROP = 6.0  # px
_MAX_BYTES = 1 << 20

_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
Count = Annotated[int, Field(ge=0, lt=1 << 40)]
Name = Annotated[str, Field(max_length=1 << 16)]
File = Annotated[str, Field(pattern=r"^[a-z]+-[0-9]{1,3}\.png$")]


@dataclass(config=_STRICT, frozen=True, kw_only=True)
class FoundImage:
    """The objects of one image."""

    name: Name
    """Path in the folder, or the number of a scene."""
    size: tuple[Count, Count]
    """Height and width, in pixels."""
    part: tuple[Count, Count] | None = None
    """Height and width of the middle that was looked at, if not the whole image."""
    count: Count
    interval: tuple[Count, Count] | None = None
    """Of the count, at 90 %, if the model gives one."""
    true_count: Count | None = None
    floor_count: Count | None = None
    """Number of objects that the classical method finds."""
    picture: File | None = None


@dataclass(config=_STRICT, frozen=True, kw_only=True)
class Group:
    """Objects that look alike."""

    count: Count
    side: Annotated[float, Field(ge=0.0, le=1e6)]
    """Median of the longer side of the boxes, in pixels."""
    picture: File
    """Typical objects, cut out of their images."""


@dataclass(config=_STRICT, frozen=True, kw_only=True)
class Floor:
    """A classical method on the same images."""

    name: Name
    count: Count
    agreement: Annotated[float, Field(ge=0.0, le=1.0)]
    """F1 of its boxes with those of the model, at an IoU of .5; see `metrics.agreement`. Where the
    search starts from the watershed, the boxes are those of the encoder alone."""


@dataclass(config=_STRICT, frozen=True, kw_only=True)
class Objects:
    """The objects of the first images of a split."""

    available: Count
    """Number of images of the split."""
    images: Annotated[tuple[FoundImage, ...], Field(min_length=1, max_length=MAX_IMAGES)]
    interval: tuple[Count, Count] | None = None
    """Of the number of objects in all these images, at 90 %."""
    has_interval: bool = True
    """Whether `interval` rests on known objects, see `Detector.has_intervals`."""
    confidence: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    """Median score of the objects, if there are any."""
    groups: Annotated[tuple[Group, ...], Field(max_length=16)] = ()
    floor: Floor | None = None

    @property
    def count(self) -> int:
        """The number of objects in all images."""
        return sum(image.count for image in self.images)


def write_objects(
    run: Path,
    detector: Detector,
    dataset: Dataset,
    progress: Callable[[int], None] | None = None,
) -> Objects:
    """Finds objects in the first images of a split and writes them into the folder of a run.

    At most 64 images, and no further one after half a minute. Of an image longer than 1,024 pixels
    the middle is taken. A detector that needs the true count skips images without. Images of a
    folder that are prepared by their contrast are also given to the watershed.

    Args:
        run: the folder.
        detector: finds the objects.
        dataset: the test split.
        progress: called after each image with the number of images done so far.

    Raises:
        InputError: an image is damaged, no image can be looked at, or the folder cannot be written.
    """
    began = time.monotonic()
    available = len(dataset)
    images: list[FoundImage] = []
    files: dict[str, bytes] = {}
    found: list[Detections] = []
    pixels: list[Tensor] = []
    floor = _floor(detector, dataset)
    beside: list[Detections] = []
    alone: list[Detections] = []
    for names, wholes, truths in _batches(dataset):
        if detector.count_is_given and None in truths:
            continue
        batch = _middle(wholes)
        counts = None
        if detector.count_is_given:
            counts = torch.tensor([len(truth) for truth in truths if truth is not None])
        items = detector.detect_batch(batch, counts=counts)
        if floor is not None:
            beside += [_without_masks(item) for item in floor.detect_batch(batch)]
            encoder = detector.without_watershed()
            own = items if encoder is detector else encoder.detect_batch(batch)
            alone += [_without_masks(item) for item in own]
        for name, image, truth, item in zip(names, batch.cpu(), truths, items, strict=True):
            entry: dict[str, Any] = {"name": in_utf8(name), "size": tuple(wholes.shape[2:])}
            if len(images) < _PICTURES:
                entry["picture"] = f"image-{len(images) + 1}.png"
                files[entry["picture"]] = _picture(image, item)
            if batch.shape != wholes.shape:
                entry["part"] = tuple(batch.shape[2:])
            elif truth is not None:
                entry["true_count"] = len(truth)
            if floor is not None:
                entry["floor_count"] = len(beside[len(images)])
            if item.counts is not None:
                entry["interval"] = item.counts.interval()
            images.append(FoundImage(count=len(item), **entry))
            found.append(_without_masks(item))
            pixels.append(_shown(image))
            if progress is not None:
                progress(len(images))
        if len(images) >= MAX_IMAGES or time.monotonic() - began > _SECONDS:
            break
    else:
        available = len(images)  # damaged ones are left out
    if not images:
        raise InputError("the report needs an image with a known number of objects, and has none")
    groups = _groups(found, pixels, files)
    posteriors = [item.counts for item in found if item.counts is not None]
    result = Objects(
        available=available,
        images=tuple(images),
        interval=(
            CountPosterior.total(posteriors).interval() if len(posteriors) == len(found) else None
        ),
        has_interval=detector.has_intervals,
        confidence=_median([item.scores for item in found]),
        groups=groups,
        floor=_compared(alone, beside) if floor is not None else None,
    )
    files[_FILE] = TypeAdapter(Objects).dump_json(result, indent=1)
    durable.write_folder(run / _FOLDER, files)
    return result


def read_objects(run: Path) -> Objects | None:
    """The result of `write_objects`; None if there is none.

    Raises:
        InputError: it was changed or damaged.
    """
    path = run / _FOLDER / _FILE
    if not path.exists():
        return None
    advice = "remove the folder, or train again"
    try:
        if not path.is_file() or path.stat().st_size > _MAX_BYTES:
            raise InputError(f"{path}: not a list of objects; {advice}")
        return TypeAdapter(Objects).validate_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except ValidationError:
        raise InputError(f"{path}: not a list of objects; {advice}") from None


def _median(scores: list[Tensor]) -> float | None:
    values = torch.cat(scores)
    return float(values.median()) if len(values) else None


def picture_path(run: Path, name: str) -> Path:
    """The file of a picture that a `Objects` names."""
    return run / _FOLDER / name


def _batches(dataset: Dataset) -> Iterator[tuple[list[str], Tensor, list[Truth | None]]]:
    """Names, images [B, 3, H, W] and ground truths, in order; of a folder one whole image each."""
    if isinstance(dataset, ImageFolder):
        for name, _, image, truth in dataset.images():
            yield [name], image[None], [truth]
        return
    end = min(len(dataset), MAX_IMAGES)
    for start in range(0, end, _BATCH_SIZE):
        indices = torch.arange(start, min(start + _BATCH_SIZE, end))
        batch = dataset.batch(indices)
        yield [f"scene {index + 1}" for index in indices.tolist()], batch.images, [*batch.truth()]


def _floor(detector: Detector, dataset: Dataset) -> Detector | None:
    """The classical method for images of a folder that are prepared for it."""
    config = detector.config
    suits = isinstance(dataset, ImageFolder) and config.prepare.contrast != "none"
    return floor_of(detector) if suits and config.model.kind != "watershed" else None


def _compared(found: Sequence[Detections], beside: Sequence[Detections]) -> Floor:
    count = sum(map(len, beside))
    return Floor(name="watershed", count=count, agreement=agreement(found, beside).f1)


def _without_masks(found: Detections) -> Detections:
    return replace(found, label_image=None, labels=None)


def _middle(images: Tensor) -> Tensor:  # [B, 3, H, W]
    """At most 1,024 x 1,024 pixels."""
    height, width = images.shape[2:]
    top, left = max(height - _MAX_SIDE, 0) // 2, max(width - _MAX_SIDE, 0) // 2
    return images[:, :, top : top + _MAX_SIDE, left : left + _MAX_SIDE]


def _picture(image: Tensor, found: Detections) -> bytes:
    height, width = image.shape[1:]
    scale = picture_scale(height, width, _SIDE, _MAX_PICTURE_SIDE)
    return encoded(draw_boxes(image, found, scale, levels=display_levels(image)))


def _shown(image: Tensor) -> Tensor:  # [3, H, W] in [0, 1] -> uint8
    """The image at its display levels."""
    low, high = display_levels(image)
    return ((image - low) / (high - low)).clamp(0, 1).mul(255).round().to(torch.uint8)


def _groups(
    found: Sequence[Detections], pixels: Sequence[Tensor], files: dict[str, bytes]
) -> tuple[Group, ...]:
    """Groups of objects that look alike, the largest first; adds their pictures to `files`."""
    owners = [(b, i) for b, item in enumerate(found) for i in range(len(item))]
    if not owners:
        return ()
    boxes = torch.cat([item.boxes for item in found])
    sides = (boxes[:, 2:] - boxes[:, :2]).amax(1)
    groups = []
    for number, rows in enumerate(grouped(torch.cat([item.what for item in found])), start=1):
        name = f"group-{number}.png"
        crops = [_crop(pixels[owners[row][0]], boxes[row]) for row in rows[:_CROPS]]
        files[name] = encoded(_tiled(crops))
        side = float(sides[rows].median().clamp(0, 1e6))
        groups.append(Group(count=len(rows), side=side, picture=name))
    return tuple(groups)


def _crop(
    pixels: Tensor,  # [3, H, W] uint8
    box: Tensor,  # [4]
) -> Image.Image:
    """A square round the box, inside the image if it fits."""
    height, width = pixels.shape[1:]
    x1, y1, x2, y2 = box.clamp(-width - height, width + height).tolist()
    side = max(_LEAST_CROP, _CROP_MARGIN * max(x2 - x1, y2 - y1))
    side = round(min(side, height, width))
    left = min(max(round((x1 + x2 - side) / 2), 0), width - side)
    top = min(max(round((y1 + y2 - side) / 2), 0), height - side)
    cut = pixels[:, top : top + side, left : left + side]
    tile = Image.fromarray(cut.permute(1, 2, 0).contiguous().numpy())
    way = Image.Resampling.NEAREST if side <= _CROP_SIDE else Image.Resampling.BOX
    return tile.resize((_CROP_SIDE, _CROP_SIDE), way)


def _tiled(tiles: Sequence[Image.Image]) -> Image.Image:
    """Tiles in rows of six, on white."""
    step = _CROP_SIDE + _CROP_GAP
    rows = -(-len(tiles) // _CROP_COLUMNS)
    sheet = Image.new("RGB", (_CROP_COLUMNS * step - _CROP_GAP, rows * step - _CROP_GAP), "white")
    for index, tile in enumerate(tiles):
        sheet.paste(tile, (index % _CROP_COLUMNS * step, index // _CROP_COLUMNS * step))
    return sheet
