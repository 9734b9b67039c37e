"""The commonest colour against a count of pixels."""

import torch

from spairkit.colours import commonest_colour


def test_commonest_colour_matches_a_count() -> None:
    torch.manual_seed(0)
    levels = torch.randint(0, 3, (4, 3, 5, 6))
    pixels = [tuple(p) for p in levels.permute(0, 2, 3, 1).reshape(-1, 3).tolist()]
    expected = max(sorted(set(pixels)), key=pixels.count)
    for images in (levels / 255, levels.to(torch.uint8)):
        assert (commonest_colour(images) * 255).round().long().tolist() == list(expected)
