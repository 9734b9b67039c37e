"""Masks as polygons that run along the edges of pixels, so that their area is that of the mask."""

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from torch import Tensor

Ring = npt.NDArray[np.int64]
"""[m, 2]: x and y of the corners of a closed line, px; the first is not repeated at the end."""

Polygon = list[Ring]
"""The outer ring, then the holes. The outer ring has a positive area by the shoelace formula, which
is clockwise on a screen, and holes a negative one, as GeoJSON wants it."""


def polygons(
    label_image: Tensor,  # [H, W] int32
    labels: Tensor,  # [n] int32, from 1
) -> list[list[Polygon]]:
    """The mask of each object as polygons: one for each piece, none for a mask without a pixel.

    Pixels that touch only at a corner are in different pieces. Polygons are valid in the sense of
    OGC's simple features: no ring passes a point twice.
    """
    pixels = label_image.numpy()
    places = ndimage.find_objects(pixels)
    found = []
    for label in labels.tolist():
        place = places[label - 1] if label <= len(places) else None
        found.append([] if place is None else _pieces(pixels[place] == label, place))
    return found


def _pieces(mask: npt.NDArray[np.bool_], place: tuple[slice, slice]) -> list[Polygon]:
    parts, number = ndimage.label(mask)
    shift = np.array([place[1].start, place[0].start])
    outer: list[Polygon] = [[] for _ in range(number)]
    holes: list[Polygon] = [[] for _ in range(number)]
    for ring in _rings(mask):
        (x, y), (next_x, next_y) = ring[:2].tolist()
        # the mask is on the right of each edge
        part = parts[y - (next_x < x or next_y < y), x - (next_x < x or next_y > y)] - 1
        after = np.roll(ring, -1, axis=0)
        area = (ring[:, 0] * after[:, 1] - ring[:, 1] * after[:, 0]).sum()
        (outer if area > 0 else holes)[part].append(ring + shift)
    return [own + inside for own, inside in zip(outer, holes, strict=True)]


def _rings(mask: npt.NDArray[np.bool_]) -> list[Ring]:
    """The lines round a mask, x and y from its corner, with the mask on the right of each edge."""
    padded = np.pad(mask, 1)
    height, width = mask.shape[0] + 1, mask.shape[1] + 1
    edges = np.zeros((4, height, width), bool)  # that leave a corner right, down, left and up
    edges[0, :-1, :-1] = mask & ~padded[:-2, 1:-1]
    edges[1, :-1, 1:] = mask & ~padded[1:-1, 2:]
    edges[2, 1:, 1:] = mask & ~padded[2:, 1:-1]
    edges[3, 1:, :-1] = mask & ~padded[1:-1, :-2]
    leaving = [bytearray(way) for way in edges]
    left = bytearray(edges[0])  # edges to the right that no ring has yet: every ring has one
    steps = 1, width, -1, -width
    rings: list[list[int]] = []
    for start in np.flatnonzero(edges[0]).tolist():
        corner, way = start, 0
        ring: list[int] = []
        at: dict[int, int] = {}  # place of each corner in the ring
        while way or left[corner]:
            if corner in at:  # two pixels touch here: close a ring of its own
                closed = ring[at[corner] :]
                del ring[at[corner] :]
                rings.append(closed)
                for other in closed:
                    del at[other]
            at[corner] = len(ring)
            ring.append(corner)
            turn = 0
            while not turn:
                if not way:
                    left[corner] = 0
                corner += steps[way]
                if leaving[(way + 1) % 4][corner]:  # right first: round the same pixel
                    turn = 1
                elif not leaving[way][corner]:
                    turn = 3
            way = (way + turn) % 4
        if ring:
            rings.append(ring)
    return [np.stack([np.array(ring) % width, np.array(ring) // width], axis=1) for ring in rings]
