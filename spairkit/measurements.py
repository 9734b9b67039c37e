"""Position, size, shape and intensities of each object of an image, as columns of numbers."""

import math
from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from spairkit.images import num_channels, to_colour

Column = NDArray[np.float64]

COLOURS = ("red", "green", "blue")
INTENSITIES = ("mean", "sum", "corrected_mean")
"""Columns of grey images; those of others end in `_red`, `_green` and `_blue`."""

_STRIP_PIXELS = 1 << 20
_AROUND = 0.5  # of the longer side of a box: the background is taken from so far around it
_LEAST_AROUND = 5.0  # px
_PIXEL_MOMENT = 1 / 12  # second moment of a square of side 1 about its centre


def measurements(
    boxes: Tensor,  # [n, 4] xyxy, px
    scores: Tensor,  # [n]
    masks: tuple[Tensor, Tensor] | None,  # [H, W] int32, [n] int32
    image: Tensor | None,  # [1 or 3, H, W], as `images.read_pixels` gives it
    pixel_size: tuple[float, float] | None,  # width and height of a pixel, µm
) -> dict[str, Column]:  # each [n] float64
    """The columns of `Detections.measurements`, where they are described.

    Raises:
        ValueError: the image has another size than the label image.
    """
    x1, y1, x2, y2 = boxes.double().numpy().T
    columns = {"x": (x1 + x2) / 2, "y": (y1 + y2) / 2, "x1": x1, "y1": y1, "x2": x2, "y2": y2}
    columns["score"] = scores.double().numpy()
    absent = np.full(len(boxes), np.nan)
    area, eccentricity = absent, absent
    if masks is not None:
        area, eccentricity = _shapes(*masks, columns["x"], columns["y"])
    columns |= {"area": area, "equivalent_diameter": _diameter(area), "eccentricity": eccentricity}
    if masks is None or image is None:
        columns |= dict.fromkeys(INTENSITIES, absent)
    else:
        columns |= _intensities(*masks, boxes, area, image)
    if pixel_size is not None:
        width, height = pixel_size
        size = area * width * height
        columns |= {"x_um": columns["x"] * width, "y_um": columns["y"] * height}
        columns |= {"width_um": (x2 - x1) * width, "height_um": (y2 - y1) * height}
        columns |= {"area_um2": size, "equivalent_diameter_um": _diameter(size)}
    return columns


def by_colour(columns: Mapping[str, Column]) -> dict[str, Column]:
    """The columns with intensities by colour; those of a grey image are three times the same."""
    chosen: dict[str, Column] = {}
    for name, column in columns.items():
        names = [f"{name}_{colour}" for colour in COLOURS] if name in INTENSITIES else [name]
        chosen |= dict.fromkeys(names, column)
    return chosen


def _diameter(area: Column) -> Column:
    """Of the disc of this area."""
    return np.sqrt(4 / math.pi * area)


def _shapes(
    label_image: Tensor, labels: Tensor, x: Column, y: Column
) -> tuple[Column, Column]:  # [n], [n]
    """Areas in pixels, and eccentricities, NaN without a pixel; x and y are near the masks."""
    width = label_image.shape[1]
    number, rows = _table(label_image, labels)
    near = np.zeros((2, number))
    near[:, rows] = x, y  # offsets from there are small, and their squares exact enough
    sums = np.zeros((6, number))
    for strip in _strips(label_image):
        values = label_image[strip].numpy().ravel()
        at = np.flatnonzero(values)
        values = values[at]
        dx = at % width + 0.5 - near[0, values]
        dy = at // width + strip.start + 0.5 - near[1, values]
        for total, weights in zip(sums, (None, dx, dy, dx * dx, dy * dy, dx * dy), strict=True):
            total += np.bincount(values, weights, number)
    area, *moments = sums[:, rows]
    with np.errstate(invalid="ignore"):
        mx, my, xx, yy, xy = (moment / area for moment in moments)
    xx, yy, xy = xx - mx * mx + _PIXEL_MOMENT, yy - my * my + _PIXEL_MOMENT, xy - mx * my
    # the eigenvalues are middle + half and middle - half
    middle, half = (xx + yy) / 2, np.hypot((xx - yy) / 2, xy)
    return area, np.sqrt(np.clip(2 * half / (middle + half), 0, 1))


