"""Tiles of an image that is too large to be searched at once, and their objects as one result.

Tiles overlap by a halo on each side. An object belongs to the tile whose core holds its centre; the
cores cover the image and do not overlap.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from spairkit.boxes import box_iou
from spairkit.counts import CountPosterior
from spairkit.detections import Detections, Explanation

WHOLE_PIXELS = 1 << 20
"""Images of at most so many pixels are not cut."""

_CORE = 480  # greatest side of a core, px
_HALO = 72  # px, six objects of typical size
_SAME_PX = 3.0  # between the centres of one object as two tiles see it, at most
_SAME_IOU = 0.3  # of the boxes of one object as two tiles see it, at least


@dataclass(frozen=True)
class Tile:
    """A part of an image; lengths in pixels of the image."""

    rows: slice
    columns: slice
    core: tuple[int, int, int, int]
    """xyxy, half-open, inside the tile."""

    @property
    def corner(self) -> Tensor:  # [4]
        """x and y of the upper left corner, twice: the shift of a box."""
        return torch.tensor([self.columns.start, self.rows.start] * 2, dtype=torch.float32)

    @property
    def inner(self) -> tuple[int, int, int, int]:
        """The core, in pixels of the tile."""
        x1, y1, x2, y2 = self.core
        top, left = self.rows.start, self.columns.start
        return x1 - left, y1 - top, x2 - left, y2 - top

    def of(self, image: Tensor) -> Tensor:  # [..., H, W] -> [..., h, w]
        """The tile's pixels, as a view."""
        return image[..., self.rows, self.columns]

    def holds(self, boxes: Tensor) -> Tensor:  # [..., 4] xyxy in the image -> [...] bool
        """Whether the centres lie in the core."""
        x, y = centres(boxes)
        x1, y1, x2, y2 = self.core
        return (x >= x1) & (x < x2) & (y >= y1) & (y < y2)


def centres(boxes: Tensor) -> tuple[Tensor, Tensor]:  # [..., 4] -> [...], [...]
    """x and y of the centres of boxes xyxy."""
    return (boxes[..., 0] + boxes[..., 2]) / 2, (boxes[..., 1] + boxes[..., 3]) / 2


def tiles_of(height: int, width: int, cell: int) -> list[Tile]:
    """The tiles of an image in raster order, with corners at multiples of `cell`, px.

    Their cells are cells of the whole image.
    """
    return [
        Tile(rows, columns, (x1, y1, x2, y2))
        for rows, y1, y2 in _spans(height, cell)
        for columns, x1, x2 in _spans(width, cell)
    ]


