"""Tightened boxes against a loop over texels, and their corner cases."""

import numpy as np
import torch

from spairkit.tight_boxes import tighten


def test_boxes_shrink_to_the_texels_that_can_be_seen() -> None:
    torch.manual_seed(0)
    maps = torch.rand(2, 5, 7, 7, 4) * (torch.rand(2, 5, 7, 7, 1) < 0.1)
    maps[0, 0] = 0
    boxes = torch.rand(2, 5, 4) * 10
    boxes[..., 2:] += boxes[..., :2] + 9
    background = torch.tensor([[0.1, 0.2, 0.3], [0.0, 0.0, 0.0]])[:, :, None, None]
    actual = tighten(boxes, maps, background, 0.2)
    for b in range(2):
        for k in range(5):
            seen = []
            for r in range(7):
                for c in range(7):
                    red, green, blue, alpha = maps[b, k, r, c].tolist()
                    colour = zip((red, green, blue), background[b, :, 0, 0].tolist(), strict=True)
                    if max(alpha * abs(one - other) for one, other in colour) > 0.2:
                        seen.append((r, c))
            rows, columns = [r for r, _ in seen] or [0, 6], [c for _, c in seen] or [0, 6]
            x1, y1, x2, y2 = boxes[b, k].tolist()
            h, w = (y2 - y1) / 7, (x2 - x1) / 7
            start = np.round([x1 + min(columns) * w, y1 + min(rows) * h])
            stop = np.round([x1 + (max(columns) + 1) * w, y1 + (max(rows) + 1) * h])
            assert actual[b, k].tolist() == [*start, *np.maximum(stop, start + 1)]


def test_a_thin_object_gets_a_box_of_a_pixel() -> None:
    boxes = torch.tensor([[[3.3, 3.3, 3.4, 9.0]]])
    maps = torch.ones(1, 1, 4, 4, 4)
    found = tighten(boxes, maps, torch.zeros(1, 3, 1, 1), 0.05)
    assert found.tolist() == [[[3.0, 3.0, 4.0, 9.0]]]


def test_an_object_that_cannot_be_seen_keeps_its_box() -> None:
    boxes = torch.tensor([[[1.2, 2.4, 5.0, 8.9]]])
    maps = torch.zeros(1, 1, 4, 4, 4)
    found = tighten(boxes, maps, torch.zeros(1, 3, 1, 1), 0.05)
    assert found.tolist() == [[[1.0, 2.0, 5.0, 9.0]]]
