"""Folders of images drawn by code, of three kinds that real folders have, with known boxes.

    image, boxes = drawn("cells", seed=0, index=3)
    encoded("cells", image)  # the bytes of its file

`cells`: grey TIFF of 16 bits. Cells of 18 to 28 px, some of which touch, glow on a background that
is not evenly lit.
`sprites`: PNG with colour and alpha. Sprites of 10 to 30 px, of six shapes and colours, lie on a
textured ground.
`brightfield`: JPEG. One slide of 3000 x 2000 px with 1,500 stained discs of 30 to 44 px, darker
than the light behind them.

Beside the images lie two files that spairkit has to pass over (`BESIDE`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Draws = np.random.Generator

BESIDE = {
    "broken.png": b"\x89PNG\r\n\x1a\n" + 64 * b"0",
    "notes.txt": b"Images made by `spairkit data make`. broken.png is broken on purpose.\n",
}
"""Contents of a damaged image and of a file that is no image, by name."""

_ROUNDS = 200  # of placing the objects that found no place before
_BLUR, _NOISE = 1.2, 60.0  # of cells: px, and steps of 16 bits
_RIM = 1.15  # squared radius at which the light of a cell ends
_TEXELS = 8  # of the side of a sprite
_SHEET_SEED = 0  # sprites are the same for every seed
_COLOURS = 6
_STAIN = (0.45, 0.3, 0.55)  # red, green, blue
_QUALITY = 88  # of JPEG


@dataclass(frozen=True)
class Kind:
    """One kind of images."""

    about: str
    """A line for users."""
    category: str
    """The name of an object."""
    suffix: str
    """Of the files."""
    size: tuple[int, int]
    """Height and width, px."""
    count: int
    """Number of images that make a folder to train on."""
    draw: Callable[[Draws, tuple[int, int]], tuple[Array, Array]]
    """Draws an image of a size, and boxes [n, 4]."""


def drawn(kind: str, seed: int, index: int) -> tuple[Array, Array]:
    """An image and its boxes, as a pure function of the arguments.

    Args:
        kind: a key of `KINDS`.
        seed: from 0.
        index: of the image, from 0.

    Returns:
        The image: [H, W] uint16, [H, W, 4] uint8 or [H, W, 3] uint8. The boxes: [n, 4] int64, left,
        top, right, bottom, half-open, px; tight around the object before it is blurred.
    """
    chosen = KINDS[kind]
    return chosen.draw(np.random.default_rng((seed, index)), chosen.size)


def encoded(kind: str, image: Array) -> bytes:
    """The bytes of the file of an image that `drawn` has made."""
    buffer = BytesIO()
    form = {".tif": "TIFF", ".png": "PNG", ".jpg": "JPEG"}[KINDS[kind].suffix]
    options = {"quality": _QUALITY} if form == "JPEG" else {}
    Image.fromarray(image).save(buffer, form, **options)
    return buffer.getvalue()


def _cells(draws: Draws, size: tuple[int, int]) -> tuple[Array, Array]:
    height, width = size
    y, x = np.arange(height)[:, None] / height, np.arange(width) / width
    image = 1800 + 1500 * x + 900 * np.sin(2.5 * y)
    sides = draws.uniform(18, 28, 32)
    centres, sides = _placed(draws, size, sides, 0.9)
    radii, corner = _ellipses(draws, centres, sides, 1.4)
    peaks = draws.uniform(700, 2200, (len(sides), 1, 1))
    light = peaks * np.sqrt(np.clip(_RIM - radii, 0, 1))
    _onto(image, light, corner, np.add)
    image = ndimage.gaussian_filter(image, _BLUR) + draws.normal(0, _NOISE, size)
    return np.clip(image, 0, 65535).astype(np.uint16), _boxes(radii < 1, corner)


def _sprites(draws: Draws, size: tuple[int, int]) -> tuple[Array, Array]:
    texture = ndimage.gaussian_filter(draws.normal(0, 1, size), 3)[..., None]
    image = np.array([0.32, 0.36, 0.30]) + 0.03 * texture / texture.std()
    image += draws.normal(0, 0.012, (*size, 3))
    sides = draws.integers(10, 31, draws.integers(12, 28))
    # so far apart that not even corners meet
    centres, sides = _placed(draws, size, sides, np.sqrt(2))
    corner = np.floor(centres - sides[:, None] / 2).astype(int)
    shapes, colours = _sheet()
    chosen = draws.integers(len(shapes), size=len(sides))
    offset = np.arange(sides.max())
    inside = offset < sides[:, None]  # [n, S]
    texel = np.minimum(offset * _TEXELS // sides[:, None], _TEXELS - 1)
    rows, columns = texel[:, :, None], texel[:, None, :]
    masks = shapes[chosen[:, None, None], rows, columns] & inside[:, :, None] & inside[:, None, :]
    # a pattern of two tones, in squares of two texels
    tones = draws.integers(0, 2, (len(sides), _TEXELS // 2, _TEXELS // 2))
    tone = tones[np.arange(len(sides))[:, None, None], rows // 2, columns // 2]
    pixels = colours[chosen[:, None, None], tone]
    n, i, j = np.nonzero(masks)
    image[corner[n, 0] + i, corner[n, 1] + j] = pixels[n, i, j]
    opaque = np.concatenate([np.clip(image, 0, 1), np.ones((*size, 1))], -1)
    return (255 * opaque).round().astype(np.uint8), _boxes(masks, corner)


def _sheet() -> tuple[Array, Array]:
    """Shapes [6, 8, 8] bool and two tones [6, 2, 3] of each.

    Shapes are symmetric, with a solid body of half their side and ragged limbs that touch all four
    sides.
    """
    draws = np.random.default_rng(_SHEET_SEED)
    half = draws.random((_COLOURS, _TEXELS, _TEXELS // 2)) > 0.35
    shapes = np.concatenate([half, half[..., ::-1]], -1)
    middle = slice(_TEXELS // 2 - 1, _TEXELS // 2 + 1)
    body = slice(_TEXELS // 4, -_TEXELS // 4)
    shapes[:, body, body] = True
    for side in (0, -1):
        shapes[:, side, middle] = shapes[:, middle, side] = True
    # red, green and blue sprites in turn, each with a tone of another colour
    first = 0.25 + draws.uniform(0.6, 0.75, (_COLOURS, 3)) * np.eye(3)[np.arange(_COLOURS) % 3]
    second = 0.75 * first + 0.25 * draws.uniform(0, 1, (_COLOURS, 3))
    return shapes, np.stack([first, second], 1)


def _brightfield(draws: Draws, size: tuple[int, int]) -> tuple[Array, Array]:
    height, width = size
    y, x = np.arange(height)[:, None] / height, np.arange(width) / width
    image = np.stack(np.broadcast_arrays(0.86 - 0.08 * x, 0.84 - 0.05 * y, 0.83 - 0.06 * x), -1)
    centres, sides = _placed(draws, size, draws.uniform(30, 44, 1500), 1.0)
    radii, corner = _ellipses(draws, centres, sides, 1.3)
    stain = draws.uniform(0.5, 0.9, (len(sides), 1, 1)) * np.clip((1.1 - radii) * 4, 0, 1)
    covered = np.zeros(size)
    _onto(covered, stain, corner, np.maximum)
    image = image + covered[..., None] * (np.array(_STAIN) - image)
    image = ndimage.gaussian_filter(image, (1, 1, 0)) + draws.normal(0, 0.01, image.shape)
    pixels = (255 * np.clip(image, 0, 1)).round().astype(np.uint8)
    return pixels, _boxes(radii < 1, corner, size)


def _placed(
    draws: Draws, size: tuple[int, int], sides: Array, apart: float
) -> tuple[Floats, Array]:
    """Centres [n, 2] of objects inside an image, and their sides [n].

    Two centres are at least `apart` times the mean of both sides from each other. Objects that find
    no place are left out.
    """
    centres, placed = np.zeros((0, 2)), sides[:0]
    for _ in range(_ROUNDS):
        reach = sides[:, None] / 2 + 1
        new = draws.uniform(reach, np.array(size) - reach)
        known = np.concatenate([centres, new])
        both = (sides[:, None] + np.concatenate([placed, sides])) / 2
        near = np.square(new[:, None] - known).sum(-1) < np.square(apart * both)
        # an earlier one of the same round is in the way, too
        near[:, len(centres) :] &= np.tri(len(new), k=-1, dtype=bool)
        free = ~near.any(1)
        centres = np.concatenate([centres, new[free]])
        placed, sides = np.concatenate([placed, sides[free]]), sides[~free]
        if not len(sides):
            break
    return centres, placed


def _ellipses(
    draws: Draws, centres: Floats, sides: Array, most: float
) -> tuple[Floats, npt.NDArray[np.int64]]:
    """Squared radii [n, S, S] of pixels round each centre, 1 at the rim, and corners [n, 2].

    Ellipses are turned at random, up to `most` times as long as wide, with the area of a disc of
    diameter `sides`.
    """
    ratio = np.sqrt(draws.uniform(1, most, len(sides)))[:, None, None]
    angle = draws.uniform(0, np.pi, len(sides))[:, None, None]
    reach = int(np.ceil(np.sqrt(most) * sides.max() / 2)) + 2
    corner = np.floor(centres).astype(np.int64) - reach
    offset = np.arange(2 * reach + 1) + 0.5
    y = (corner[:, :1] + offset - centres[:, :1])[:, :, None]
    x = (corner[:, 1:] + offset - centres[:, 1:])[:, None, :]
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    half = sides[:, None, None] / 2
    return np.square(along / (half * ratio)) + np.square(across * ratio / half), corner


def _onto(image: Floats, parts: Floats, corner: Array, way: np.ufunc) -> None:
    """Adds parts [n, S, S] to an image [H, W], or takes their maximum; those outside are cut."""
    offset = np.arange(parts.shape[1])
    y, x = corner[:, :1] + offset, corner[:, 1:] + offset
    height, width = image.shape
    inside = ((y >= 0) & (y < height))[:, :, None] & ((x >= 0) & (x < width))[:, None, :]
    n, i, j = np.nonzero(inside)
    way.at(image, (y[n, i], x[n, j]), parts[n, i, j])


def _boxes(masks: Array, corner: Array, size: tuple[int, int] | None = None) -> Array:
    """Boxes [n, 4] of masks [n, S, S] whose corners are given, inside an image of a size."""
    ends = []
    for axis, low in ((1, corner[:, 1]), (2, corner[:, 0])):
        on: Array = np.any(masks, axis)  # [n, S]
        ends.append((low + on.argmax(1), low + on.shape[1] - on[:, ::-1].argmax(1)))
    (left, right), (top, bottom) = ends
    boxes = np.stack([left, top, right, bottom], 1)
    return boxes if size is None else np.clip(boxes, 0, np.array([*size[::-1]] * 2))


KINDS = {
    "cells": Kind("cells under uneven light, in 16 bits", "cell", ".tif", (360, 480), 8, _cells),
    "sprites": Kind(
        "coloured sprites on a textured ground", "sprite", ".png", (240, 320), 12, _sprites
    ),
    "brightfield": Kind(
        "one large slide with stained cells", "cell", ".jpg", (2000, 3000), 1, _brightfield
    ),
}
"""The kinds by name."""
