"""Corrections of what a model finds: boxes taken away and boxes added, kept in one JSON file.

They are boxes and no numbers of objects, so they hold for another model, too. The file is
untrusted.
"""

import os
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from spairkit.boxes import box_iou
from spairkit.errors import InputError
from spairkit.names import printable
from spairkit.storage import durable

MAX_BOXES = 10_000
"""Boxes taken away, and boxes added, of one image; `data.annotations` reads no more."""

CORRECTIONS = "spairkit-corrections.json"
"""The name of the file of corrections, in the folder of images."""

_MAX_BYTES = 1 << 28
_MAX_IMAGES = 1_000_000
_MOST = 1e6  # px
_SAME = 0.5  # IoU of two boxes of one object, at least

_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

Coordinate = Annotated[float, Field(ge=-_MOST, le=_MOST)]
Corners = tuple[Coordinate, Coordinate, Coordinate, Coordinate]


def _with_area(box: Corners) -> Corners:
    if not (box[0] < box[2] and box[1] < box[3]):
        raise ValueError("a box must be left, top, right and bottom, and have an area")
    return box


Box = Annotated[Corners, AfterValidator(_with_area)]
"""x1, y1, x2, y2 in pixels of the upright file; an area above 0."""

Boxes = Annotated[tuple[Box, ...], Field(max_length=MAX_BOXES)]


@dataclass(config=_STRICT, frozen=True, kw_only=True)
class Corrections:
    """Those of one image."""

    removed: Boxes = ()
    """Boxes of objects that are none."""
    added: Boxes = ()
    """Boxes of objects that were not found."""

    def covers(
        self,
        boxes: npt.NDArray[np.float64],  # [n, 4] xyxy
    ) -> list[int | None]:
        """The row of the box found that each removed box, then each added one, stands for.

        It is the one of the largest IoU, if that reaches .5, and if no correction before it stands
        for it. What is found and stood for is not an object, or counts as the box that was added.
        """
        free = np.ones(len(boxes), bool)
        known = torch.from_numpy(boxes)
        rows: list[int | None] = []
        for box in (*self.removed, *self.added):
            row = None
            if free.any():
                iou = box_iou(torch.tensor([box], dtype=torch.float64), known)[0].numpy()
                iou = np.where(free, iou, 0.0)
                best = int(iou.argmax())
                if iou[best] >= _SAME:
                    row, free[best] = best, False
            rows.append(row)
        return rows


@dataclass(config=_STRICT, frozen=True, kw_only=True)
class _File:
    content: Literal["spairkit corrections"]
    version: Literal[1]
    images: Annotated[
        dict[Annotated[str, Field(max_length=1 << 16)], Corrections],
        Field(max_length=_MAX_IMAGES),
    ]


_ADAPTER = TypeAdapter(_File)


class CorrectionsFile:
    """The corrections of a folder of images, read at once and written at each change.

    Those of images that are not in the folder are kept.

    Args:
        path: of the file, which may be missing.

    Raises:
        InputError: it cannot be read, is larger than 256 MiB, or holds something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._images: dict[str, Corrections] = {}
        self._seen = self._state()
        if self._seen is None:
            return
        name = printable(path)
        if not path.is_file() or path.stat().st_size > _MAX_BYTES:
            raise InputError(f"{name}: not a file of corrections; name another with --out")
        try:
            self._images = _ADAPTER.validate_json(path.read_bytes()).images
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part)[:200] for part in first["loc"])
            raise InputError(
                f"{name}: not corrections by spairkit: {f'{where}: ' if where else ''}"
                f"{first['msg'][:200]}; correct or remove it, or name another with --out"
            ) from None
        except OSError as error:
            raise InputError(f"{name}: cannot be read: {error.strerror}") from None

    def of(self, name: str) -> Corrections:
        """The corrections of an image, by its path in the folder."""
        return self._images.get(name, Corrections())

    def put(self, name: str, corrections: Corrections) -> None:
        """Takes over the corrections of an image; they are on the disk when this returns.

        Raises:
            InputError: the file cannot be written, or another program has changed it. Nothing has
                changed then.
        """
        if self._state() != self._seen:
            raise InputError(
                f"{self.path}: was changed by another program; start spairkit app again to read it"
            )
        images = {key: value for key, value in self._images.items() if key != name}
        if corrections != Corrections():
            images[name] = corrections
        file = _File(content="spairkit corrections", version=1, images=images)
        durable.write_bytes(self.path, _ADAPTER.dump_json(file) + b"\n")
        self._images, self._seen = images, self._state()

    def _state(self) -> tuple[int, int, int] | None:
        """Tells one version of the file from another; None if there is no file."""
        try:
            status = os.stat(self.path)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read: {error.strerror}") from None
        return status.st_ino, status.st_mtime_ns, status.st_size