def _intensities(
    label_image: Tensor, labels: Tensor, boxes: Tensor, area: Column, image: Tensor
) -> dict[str, Column]:
    """Mean, sum and mean above the background, of each channel."""
    if image.shape[1:] != label_image.shape:
        raise ValueError(
            f"the image must be as large as the masks, {list(label_image.shape)}, "
            f"got {list(image.shape[1:])}"
        )
    colours = 1 if image.shape[0] == 1 else int(num_channels(image[None]))
    number, rows = _table(label_image, labels)
    height, width = label_image.shape
    x1, y1, x2, y2 = _around(boxes, height, width)
    sums = np.zeros((colours, number))
    around = np.zeros((colours + 1, len(boxes)))  # the number of free pixels, and their sums
    above = np.zeros((colours + 1, width + 1))
    for strip in _strips(label_image):
        values = label_image[strip].numpy()
        pixels = to_colour(image[:, strip])[:colours].double().numpy()
        at = np.flatnonzero(values)
        for total, channel in zip(sums, pixels, strict=True):
            total += np.bincount(values.ravel()[at], channel.ravel()[at], number)
        # sums over all rows above and all columns to the left; a box needs their four corners
        free = (values == 0).astype(np.float64)
        table = np.zeros((colours + 1, len(values) + 1, width + 1))
        table[0, 1:, 1:] = free
        np.multiply(pixels, free, out=table[1:, 1:, 1:])
        np.cumsum(table, axis=1, out=table)
        np.cumsum(table, axis=2, out=table)
        table += above[:, None]
        above = table[:, -1].copy()
        for edge, sign in ((y2, 1), (y1, -1)):
            here = np.flatnonzero((edge > strip.start) & (edge <= strip.start + len(values)))
            row = edge[here] - strip.start
            around[:, here] += sign * (table[:, row, x2[here]] - table[:, row, x1[here]])
    with np.errstate(invalid="ignore"):
        means = sums[:, rows] / area
        corrected = means - around[1:] / around[0]
    found = zip(INTENSITIES, (means, sums[:, rows], corrected), strict=True)
    if colours == 1:
        return {name: channels[0] for name, channels in found}
    return {
        f"{name}_{colour}": channel
        for name, channels in found
        for colour, channel in zip(COLOURS, channels, strict=True)
    }


def _around(boxes: Tensor, height: int, width: int) -> NDArray[np.int64]:  # [4, n]
    """The boxes with what is around them, in whole pixels inside the image."""
    corners = boxes.double().numpy()
    longer = (corners[:, 2:] - corners[:, :2]).max(1)
    margin = np.maximum(_AROUND * longer, _LEAST_AROUND)[:, None]
    low, high = np.floor(corners[:, :2] - margin), np.ceil(corners[:, 2:] + margin)
    whole = np.concatenate([low, high], axis=1).clip(0, [width, height, width, height])
    return whole.T.astype(np.int64)


def _table(label_image: Tensor, labels: Tensor) -> tuple[int, NDArray[np.int64]]:
    """The length of a table that is indexed by labels, and the rows of the objects in it."""
    rows = labels.numpy().astype(np.int64)
    return int(np.max(rows, initial=int(label_image.max()))) + 1, rows


def _strips(label_image: Tensor) -> Iterator[slice]:
    """Rows that are worked on together, so that little memory is needed besides the image."""
    height, width = label_image.shape
    step = max(_STRIP_PIXELS // width, 1)
    return (slice(top, top + step) for top in range(0, height, step))