def _spans(length: int, cell: int) -> list[tuple[slice, int, int]]:
    """The extent of each tile on one axis, and the ends of its core."""
    number = -(-length // _CORE)
    ends = [round(i * length / number / cell) * cell for i in range(number)] + [length]
    halo = -(-_HALO // cell) * cell
    return [
        (slice(max(start - halo, 0), min(stop + halo, length)), start, stop)
        for start, stop in pairwise(ends)
    ]


class Mosaic:
    """Puts the objects of tiles together; `add` takes the tiles in raster order."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size
        """Height and width of the whole image, px."""
        self._label_image: Tensor | None = None
        self._parts: list[Detections] = []
        self._counts: list[CountPosterior] = []
        self._appearances: list[Tensor] = []
        self._drawn: Tensor | None = None
        self._number = 0

    def add(self, tile: Tile, found: Detections) -> Tensor:  # [m] int64
        """Takes the objects of a tile, and gives the rows of those that are its own.

        An object on a seam may have its centre in both cores, or in neither: cores are taken to
        reach 3 px farther, and an object that another tile has given already is left out.
        """
        boxes = found.boxes + tile.corner
        own = self._reaching(tile).holds(boxes) & ~self._known(boxes)
        rows = own.nonzero()[:, 0]
        labels = None
        if found.label_image is not None and found.labels is not None:
            labels = self._number + torch.arange(1, len(rows) + 1, dtype=torch.int32)
            self._paste(tile, found.label_image, found.labels[rows], labels)
        self._number += len(rows)
        part = Detections(boxes[rows], found.scores[rows], found.what[rows], found.depth[rows])
        self._parts.append(part)
        self._counts += [] if found.counts is None else [found.counts]
        return rows

    def add_explained(self, tile: Tile, explained: Explanation) -> None:
        """As `add`, with the appearances and the reconstruction."""
        rows = self.add(tile, explained.detections)
        self._appearances.append(explained.appearances[rows])
        if self._drawn is None:
            self._drawn = torch.zeros(3, *self.size)
        x1, y1, x2, y2 = tile.core
        left, top, right, bottom = tile.inner
        self._drawn[:, y1:y2, x1:x2] = explained.reconstruction[:, top:bottom, left:right]

    def found(self) -> Detections:
        """The objects of the whole image."""
        names = ("boxes", "scores", "what", "depth")
        fields: dict[str, Any] = {
            name: torch.cat([getattr(part, name) for part in self._parts]) for name in names
        }
        found = Detections(**fields)
        if self._label_image is not None:
            labels = torch.arange(1, len(found) + 1, dtype=torch.int32)
            found = replace(found, label_image=self._label_image, labels=labels)
        counts = CountPosterior.total(self._counts) if self._counts else None
        return replace(found, counts=counts)

    def explained(self, image: Tensor) -> Explanation:
        """The explanation of the whole image."""
        assert self._drawn is not None
        return Explanation(self.found(), image, self._drawn, torch.cat(self._appearances))

    def _reaching(self, tile: Tile) -> Tile:
        """The tile with a core that reaches over its seams, and beyond the edges of the image."""
        height, width = self.size
        x1, y1, x2, y2 = tile.core
        far = max(self.size)
        reach = round(_SAME_PX)
        core = (
            x1 - reach if x1 else -far,
            y1 - reach if y1 else -far,
            x2 + reach if x2 < width else 2 * far,
            y2 + reach if y2 < height else 2 * far,
        )
        return replace(tile, core=core)

    def _known(self, boxes: Tensor) -> Tensor:  # [n, 4] -> [n] bool
        """Whether another tile has given the object."""
        given = torch.cat([part.boxes for part in self._parts] or [boxes[:0]])
        if not len(given) or not len(boxes):
            return torch.zeros(len(boxes), dtype=torch.bool)
        low, high = boxes[:, :2].amin(0), boxes[:, 2:].amax(0)
        given = given[((given[:, 2:] > low) & (given[:, :2] < high)).all(1)]
        apart = [a[:, None] - b for a, b in zip(centres(boxes), centres(given), strict=True)]
        near = torch.maximum(apart[0].abs(), apart[1].abs()) <= _SAME_PX
        return (near & (box_iou(boxes, given) >= _SAME_IOU)).any(1)

    def _paste(self, tile: Tile, label_image: Tensor, old: Tensor, new: Tensor) -> None:
        """Gives the pixels of objects their labels; in its core a tile's pixels come first."""
        if self._label_image is None:
            self._label_image = torch.zeros(self.size, dtype=torch.int32)
        most = max(int(label_image.max()), int(old.max()) if len(old) else 0)
        table = torch.zeros(most + 1, dtype=torch.int32)
        table[old.long()] = new
        pixels = table[label_image.long()]
        before = tile.of(self._label_image)
        left, top, right, bottom = tile.inner
        core = torch.zeros_like(pixels, dtype=torch.bool)
        core[top:bottom, left:right] = True
        before.copy_(torch.where((pixels > 0) & (core | (before == 0)), pixels, before))


def elsewhere(tiles: Sequence[Tile], boxes: Sequence[Tensor]) -> list[int]:
    """The number of objects of the image outside of each tile, halo included.

    Args:
        boxes: of the objects of each tile, [n, 4] xyxy in pixels of the tile.
    """
    own = [
        int(tile.holds(part + tile.corner).sum()) for tile, part in zip(tiles, boxes, strict=True)
    ]
    return [max(sum(own) - len(part), 0) for part in boxes]
