"""Tightened boxes against a loop over texels, and their corner cases."""

import numpy as np
import torch

from spairkit.models.tight_boxes import tighten


def test_boxes_shrink_to_the_visible_texels() -> None:
    torch.manual_seed(0)
    maps = torch.rand(2, 5, 7, 7, 4) * (torch.rand(2, 5, 7, 7, 1) < 0.1)
    maps[0, 0] = 0
    boxes = torch.rand(2, 5, 4) * 10
    boxes[..., 2:] += boxes[..., :2] + 9
    background = torch.tensor([[0.1, 0.2, 0.3], [0.0, 0.0, 0.0]])[:, :, None, None]
    actual = tighten(boxes, maps, background, 0.2, (30, 30))
    for b in range(2):
        for k in range(5):
            contrasts = {}
            for r in range(7):
                for c in range(7):
                    red, green, blue, alpha = maps[b, k, r, c].tolist()
                    colour = zip((red, green, blue), background[b, :, 0, 0].tolist(), strict=True)
                    contrasts[r, c] = max(alpha * abs(one - other) for one, other in colour)
            most = max(contrasts.values())
            seen = [place for place, contrast in contrasts.items() if contrast > 0.2 * most]
            rows, columns = [r for r, _ in seen] or [0, 6], [c for _, c in seen] or [0, 6]
            x1, y1, x2, y2 = boxes[b, k].tolist()
            h, w = (y2 - y1) / 7, (x2 - x1) / 7
            start = np.round([x1 + min(columns) * w, y1 + min(rows) * h])
            stop = np.round([x1 + (max(columns) + 1) * w, y1 + (max(rows) + 1) * h])
            assert actual[b, k].tolist() == [*start, *np.maximum(stop, start + 1)]


def test_boxes_end_at_the_edge_of_the_image() -> None:
    boxes = torch.tensor([[-3.0, -0.3, 5.0, 6.0], [8.0, 5.0, 14.0, 12.0], [-9.0, 20.0, -2.0, 30.0]])
    maps = torch.ones(1, 3, 4, 4, 4)
    found = tighten(boxes[None], maps, torch.zeros(1, 3, 1, 1), 0.05, (10, 12))[0].tolist()
    assert found == [[0, 0, 5, 6], [8, 5, 12, 10], [0, 9, 1, 10]]
    assert str(found[0][1]) == "0.0"


def test_thin_object_gets_a_box_one_pixel_wide() -> None:
    boxes = torch.tensor([[[3.3, 3.3, 3.4, 9.0]]])
    maps = torch.ones(1, 1, 4, 4, 4)
    found = tighten(boxes, maps, torch.zeros(1, 3, 1, 1), 0.05, (20, 20))
    assert found.tolist() == [[[3.0, 3.0, 4.0, 9.0]]]


def test_box_does_not_depend_on_brightness() -> None:
    """Gaussian spots with different peaks, each cut at half its peak."""
    place = torch.arange(13.0) - 6
    spot = torch.exp(-(place[:, None] ** 2 + place**2) / 8)
    boxes = torch.tensor([[[10.0, 20.0, 23.0, 33.0]] * 3])
    maps = torch.ones(1, 3, 13, 13, 4)
    maps[..., :3] = (torch.tensor([1.0, 0.3, 0.02])[:, None, None] * spot)[None, ..., None]
    found = tighten(boxes, maps, torch.zeros(1, 3, 1, 1), 0.5, (40, 40))
    assert found.tolist() == [[[14.0, 24.0, 19.0, 29.0]] * 3]  # 8 ln 2 is 5.5: two texels each way


def test_invisible_object_keeps_its_box() -> None:
    boxes = torch.tensor([[[1.2, 2.4, 5.0, 8.9]]])
    maps = torch.zeros(1, 1, 4, 4, 4)
    found = tighten(boxes, maps, torch.zeros(1, 3, 1, 1), 0.05, (20, 20))
    assert found.tolist() == [[[1.0, 2.0, 5.0, 9.0]]]


def test_a_texel_at_the_limit_is_not_visible() -> None:
    maps = torch.zeros(1, 1, 4, 4, 4)
    maps[..., 3] = 1
    maps[0, 0, 1:3, 1:3, :3] = 1.0
    maps[0, 0, 1:3, 0, :3] = 0.5
    boxes = torch.tensor([[[0.0, 0.0, 8.0, 8.0]]])
    background = torch.zeros(1, 3, 1, 1)
    assert tighten(boxes, maps, background, 0.5, (8, 8)).tolist() == [[[2, 2, 6, 6]]]
    assert tighten(boxes, maps, background, 0.49, (8, 8)).tolist() == [[[0, 2, 6, 6]]]
