"""Tightens boxes to the visible part of an object, in whole pixels, as annotators draw them."""

import torch
from torch import Tensor

from spairkit.boxes import whole_pixels


def tighten(
    boxes: Tensor,  # [B, K, 4] xyxy, pixels
    maps: Tensor,  # [B, K, P, P, 4] colour and alpha in [0, 1]
    background: Tensor,  # [B, 3, 1, 1] in [0, 1]
    contrast: float,  # in [0, 1)
    image_size: tuple[int, int],  # height and width, pixels
) -> Tensor:  # [B, K, 4] xyxy, whole pixels
    """Each box tightened to the visible rows and columns of its object map.

    A texel's contrast is alpha * max_c |colour - background|. It is visible if that exceeds
    `contrast` times the greatest contrast of the object, so that with .5 a box ends at half the
    height of a blurred object. Edges are rounded to edges of pixels, clipped to the image and
    kept at least a pixel apart, so a box outside the image becomes one pixel at its rim. An object
    without a visible texel keeps its box, rounded and clipped. The boxes of z_where are a pixel or
    two wider than their objects, or cut them: nothing in the loss holds them close.
    """
    colour, alpha = maps[..., :3], maps[..., 3]
    difference = (colour - background.flatten(1)[:, None, None, None]).abs().amax(-1)
    difference = alpha * difference  # [B, K, P, P]
    seen = difference > contrast * difference.amax((-2, -1), keepdim=True)
    y1, y2 = _span(seen.any(-1))
    x1, x2 = _span(seen.any(-2))
    first, last = torch.stack([x1, y1], dim=-1), torch.stack([x2, y2], dim=-1)
    low, size = boxes[..., :2], boxes[..., 2:] - boxes[..., :2]
    return whole_pixels(torch.cat([low + size * first, low + size * last], dim=-1), image_size)


def _span(seen: Tensor) -> tuple[Tensor, Tensor]:  # [..., P] bool -> [...], [...]
    """Start of the first and end of the last visible texel, as shares of the map's side.

    The whole side if no texel is visible.
    """
    places = torch.arange(seen.shape[-1], device=seen.device)
    any_seen = seen.any(-1, keepdim=True)
    first = torch.where(seen | ~any_seen, places, seen.shape[-1]).amin(-1)
    last = torch.where(seen | ~any_seen, places + 1, 0).amax(-1)
    return first / seen.shape[-1], last / seen.shape[-1]
