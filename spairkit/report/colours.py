"""The colours of objects in pictures: few, and neighbours differ."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

Colour = tuple[int, int, int]

COLOURS = (
    (86, 180, 233),
    (230, 159, 0),
    (0, 186, 140),
    (240, 228, 66),
    (255, 122, 64),
    (222, 145, 190),
)
"""Colours of the objects on dark images: the lighter ones of Okabe and Ito, which colour-blind
people can tell apart, with green, vermilion and purple lightened."""

DARK_COLOURS = (
    (0, 92, 150),
    (190, 80, 0),
    (0, 110, 80),
    (110, 95, 0),
    (200, 30, 20),
    (150, 50, 115),
)
"""Those on bright images: darker ones of the same hues."""

_BRIGHT = 140  # median of the grey levels from 0 to 255
_NEAR = 0.5  # of the median side of the boxes: neighbours have smaller gaps


def object_colours(
    boxes: Tensor,  # [n, 4] xyxy in pixels
    picture: Image.Image,
    wanted: npt.NDArray[np.int64] | None = None,  # [n]
) -> list[Colour]:  # n
    """A colour for each object that stands out from the picture; arguments as `colour_numbers`."""
    known = palette(picture)
    return [known[number] for number in colour_numbers(boxes, wanted).tolist()]


def palette(picture: Image.Image) -> Sequence[Colour]:
    """Colours that stand out from the picture."""
    bright = float(np.median(np.asarray(picture.convert("L")))) > _BRIGHT
    return DARK_COLOURS if bright else COLOURS


def colour_numbers(
    boxes: Tensor,  # [n, 4] xyxy in pixels
    wanted: npt.NDArray[np.int64] | None = None,  # [n]
) -> npt.NDArray[np.int64]:  # [n]
    """A number of `COLOURS` for each object, such that neighbours have different ones.

    Objects are coloured from left to right, each with the colour that it wants, or else the next
    one that no neighbour has. If neighbours have all, it takes that of the farthest of them.
    Neighbours are boxes with a gap of less than half of the median side.

    Args:
        boxes: one that is empty or not finite has no neighbours.
        wanted: taken modulo the number of colours; None: 0, 1, 2 and so on.
    """
    corners: npt.NDArray[np.float64] = boxes.detach().cpu().double().numpy().reshape(-1, 4)
    number = len(corners)
    chosen = (np.arange(number) if wanted is None else wanted) % len(COLOURS)
    rows = np.flatnonzero(np.isfinite(corners).all(1))
    rows = rows[np.all(corners[rows, 2:] > corners[rows, :2], axis=1)]
    rows = rows[np.argsort(corners[rows, 0], kind="stable")]
    x1, y1, x2, y2 = corners[rows].T
    near = _NEAR * float(np.median([x2 - x1, y2 - y1])) if len(rows) else 0.0
    ends = np.searchsorted(x1, x2 + near)
    # from each box to the nearest one of each colour, px
    away = np.full((len(rows), len(COLOURS)), np.inf)
    for i, row in enumerate(rows.tolist()):
        order = np.roll(away[i], -chosen[row])
        chosen[row] = (chosen[row] + int(order.argmax())) % len(COLOURS)
        later = slice(i + 1, int(ends[i]))  # by x alone; most are above or below
        down = np.maximum(y1[later] - y2[i], y1[i] - y2[later])
        beside = np.flatnonzero(down < near)
        gap = np.maximum(down[beside], x1[later][beside] - x2[i]).clip(0)
        place = i + 1 + beside, chosen[row]
        away[place] = np.minimum(away[place], gap)
    return chosen
