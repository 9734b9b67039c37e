"""Scenes of shapes: functions of their arguments, with exact masks and boxes on an empty ground."""

import numpy as np
import pytest

from spairkit.data.shapes import KINDS, SIDE, shapes

SCENES = 40
EACH = pytest.mark.parametrize("kind", KINDS)


@EACH
def test_scene_is_a_function_of_its_arguments(kind: str) -> None:
    first, again = shapes(kind, 3, 5), shapes(kind, 3, 5)
    for name in ("image", "masks", "boxes"):
        assert (getattr(first, name) == getattr(again, name)).all()
    for other in (shapes(kind, 4, 5), shapes(kind, 3, 6)):
        assert (first.image != other.image).any()


@EACH
def test_masks_and_boxes_are_those_of_visible_objects(kind: str) -> None:
    counts, hidden = set(), 0
    for index in range(SCENES):
        scene = shapes(kind, 0, index)
        assert scene.image.shape == (SIDE, SIDE, 3)
        assert scene.masks.shape == (SIDE, SIDE)
        assert scene.image.dtype == np.uint8
        assert scene.masks.dtype == np.int32
        counts.add(len(scene.boxes))
        assert np.unique(scene.masks).tolist() == list(range(len(scene.boxes) + 1))
        for number, (left, top, right, bottom) in enumerate(scene.boxes, start=1):
            own = scene.masks == number
            assert own.sum() >= 20
            inside = np.zeros_like(own)
            inside[top:bottom, left:right] = True
            assert not (own & ~inside).any()
            cut = own[top:bottom, left:right]
            # tight: each side has a pixel
            assert cut[0].any() and cut[-1].any() and cut[:, 0].any() and cut[:, -1].any()  # noqa: PT018
            hidden += bool(((scene.masks > 0) & ~own & inside).any())
    least, most = KINDS[kind].counts
    assert counts <= set(range(least, most + 1))
    assert len(counts) > 3
    assert hidden > SCENES / 4  # boxes meet, so objects hide each other


def test_ground_is_empty_and_flat_shapes_have_one_colour() -> None:
    for index in range(SCENES):
        scene = shapes("flat", 1, index)
        for number in range(len(scene.boxes) + 1):
            assert len(np.unique(scene.image[scene.masks == number], axis=0)) == 1
        assert len(set(scene.image[scene.masks == 0][0].tolist())) == 1  # grey


def test_solid_shapes_are_shaded_and_nearer_ones_come_last() -> None:
    shades, order = [], []
    for index in range(SCENES):
        scene = shapes("solid", 1, index)
        ground = scene.image[scene.masks == 0]
        assert (ground == ground[:, :1]).all()  # grey
        rows = np.arange(SIDE)[:, None] + np.zeros(SIDE, int)
        lightness = [scene.image[(scene.masks == 0) & (rows == row)] for row in (0, SIDE - 1)]
        assert lightness[0].mean() < lightness[1].mean()
        for number in range(1, len(scene.boxes) + 1):
            shades.append(len(np.unique(scene.image[scene.masks == number], axis=0)))
        order.append(np.diff(scene.boxes[:, 3]))  # lower edges
    assert min(shades) > 1
    assert np.concatenate(order).mean() > 0
