"""Boxes: `xyxy` in pixels, float, half-open; pixel (r, c) covers [c, c + 1] x [r, r + 1]."""

import torch
from torch import Tensor


def xyxy_from_centre(
    centre: Tensor,  # [..., 2] y, x in pixels
    size: Tensor,  # [..., 2] h, w in pixels
) -> Tensor:  # [..., 4] x1, y1, x2, y2 in pixels
    """Corners of boxes from centre and size, the form inside the models."""
    low = (centre - size / 2).flip(-1)
    return torch.cat([low, low + size.flip(-1)], dim=-1)


def whole_pixels(boxes: Tensor, size: tuple[int, int]) -> Tensor:  # [..., 4] -> [..., 4]
    """Boxes with edges rounded to those of pixels, inside an image of `size` (height, width).

    They keep at least one pixel, so a box outside the image becomes one pixel at its rim.
    """
    rim = boxes.new_tensor([size[1], size[0]])
    start, stop = boxes[..., :2].round(), boxes[..., 2:].round()
    start = torch.minimum(start.clamp(min=0) + 0.0, rim - 1)  # 0 is not -0
    return torch.cat([start, torch.minimum(torch.maximum(stop, start + 1), rim)], dim=-1)


def box_area(boxes: Tensor) -> Tensor:  # [..., 4] -> [...]
    """Area in square pixels; 0 for empty and inverted boxes."""
    return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1)


def box_iou(first: Tensor, second: Tensor) -> Tensor:  # [n, 4], [m, 4] -> [n, m]
    """Intersection over union of every pair, in [0, 1]; 0 wherever an area is 0.

    Areas are plain products of the sides, without the pixel that some protocols add.
    """
    low = torch.maximum(first[:, None, :2], second[None, :, :2])
    high = torch.minimum(first[:, None, 2:], second[None, :, 2:])
    overlap = (high - low).clamp(min=0).prod(-1)
    union = box_area(first)[:, None] + box_area(second)[None] - overlap
    return torch.where(overlap > 0, overlap / union, torch.zeros_like(overlap))
