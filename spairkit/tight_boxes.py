"""Boxes drawn round what an object shows, in whole pixels, as people draw them."""

import torch
from torch import Tensor


def tighten(
    boxes: Tensor,  # [B, K, 4] xyxy, pixels
    maps: Tensor,  # [B, K, P, P, 4] colour and alpha in [0, 1]
    background: Tensor,  # [B, 3, 1, 1] in [0, 1]
    contrast: float,
) -> Tensor:  # [B, K, 4] xyxy, whole pixels
    """Each box drawn anew round the part of its object that can be seen.

    A texel's contrast is alpha * |colour - background|, the largest over the channels; between
    the centres of texels it is interpolated, and beyond the map it is 0. On each axis the object
    begins where this first exceeds `contrast` in some row (or column) and ends where it last does.
    Edges go to the nearest pixel's edge, and are at least a pixel apart. An object of which
    nothing is seen keeps its box, brought to whole pixels.

    z_where's own boxes are a pixel or two wider than their objects, or cut them short: nothing in
    the loss holds them close.
    """
    colour, alpha = maps[..., :3], maps[..., 3]
    difference = (colour - background.flatten(1)[:, None, None, None]).abs().amax(-1)
    visible = alpha * difference  # [B, K, P, P]
    down, across = visible.amax(-1), visible.amax(-2)  # [B, K, P]
    low, size = boxes[..., :2], boxes[..., 2:] - boxes[..., :2]
    first = torch.stack([_begin(across, contrast), _begin(down, contrast)], dim=-1)
    last = 1 - torch.stack(
        [_begin(across.flip(-1), contrast), _begin(down.flip(-1), contrast)], dim=-1
    )
    seen = (visible > contrast).flatten(2).any(-1, keepdim=True)
    first, last = torch.where(seen, first, 0), torch.where(seen, last, 1)
    start, stop = (low + size * first).round(), (low + size * last).round()
    return torch.cat([start, torch.maximum(stop, start + 1)], dim=-1)


def _begin(profile: Tensor, contrast: float) -> Tensor:  # [..., P] -> [...]
    """Where contrast is first exceeded, as a share of the map's side. Texel r is at r + 1/2."""
    side = profile.shape[-1]
    texels = torch.arange(side, device=profile.device)
    index = torch.where(profile > contrast, texels, side - 1).amin(-1, keepdim=True)
    here = profile.gather(-1, index)
    before = profile.gather(-1, (index - 1).clamp(min=0)) * (index > 0)
    centre = index + 0.5
    back = ((here - contrast) / (here - before)).clamp(0, 1)  # 0 / 0 only where nothing is seen
    return ((centre - back) / side).squeeze(-1)
