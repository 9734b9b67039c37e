"""Boxes drawn round what an object shows, inside the box that it was given."""

import torch
from torch import Tensor


def tighten(
    boxes: Tensor,  # [B, K, 4] xyxy, pixels
    maps: Tensor,  # [B, K, P, P, 4] colour and alpha in [0, 1]
    background: Tensor,  # [B, 3, 1, 1] in [0, 1]
    contrast: float,
) -> Tensor:  # [B, K, 4] xyxy, pixels
    """Each box cut down to the rows and columns of its map that can be seen.

    A texel is seen if alpha * |colour - background| exceeds `contrast` in some channel. An
    object of which nothing is seen keeps its box. z_where's own boxes are a pixel or two wider
    than their objects all round: nothing in the loss holds them close.
    """
    colour, alpha = maps[..., :3], maps[..., 3]
    difference = (colour - background.flatten(1)[:, None, None, None]).abs().amax(-1)
    seen = alpha * difference > contrast  # [B, K, P, P]
    y1, y2 = _span(seen.any(-1))
    x1, x2 = _span(seen.any(-2))
    low, size = boxes[..., :2], boxes[..., 2:] - boxes[..., :2]
    inner = torch.cat(
        [
            low + size * torch.stack([x1, y1], dim=-1),
            low + size * torch.stack([x2, y2], dim=-1),
        ],
        dim=-1,
    )
    return torch.where(seen.any(-1).any(-1)[..., None], inner, boxes)


def _span(seen: Tensor) -> tuple[Tensor, Tensor]:  # [..., P] bool -> [...], [...]
    """Where the first seen texel starts and the last one ends, as shares of the map's side."""
    places = torch.arange(seen.shape[-1], device=seen.device)
    first = torch.where(seen, places, seen.shape[-1]).amin(-1)
    last = torch.where(seen, places + 1, 0).amax(-1)
    return first / seen.shape[-1], last / seen.shape[-1]
