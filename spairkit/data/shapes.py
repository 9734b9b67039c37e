"""Small scenes of shapes that hide each other, with exact masks, in the manner of two datasets.

    scene = shapes("flat", seed=0, index=3)
    scene.image, scene.masks, scene.boxes

`flat`, like Multi-dSprites: 1 to 5 squares, ellipses and hearts of any colour and angle lie flat
on a ground of one grey.
`solid`, like CLEVR: 3 to 10 shaded spheres, cubes and cylinders of eight colours and two sizes
stand on a grey floor. Nearer ones are lower in the image, larger, and hide the others. They cast no
shadows.

These are not the datasets' own images, so figures are not comparable.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Draws = np.random.Generator

SIDE = 64
"""Height and width of a scene, px."""

_VISIBLE = 0.4  # least share of each object's pixels that no nearer one hides
_LEAST_PIXELS = 20  # visible ones of an object
_ATTEMPTS = 100  # of placing an object, and of beginning again
_COLOURS = (
    (87, 87, 87),
    (173, 35, 35),
    (42, 75, 215),
    (29, 105, 20),
    (129, 74, 25),
    (129, 38, 192),
    (41, 208, 208),
    (255, 238, 51),
)
"""Of solid shapes: those of CLEVR."""
_LIGHT = np.array([-0.5, -0.6, 0.62])  # direction of the light: x, y down, z to the viewer
_AMBIENT = 0.45
_ROWS, _COLUMNS = np.mgrid[:SIDE, :SIDE] + 0.5


@dataclass(frozen=True, eq=False)
class Shapes:
    """A scene and its true objects."""

    image: Array  # [64, 64, 3] uint8
    masks: Array  # [64, 64] int32, i + 1 on the visible pixels of object i, 0 on the ground
    boxes: Array  # [n, 4] int64, left, top, right, bottom, half-open, tight round them


Drawn = tuple[Array, Floats]
"""The pixels of an object [64, 64] bool, and its colours [64, 64, 3] in [0, 1]."""


@dataclass(frozen=True)
class _Kind:
    counts: tuple[int, int]
    ground: Callable[[Draws], Floats]
    draw: Callable[[Draws, Floats], Drawn]
    """Draws an object round a centre [2], (y, x)."""
    is_ordered: bool
    """Whether objects lower in the image are nearer."""


def shapes(kind: str, seed: int, index: int) -> Shapes:
    """A scene, as a pure function of the arguments.

    The number of objects is uniform. Two fifths or more of each one are visible, and 20 pixels.

    Args:
        kind: a key of `KINDS`.
        seed: from 0.
        index: of the scene, from 0.
    """
    chosen, draws = KINDS[kind], np.random.default_rng((seed, index))
    least, most = chosen.counts
    count = int(draws.integers(least, most + 1))
    objects = None
    for _ in range(_ATTEMPTS):
        objects = _placed(chosen, draws, count)
        if objects is not None:
            break
    assert objects is not None  # one attempt in a few fails where there are ten
    image, masks = chosen.ground(draws), np.zeros((SIDE, SIDE), np.int32)
    for number, (inside, colours) in enumerate(objects, start=1):
        image = np.where(inside[..., None], colours, image)
        masks[inside] = number
    boxes = []
    for number in range(1, count + 1):
        rows, columns = (np.flatnonzero((masks == number).any(axis)) for axis in (1, 0))
        boxes.append((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
    pixels = (255 * image).round().clip(0, 255).astype(np.uint8)
    return Shapes(pixels, masks, np.array(boxes, np.int64).reshape(-1, 4))


def _placed(kind: _Kind, draws: Draws, count: int) -> list[Drawn] | None:
    """Objects from the farthest to the nearest; None if one found no place."""
    centres = draws.uniform(9, SIDE - 9, (count, 2))
    if kind.is_ordered:
        centres = centres[centres[:, 0].argsort()]
    objects: list[Drawn] = []
    for centre in centres:
        for _ in range(_ATTEMPTS):
            objects.append(kind.draw(draws, centre))
            if _are_visible(objects):
                break
            objects.pop()
            centre[1] = draws.uniform(9, SIDE - 9)
        else:
            return None
    return objects


def _are_visible(objects: list[Drawn]) -> bool:
    """Whether enough of each object is left by those in front of it."""
    free = np.ones((SIDE, SIDE), dtype=bool)
    for inside, _ in reversed(objects):
        left = np.count_nonzero(inside & free)
        if left < max(_LEAST_PIXELS, _VISIBLE * np.count_nonzero(inside)):
            return False
        free &= ~inside
    return True


def _grey(draws: Draws) -> Floats:
    return np.full((SIDE, SIDE, 3), draws.uniform(0, 1))


def _floor(draws: Draws) -> Floats:
    """A floor of one grey, a little lighter where it is near."""
    shades = draws.uniform(0.45, 0.5) + 0.1 * _ROWS / SIDE
    return np.repeat(shades[..., None], 3, -1)


def _flat(draws: Draws, centre: Floats) -> Drawn:
    """A square, an ellipse or a heart of 10 to 18 px, in one colour."""
    half, angle = draws.uniform(5, 9), draws.uniform(0, 2 * np.pi)
    y, x = (_ROWS - centre[0]) / half, (_COLUMNS - centre[1]) / half
    y, x = y * np.cos(angle) - x * np.sin(angle), x * np.cos(angle) + y * np.sin(angle)
    colour = draws.uniform(0, 1, 3)
    shape = draws.integers(3)
    if shape == 0:
        inside = np.maximum(abs(y), abs(x)) <= 0.8
    elif shape == 1:
        inside = (y / 0.6) ** 2 + x**2 <= 1
    else:
        y, x = 0.1 - 1.25 * y, 1.2 * x
        inside = (x**2 + y**2 - 1) ** 3 <= x**2 * y**3
    return inside, np.broadcast_to(colour, (SIDE, SIDE, 3))


def _solid(draws: Draws, centre: Floats) -> Drawn:
    """A sphere, a cube or a cylinder, large or small, matt or with a highlight."""
    nearness = 0.75 + 0.5 * centre[0] / SIDE
    half = nearness * (4.0 if draws.integers(2) else 6.5)
    y, x = (_ROWS - centre[0]) / half, (_COLUMNS - centre[1]) / half
    colour = np.array(_COLOURS[draws.integers(len(_COLOURS))]) / 255
    shape, is_shiny = draws.integers(3), draws.integers(2)
    if shape == 0:
        inside = y**2 + x**2 <= 1
        z = np.sqrt(np.clip(1 - y**2 - x**2, 0, None))
        lit = _lit(x, y, z)
    elif shape == 1:
        inside, lit = _cube(x, y)
    else:
        # from above: an ellipse over a wall
        top = (x / 0.8) ** 2 + ((y + 0.6) / 0.3) ** 2 <= 1
        wall = (abs(x) <= 0.8) & (y >= -0.6) & (y <= 0.6)
        inside = top | wall | ((x / 0.8) ** 2 + ((y - 0.6) / 0.3) ** 2 <= 1)
        across = np.clip(x / 0.8, -1, 1)
        lit = np.where(top, 1.0, _lit(across, 0 * x, np.sqrt(1 - across**2)))
    shaded = colour * (_AMBIENT + (1 - _AMBIENT) * lit)[..., None]
    if is_shiny:
        shine = np.exp(-((x + 0.35) ** 2 + (y + 0.4) ** 2) / 0.05)[..., None]
        shaded = shaded + 0.8 * shine * (1 - shaded)
    return inside, shaded


def _lit(x: Floats, y: Floats, z: Floats) -> Floats:
    """The share of light on a surface with a unit normal."""
    lit: Floats = np.clip(x * _LIGHT[0] + y * _LIGHT[1] + z * _LIGHT[2], 0, 1)
    return lit


def _cube(x: Floats, y: Floats) -> tuple[Array, Floats]:
    """A cube on its corner seen from above: a light top, and a left and a right wall."""
    slope, height = 0.45, 0.9
    edge = slope * (1 - abs(x))  # of the top, above and below its middle at -height / 2
    top = abs(y + height / 2) <= edge
    wall = (abs(x) <= 1) & (abs(y) <= height / 2 + edge)
    lit = np.where(top, 1.0, np.where(x < 0, 0.65, 0.25))
    return wall | top, lit


KINDS = {
    "flat": _Kind((1, 5), _grey, _flat, is_ordered=False),
    "solid": _Kind((3, 10), _floor, _solid, is_ordered=True),
}
"""The kinds by name."""
