"""IoU against counting pixels, and properties of IoU for arbitrary boxes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spairkit.boxes import box_area, box_iou, xyxy_from_centre

PROPERTY = settings(max_examples=200, deadline=None, derandomize=True)

# float32 has 24 bits: sides from 1/8 to 1,000 keep the products normal numbers
Coordinate = st.floats(-1000, 1000, width=32)
Side = st.floats(0.125, 1000, width=32)


@st.composite
def arbitrary_boxes(draw: st.DrawFn) -> Tensor:
    rows = draw(st.lists(st.tuples(Coordinate, Coordinate, Side, Side), max_size=6))
    corners = torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)
    return torch.cat([corners[:, :2], corners[:, :2] + corners[:, 2:]], dim=1)


def pixels(box: list[int]) -> set[tuple[int, int]]:
    x1, y1, x2, y2 = box
    return {(x, y) for x in range(x1, x2) for y in range(y1, y2)}


def test_iou_and_area_match_counted_pixels() -> None:
    generator = torch.Generator().manual_seed(0)
    corners = torch.randint(0, 9, (30, 4), generator=generator)  # some are empty or inverted
    boxes = corners.tolist()
    iou = box_iou(corners.float(), corners.float())
    for i, first in enumerate(boxes):
        for j, second in enumerate(boxes):
            union = pixels(first) | pixels(second)
            expected = len(pixels(first) & pixels(second)) / len(union) if union else 0.0
            assert iou[i, j].item() == pytest.approx(expected, abs=1e-6)
        assert box_area(corners[i].float()).item() == len(pixels(first))


@PROPERTY
@given(arbitrary_boxes(), arbitrary_boxes())
def test_iou_is_symmetric_and_between_0_and_1(first: Tensor, second: Tensor) -> None:
    iou = box_iou(first, second)
    assert iou.shape == (len(first), len(second))
    torch.testing.assert_close(iou, box_iou(second, first).T, rtol=1e-5, atol=0.0)
    assert ((iou >= 0) & (iou <= 1 + 1e-6)).all()


@PROPERTY
@given(arbitrary_boxes())
def test_iou_with_itself_is_1(boxes: Tensor) -> None:
    boxes = boxes[box_area(boxes) > 0]
    torch.testing.assert_close(box_iou(boxes, boxes).diagonal(), torch.ones(len(boxes)))


def test_degenerate_boxes_have_iou_0() -> None:
    flat = torch.tensor([[3.0, 3.0, 3.0, 9.0], [9.0, 9.0, 3.0, 3.0], [0.0, 0.0, 0.0, 0.0]])
    some = torch.cat([flat, torch.tensor([[0.0, 0.0, 10.0, 10.0]])])
    assert (box_iou(flat, some) == 0).all()
    assert (box_area(flat) == 0).all()
    assert box_iou(torch.zeros(0, 4), some).shape == (0, 4)


def test_corners_follow_from_centre_and_size() -> None:
    corners = xyxy_from_centre(torch.tensor([[10.0, 20.0]]), torch.tensor([[4.0, 8.0]]))
    assert corners.tolist() == [[16.0, 8.0, 24.0, 12.0]]  # x1, y1, x2, y2
