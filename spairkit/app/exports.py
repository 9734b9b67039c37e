"""The corrected objects of a folder as COCO JSON or CSV, piece by piece."""

import csv
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as checked

from spairkit.app.corrections import Corrections
from spairkit.app.finder import Found

_COLUMNS = ("image", "image_id", "x1", "y1", "x2", "y2", "score", "area", "cluster", "added")
_CATEGORY = {"id": 1, "name": "object", "supercategory": ""}

_Number = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]


@checked(config=ConfigDict(extra="forbid"), frozen=True, kw_only=True)
class Filter:
    """Which objects are shown, counted and exported; boxes that were added always are."""

    threshold: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Confidences are above it."""
    least: _Number = 0.0
    """Sides (see `Found.sides`) are at least this, px."""
    largest: _Number = 1e9
    """Sides are at most this, px."""
    without: Annotated[frozenset[Annotated[int, Field(ge=1, le=100)]], Field(max_length=100)] = (
        frozenset()
    )
    """Groups that are left out."""

    def kept(
        self, found: Found, groups: list[int], corrections: Corrections
    ) -> npt.NDArray[np.int64]:
        """The rows of the objects that remain, those taken away left out."""
        keeps = (found.scores > self.threshold) & (found.sides >= self.least)
        keeps &= found.sides <= self.largest
        if groups:
            keeps &= ~np.isin(groups, list(self.without))
        keeps[[row for row in corrections.covers(found.boxes) if row is not None]] = False
        return np.flatnonzero(keeps)


@dataclass(frozen=True)
class ImageObjects:
    """The objects of one image as they are exported."""

    number: int
    """Its id, from 1."""
    name: str
    found: Found
    rows: npt.NDArray[np.int64]
    """Of the objects in `found` that are kept."""
    groups: list[int]
    """Of each object in `found`; empty if they are not known."""
    segmentations: list[dict[str, Any]]
    """Masks of each object in `found`; empty if the model gives none."""
    added: tuple[tuple[float, float, float, float], ...]


def coco(images: Iterator[ImageObjects], sizes: list[dict[str, Any]]) -> Iterator[str]:
    """Annotations in COCO's form, in pieces.

    Objects have masks as compressed RLE; boxes that were added, and those of a model without masks,
    have their rectangle as polygon, as pycocotools gives boxes. A found object has its `score`.

    Args:
        images: the objects.
        sizes: the entries of `images`.
    """
    yield '{"info": {"description": "objects found and corrected with spairkit"},\n"images": '
    yield json.dumps(sizes)
    yield f',\n"categories": {json.dumps([_CATEGORY])},\n"annotations": ['
    number = 0
    for image in images:
        entries = []
        for row in image.rows.tolist():
            entry = _box(image.found.boxes[row].tolist())
            if image.segmentations:
                area = int(image.found.areas[row])
                entry |= {"segmentation": image.segmentations[row], "area": area}
            entries.append(entry | {"score": float(image.found.scores[row])})
        entries += [_box(list(box)) for box in image.added]
        for entry in entries:
            number += 1
            whole = {"id": number, "image_id": image.number, "category_id": 1, "iscrowd": 0} | entry
            yield f"{',' if number > 1 else ''}\n{json.dumps(whole)}"
    yield "]}\n"


def table(images: Iterator[ImageObjects]) -> Iterator[str]:
    """CSV, a line for each object, in pieces; what is not known is empty."""
    yield _lines([_COLUMNS])
    for image in images:
        rows: list[tuple[object, ...]] = []
        for row in image.rows.tolist():
            area = image.found.areas[row] if len(image.found.areas) else ""
            cluster = image.groups[row] if image.groups else ""
            box, score = image.found.boxes[row].tolist(), image.found.scores[row]
            rows.append((image.name, image.number, *box, score, area, cluster, 0))
        rows += [(image.name, image.number, *box, "", "", "", 1) for box in image.added]
        yield _lines(rows)


def _box(corners: list[float]) -> dict[str, Any]:
    x1, y1, x2, y2 = corners
    width, height = round(x2 - x1, 2), round(y2 - y1, 2)
    return {
        "bbox": [x1, y1, width, height],
        "area": round(width * height, 2),
        "segmentation": [[x1, y1, x2, y1, x2, y2, x1, y2]],
    }


def _lines(rows: Iterable[Iterable[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
