"""Reads ground truth in COCO's format from an untrusted file."""

import json
import math
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

import numpy as np
import torch

from spairkit.detections import Truth
from spairkit.errors import InputError
from spairkit.images import printable

_MAX_BYTES = 1 << 28
_MAX_OBJECTS = 10_000
_MAX_ID = 2**53
_MAX_NAME = 4096


@dataclass(frozen=True, eq=False)
class Annotated:
    """One image of the annotation file."""

    image_id: int
    size: tuple[int, int] | None  # height and width, if the file gives them
    truth: Truth  # boxes as given; they may leave the image


def read_annotations(path: Path) -> dict[str, Annotated]:
    """The images of a COCO file, by name relative to the folder of the file.

    A box is `bbox`: x, y, width and height in pixels; its label is `category_id`. Crowd regions
    (`iscrowd` 1) are left out. A file with a mistake is refused; the message names the entry.

    Raises:
        InputError: the file cannot be read, is larger than 256 MiB, or is not COCO JSON; an id is
            missing, negative or not unique; a name leaves the folder; a box has a side that is not
            positive, or a number that is not finite; an image has over 10,000 boxes.
    """
    content = _table(path, "it", _json(path))
    reader = _Reader(path)
    readers = {
        "images": reader.add_image,
        "categories": reader.add_category,
        "annotations": reader.add_object,
    }
    for key, add in readers.items():
        entries = content.get(key, [] if key == "categories" else None)
        if not isinstance(entries, list):
            raise InputError(f"{printable(path)}: {key} must be a list, as in COCO files")
        for number, entry in enumerate(entries):
            where = f"{key}[{number}]"
            add(where, _table(path, where, entry))
    return reader.annotated()


class _Reader:
    """Takes the entries of one file in turn, and refuses the first mistake."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._root = path.parent.resolve()
        self._names: dict[str, int] = {}
        self._sizes: dict[int, tuple[int, int] | None] = {}
        self._boxes: dict[int, list[list[float]]] = {}
        self._labels: dict[int, list[int]] = {}
        self._categories: set[int] = set()
        self._objects: set[int] = set()

    def add_image(self, where: str, entry: dict[str, Any]) -> None:
        number = self._id(where, entry, "id")
        if number in self._sizes:
            self._refuse(where, f"the id {number} is used twice")
        name = self._name(where, entry.get("file_name"))
        if name in self._names:
            self._refuse(where, f"file_name {name!r} is used twice")
        size = None
        if "height" in entry or "width" in entry:
            size = self._id(where, entry, "height"), self._id(where, entry, "width")
        self._names[name], self._sizes[number] = number, size
        self._boxes[number], self._labels[number] = [], []

    def add_category(self, where: str, entry: dict[str, Any]) -> None:
        self._categories.add(self._id(where, entry, "id"))

    def add_object(self, where: str, entry: dict[str, Any]) -> None:
        number = self._id(where, entry, "id")
        if number in self._objects:
            self._refuse(where, f"the id {number} is used twice")
        self._objects.add(number)
        image = self._id(where, entry, "image_id")
        if image not in self._boxes:
            self._refuse(where, f"image_id {image} is not among the images")
        label = self._id(where, entry, "category_id")
        if label not in self._categories:
            self._refuse(where, f"category_id {label} is not among the categories")
        if entry.get("iscrowd", 0) not in (0, 1):
            self._refuse(where, f"iscrowd must be 0 or 1, got {_brief(entry['iscrowd'])}")
        box = self._box(where, entry.get("bbox"))
        if entry.get("iscrowd", 0) == 1:
            return
        if len(self._boxes[image]) == _MAX_OBJECTS:
            self._refuse(where, f"image {image} has over {_MAX_OBJECTS:,} boxes")
        self._boxes[image].append(box)
        self._labels[image].append(label)

    def annotated(self) -> dict[str, Annotated]:
        return {
            name: Annotated(
                number,
                self._sizes[number],
                Truth(
                    torch.tensor(self._boxes[number], dtype=torch.float32).reshape(-1, 4),
                    torch.tensor(self._labels[number], dtype=torch.int64),
                ),
            )
            for name, number in self._names.items()
        }

    def _id(self, where: str, entry: dict[str, Any], key: str) -> int:
        value = entry.get(key)
        # a bool is an int to Python
        if type(value) is not int or not 0 <= value <= _MAX_ID:
            self._refuse(where, f"{key} must be a whole number from 0, got {_brief(value)}")
        return value

    def _name(self, where: str, value: Any) -> str:
        """The name of a file in the folder, as `list_images` gives it."""
        if not isinstance(value, str) or not value or len(value) > _MAX_NAME:
            self._refuse(where, f"file_name must be the name of a file, got {_brief(value)}")
        path = PurePosixPath(value)
        if path.is_absolute() or ".." in path.parts:
            self._refuse(where, f"file_name {_brief(value)} leaves the folder")
        try:
            file = (self._root / path).resolve()
            there = file.is_relative_to(self._root) and file.is_file()
        except (OSError, RuntimeError, ValueError):
            there = False
        if not there:
            self._refuse(
                where, f"file_name {_brief(value)} is not a file in the folder, or a link out of it"
            )
        return path.as_posix()

    def _box(self, where: str, value: Any) -> list[float]:
        """x1, y1, x2, y2 of a box with an area."""
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
        # in float32, as boxes are kept, a side may vanish
        if not (np.float32(x + width) > np.float32(x) and np.float32(y + height) > np.float32(y)):
            self._refuse(where, f"bbox must have a width and height above 0, got {_brief(value)}")
        return [x, y, x + width, y + height]

    def _refuse(self, where: str, reason: str) -> NoReturn:
        raise InputError(f"{printable(self._path)}: {where}: {reason}; correct or remove the entry")


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
