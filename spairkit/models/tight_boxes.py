"""Boxes drawn round what an object shows, in whole pixels, as people draw them."""

import torch
from torch import Tensor


def tighten(
    boxes: Tensor,  # [B, K, 4] xyxy, pixels
    maps: Tensor,  # [B, K, P, P, 4] colour and alpha in [0, 1]
    background: Tensor,  # [B, 3, 1, 1] in [0, 1]
    contrast: float,  # in [0, 1)
    image_size: tuple[int, int],  # height and width, pixels
) -> Tensor:  # [B, K, 4] xyxy, whole pixels
    """Each box cut down to the rows and columns of its map that can be seen.

    How far a texel stands out is alpha * |colour - background| in the channel where that is most.
    It is seen if this exceeds `contrast` times the most of all texels of the object: at .5 a box
    ends at half the height of a blurred object, however dim that is, and a single bright texel has
    a box of its own. Edges go to the nearest edge of a pixel of the image, and are at least a pixel
    apart. An
    object of which nothing is seen keeps its box, brought to whole pixels. z_where's own boxes are
    a pixel or two wider than their objects all round, or cut them short: nothing in the loss holds
    them close.
    """
    colour, alpha = maps[..., :3], maps[..., 3]
    difference = (colour - background.flatten(1)[:, None, None, None]).abs().amax(-1)
    difference = alpha * difference  # [B, K, P, P]
    seen = difference > contrast * difference.amax((-2, -1), keepdim=True)
    y1, y2 = _span(seen.any(-1))
    x1, x2 = _span(seen.any(-2))
    first, last = torch.stack([x1, y1], dim=-1), torch.stack([x2, y2], dim=-1)
    low, size = boxes[..., :2], boxes[..., 2:] - boxes[..., :2]
    start, stop = (low + size * first).round(), (low + size * last).round()
    rim = boxes.new_tensor([image_size[1], image_size[0]])
    start = torch.minimum(start.clamp(min=0) + 0.0, rim - 1)  # 0 is not -0
    stop = torch.minimum(torch.maximum(stop, start + 1), rim)
    return torch.cat([start, stop], dim=-1)


def _span(seen: Tensor) -> tuple[Tensor, Tensor]:  # [..., P] bool -> [...], [...]
    """Where the first seen texel starts and the last one ends, as shares of the map's side.

    All of the side where none is seen.
    """
    places = torch.arange(seen.shape[-1], device=seen.device)
    any_seen = seen.any(-1, keepdim=True)
    first = torch.where(seen | ~any_seen, places, seen.shape[-1]).amin(-1)
    last = torch.where(seen | ~any_seen, places + 1, 0).amax(-1)
    return first / seen.shape[-1], last / seen.shape[-1]
