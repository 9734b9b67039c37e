"""Polygons of masks against shapely: valid, of the masks' area, a piece for each connected part."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from shapely import MultiPolygon, Polygon, box, unary_union
from torch import Tensor

from spairkit.polygons import polygons


def int32(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def pixels_of(mask: np.ndarray) -> Polygon | MultiPolygon:
    """The union of the squares of all pixels."""
    return unary_union([box(x, y, x + 1, y + 1) for y, x in np.argwhere(mask).tolist()])


@pytest.mark.parametrize("seed", range(4))
def test_random_masks_are_exactly_their_pixels(seed: int) -> None:
    random = np.random.default_rng(seed)
    labels = int32([1, 3, 2])
    for _ in range(60):
        height, width = random.integers(1, 12, 2)
        image = random.integers(0, random.integers(2, 5), (height, width)).astype(np.int32)
        for label, pieces in zip([1, 3, 2], polygons(torch.from_numpy(image), labels), strict=True):
            mask = image == label
            shapes = [Polygon(outer, holes) for outer, *holes in pieces]
            assert all(shape.is_valid for shape in shapes)
            assert len(shapes) == ndimage.label(mask)[1]
            assert unary_union(shapes).equals(pixels_of(mask))
            assert sum(shape.area for shape in shapes) == mask.sum()


def test_rings_have_corners_only_and_turn_as_geojson_wants() -> None:
    image = torch.zeros(8, 9, dtype=torch.int32)
    image[1:7, 2:8] = 5
    image[3:5, 4:6] = 0
    [[(outer, hole)]] = polygons(image, int32([5]))
    assert outer.tolist() == [[2, 1], [8, 1], [8, 7], [2, 7]]
    assert sorted(hole.tolist()) == [[4, 3], [4, 5], [6, 3], [6, 5]]
    assert Polygon(outer).exterior.is_ccw
    assert not Polygon(hole).exterior.is_ccw


def test_pixels_that_touch_at_a_corner_are_two_pieces() -> None:
    [pieces] = polygons(int32([[1, 0], [0, 1]]), int32([1]))
    assert [len(outer) for outer, *_ in pieces] == [4, 4]


def test_labels_without_a_pixel_have_no_polygon() -> None:
    image = int32([[0, 2]])
    assert [len(pieces) for pieces in polygons(image, int32([1, 2, 9]))] == [0, 1, 0]
    assert polygons(int32([[0]]), int32([])) == []
