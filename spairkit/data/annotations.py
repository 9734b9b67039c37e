"""Reads ground truth in COCO's format from an untrusted file."""

import json
import math
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

import numpy as np
import torch

from spairkit.detections import Truth
from spairkit.errors import InputError
from spairkit.names import printable

_MAX_BYTES = 1 << 28
_MAX_OBJECTS = 10_000
_MAX_ID = 2**53
_MAX_NAME = 4096

NO_AREA = "boxes of no area"
NO_IMAGE = "boxes of images that are not listed"
NO_FILE = "names that are no image of the folder"


@dataclass(frozen=True, eq=False)
class Annotated:
    """One image of the annotation file."""

    image_id: int
    size: tuple[int, int] | None  # height and width, if the file gives them
    truth: Truth | None
    """Boxes and crowds as given, which may leave the image; None if the file has no annotations."""


@dataclass(frozen=True, eq=False)
class Annotations:
    """A COCO file."""

    path: Path
    images: dict[str, Annotated]
    """By `file_name`, relative to the folder of the file, as it is written there."""
    categories: list[int]
    """Ids in the order of the file; without a list of categories, those of the boxes."""
    passed_over: Counter[str]
    """Number of entries that were left out, by the kind."""

    def of_files(self, names: Sequence[str]) -> dict[str, Annotated]:
        """The images by the names of files of the folder, in whichever Unicode form they are.

        Names that fit no file are left out.

        Raises:
            InputError: two entries fit the same file.
        """
        forms: dict[str, str] = {}
        for name in names:
            forms.setdefault(unicodedata.normalize("NFC", name), name)
        exact = set(names)
        found: dict[str, Annotated] = {}
        for name, annotated in self.images.items():
            file = name if name in exact else forms.get(unicodedata.normalize("NFC", name))
            if file is not None and file in found:
                raise InputError(
                    f"{printable(self.path)}: images {found[file].image_id} and "
                    f"{annotated.image_id} are both {file!r}; correct or remove one"
                )
            if file is not None:
                found[file] = annotated
        return found


def read_annotations(path: Path) -> Annotations:
    """The content of a COCO file.

    A box is `bbox`: x, y, width and height in pixels; its label is `category_id`. Regions of crowds
    (`iscrowd` 1) are kept apart. Boxes of no area, crowds without one and boxes of images that are
    not listed are passed over; a size that is no whole number of pixels is taken as not given. A
    file with another mistake is refused; the message names the entry.

    Raises:
        InputError: the file cannot be read, is larger than 256 MiB, or is not COCO JSON; an id is
            missing, negative or not unique; a box has a negative side, or a number that is not
            finite; an image has over 10,000 boxes.
    """
    content = _table(path, "it", _json(path))
    reader = _Reader(path, has_truth=content.get("annotations") is not None)
    readers = {
        "images": reader.add_image,
        "categories": reader.add_category,
        "annotations": reader.add_object,
    }
    for key, add in readers.items():
        entries = content.get(key)
        if entries is None and key != "images":
            continue
        if not isinstance(entries, list):
            raise InputError(f"{printable(path)}: {key} must be a list, as in COCO files")
        for number, entry in enumerate(entries):
            where = f"{key}[{number}]"
            add(where, _table(path, where, entry))
    return reader.annotations()


