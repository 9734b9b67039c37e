"""Tightened boxes against a fine walk along each axis, and their corner cases."""

import numpy as np
import torch

from spairkit.tight_boxes import tighten


def extent(profile: list[float], contrast: float) -> tuple[float, float]:
    """First and last of a million points at which the interpolated profile exceeds contrast."""
    side = len(profile)
    points = np.linspace(-0.5, side + 0.5, 1_000_001)
    heights = np.interp(points, np.arange(side + 2) - 0.5, [0.0, *profile, 0.0])
    above = points[heights > contrast]
    return float(above[0]) / side, float(above[-1]) / side


def test_boxes_are_drawn_round_what_can_be_seen() -> None:
    torch.manual_seed(0)
    maps = torch.rand(2, 5, 7, 7, 4) * (torch.rand(2, 5, 7, 7, 1) < 0.1)
    maps[0, 0] = 0
    boxes = torch.rand(2, 5, 4) * 10
    boxes[..., 2:] += boxes[..., :2] + 9
    background = torch.tensor([[0.1, 0.2, 0.3], [0.0, 0.0, 0.0]])[:, :, None, None]
    actual = tighten(boxes, maps, background, 0.2)
    for b in range(2):
        for k in range(5):
            visible = np.zeros((7, 7))
            for r in range(7):
                for c in range(7):
                    red, green, blue, alpha = maps[b, k, r, c].tolist()
                    colour = zip((red, green, blue), background[b, :, 0, 0].tolist(), strict=True)
                    visible[r, c] = max(alpha * abs(one - other) for one, other in colour)
            x1, y1, x2, y2 = boxes[b, k].tolist()
            left, right, top, bottom = 0.0, 1.0, 0.0, 1.0
            if visible.max() > 0.2:
                left, right = extent(visible.max(0).tolist(), 0.2)
                top, bottom = extent(visible.max(1).tolist(), 0.2)
            expected = [x1 + left * (x2 - x1), y1 + top * (y2 - y1)]
            expected += [x1 + right * (x2 - x1), y1 + bottom * (y2 - y1)]
            start, stop = np.round(expected[:2]), np.round(expected[2:])
            expected = [*start, *np.maximum(stop, start + 1)]
            assert actual[b, k].tolist() == expected


def test_a_thin_object_gets_a_box_of_a_pixel() -> None:
    boxes = torch.tensor([[[3.3, 3.3, 3.6, 9.0]]])
    maps = torch.ones(1, 1, 4, 4, 4)
    box = tighten(boxes, maps, torch.zeros(1, 3, 1, 1), 0.05)[0, 0].tolist()
    assert box[0] == 3.0
    assert box[2] == 4.0


def test_an_object_that_cannot_be_seen_keeps_its_box() -> None:
    boxes = torch.tensor([[[1.2, 2.4, 5.0, 8.9]]])
    maps = torch.zeros(1, 1, 4, 4, 4)
    found = tighten(boxes, maps, torch.zeros(1, 3, 1, 1), 0.05)
    assert found.tolist() == [[[1.0, 2.0, 5.0, 9.0]]]