class _Reader:
    """Takes the entries of one file in turn, and refuses the first mistake."""

    def __init__(self, path: Path, has_truth: bool) -> None:
        self._path = path
        self._has_truth = has_truth
        self._names: dict[str, int] = {}
        self._sizes: dict[int, tuple[int, int] | None] = {}
        self._boxes: dict[int, list[list[float]]] = {}
        self._labels: dict[int, list[int]] = {}
        self._crowds: dict[int, list[list[float]]] = {}
        self._categories: list[int] = []
        self._objects: set[int] = set()
        self._passed_over: Counter[str] = Counter()

    def add_image(self, where: str, entry: dict[str, Any]) -> None:
        number = self._id(where, entry, "id")
        if number in self._sizes:
            self._refuse(where, f"the id {number} is used twice")
        name = self._name(where, entry.get("file_name"))
        if name in self._names:
            self._refuse(where, f"file_name {name!r} is used twice")
        height, width = _whole(entry.get("height")), _whole(entry.get("width"))
        self._names[name] = number
        self._sizes[number] = (height, width) if height and width else None
        self._boxes[number], self._labels[number], self._crowds[number] = [], [], []

    def add_category(self, where: str, entry: dict[str, Any]) -> None:
        number = self._id(where, entry, "id")
        if number not in self._categories:
            self._categories.append(number)

    def add_object(self, where: str, entry: dict[str, Any]) -> None:
        number = self._id(where, entry, "id")
        if number in self._objects:
            self._refuse(where, f"the id {number} is used twice")
        self._objects.add(number)
        image = self._id(where, entry, "image_id")
        label = -1 if entry.get("category_id") is None else self._id(where, entry, "category_id")
        is_crowd = entry.get("iscrowd") or 0
        if is_crowd not in (0, 1):
            self._refuse(where, f"iscrowd must be 0 or 1, got {_brief(is_crowd)}")
        if image not in self._boxes:
            self._passed_over[NO_IMAGE] += 1
            return
        given = entry.get("bbox")
        box = None if is_crowd and not given else self._box(where, given)
        if box is None:
            self._passed_over[NO_AREA] += 1
            return
        boxes = (self._crowds if is_crowd else self._boxes)[image]
        if len(boxes) == _MAX_OBJECTS:
            self._refuse(where, f"image {image} has over {_MAX_OBJECTS:,} boxes")
        boxes.append(box)
        if not is_crowd:
            self._labels[image].append(label)

    def annotations(self) -> Annotations:
        images = {
            name: Annotated(number, self._sizes[number], self._truth(number))
            for name, number in self._names.items()
        }
        labels = sorted({label for labels in self._labels.values() for label in labels} - {-1})
        return Annotations(self._path, images, self._categories or labels, self._passed_over)

    def _truth(self, image: int) -> Truth | None:
        if not self._has_truth:
            return None
        boxes, crowds = (
            torch.tensor(rows[image], dtype=torch.float32).reshape(-1, 4)
            for rows in (self._boxes, self._crowds)
        )
        return Truth(boxes, torch.tensor(self._labels[image], dtype=torch.int64), crowds)

    def _id(self, where: str, entry: dict[str, Any], key: str) -> int:
        value = _whole(entry.get(key))
        if value is None:
            given = _brief(entry.get(key))
            self._refuse(where, f"{key} must be a whole number from 0, got {given}")
        return value

    def _name(self, where: str, value: Any) -> str:
        """The name of a file, in the form of `list_images`."""
        if not isinstance(value, str) or not value or len(value) > _MAX_NAME:
            self._refuse(where, f"file_name must be the name of a file, got {_brief(value)}")
        return PurePosixPath(value).as_posix()

    def _box(self, where: str, value: Any) -> list[float] | None:
        """x1, y1, x2, y2; None if it has no area."""
        if (
            not isinstance(value, list)
            or len(value) != 4
            or any(type(side) not in (int, float) for side in value)
            or not all(abs(side) <= 1e6 for side in value)
        ):
            self._refuse(
                where, f"bbox must be x, y, width and height in pixels, got {_brief(value)}"
            )
        x, y, width, height = map(float, value)
        if width < 0 or height < 0:
            self._refuse(where, f"bbox must have no negative side, got {_brief(value)}")
        # in float32, as boxes are kept, a side may vanish
        if np.float32(x + width) <= np.float32(x) or np.float32(y + height) <= np.float32(y):
            return None
        return [x, y, x + width, y + height]

    def _refuse(self, where: str, reason: str) -> NoReturn:
        raise InputError(f"{printable(self._path)}: {where}: {reason}; correct or remove the entry")


def _whole(value: Any) -> int | None:
    """A number from 0 without a fraction, which some programs write as 72.0; None for others."""
    # a bool is an int to Python
    if type(value) is float and value.is_integer() and value <= _MAX_ID:
        value = int(value)
    return value if type(value) is int and 0 <= value <= _MAX_ID else None


def _json(path: Path) -> Any:
    name = printable(path)
    try:
        if not path.is_file():
            raise InputError(f"{name}: not a regular file")
        if path.stat().st_size > _MAX_BYTES:
            raise InputError(f"{name}: larger than 256 MiB; remove the segmentations")
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except InputError:
        raise
    except (ValueError, RecursionError, MemoryError) as error:
        raise InputError(f"{name}: not JSON: {printable(error)[:200]}") from None
    except OSError as error:
        raise InputError(f"{name}: cannot be read: {error.strerror}") from None


def _table(path: Path, where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{printable(path)}: {where} must be an object, as in COCO files")
    return value


def _brief(value: Any) -> str:
    """The value, shortened for a message."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    text = printable(repr(value)) if not isinstance(value, dict) else "an object"
    return text if len(text) <= 80 else f"{text[:77]}..."
