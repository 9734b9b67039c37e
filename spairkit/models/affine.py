"""Affine maps between an image and a small object map, for axis-aligned boxes (docs/model.md 7).

A box is a scale (w, h) in (0, 1) and a shift (x, y) in (-1, 1), in an image that extends from -1 to
1: point (u, v) of the map lies at (w u + x, h v + y) in the image. On an axis of n samples,
coordinate p is sample (p + 1)(n - 1.001) / 2. Interpolation is bilinear, with zeros beyond the rim.
The axes are independent, so each map is one matrix product for each axis.
"""

import torch
from torch import Tensor

_SHORT = 1.001  # the authors' spatial transformer ends just before the last sample


def cut(
    images: Tensor,  # [B, C, H, W]
    scale: Tensor,  # [B, n, 2] w, h
    shift: Tensor,  # [B, n, 2] x, y
    size: int,
) -> Tensor:  # [B, n, C, size, size]
    """The images inside boxes, at size x size points from edge to edge of the box.

    All inputs get gradients.
    """
    steps = torch.linspace(-1, 1, size, device=images.device, dtype=images.dtype)
    along = scale[..., None] * steps + shift[..., None]  # [B, n, 2, size]
    columns = _tents(along[:, :, 0], images.shape[-1])  # [B, n, size, W]
    rows = _tents(along[:, :, 1], images.shape[-2])  # [B, n, size, H]
    # in full precision under autocast too
    with torch.autocast(images.device.type, enabled=False):
        # one product for all boxes of an image avoids a copy of the image for each
        narrow = images.flatten(1, 2) @ columns.flatten(1, 2).mT  # [B, C H, n size]
        narrow = narrow.unflatten(2, (-1, size)).unflatten(1, images.shape[1:3])
        cut_out: Tensor = rows[:, :, None] @ narrow.permute(0, 3, 1, 2, 4)
    return cut_out


def place(
    maps: Tensor,  # [B, n, C, P, P]
    scale: Tensor,  # [B, n, 2] w, h
    shift: Tensor,  # [B, n, 2] x, y
    height: int,
    width: int,
) -> Tensor:  # [B, n, C, height, width]
    """Object maps in their boxes, each on an image of zeros: the inverse affine map of `cut`.

    All inputs get gradients.
    """
    x, y = (
        torch.linspace(-1, 1, pixels, device=maps.device, dtype=maps.dtype)
        for pixels in (width, height)
    )
    size = maps.shape[-1]
    columns = _tents((x - shift[..., :1]) / scale[..., :1], size)  # [B, n, width, P]
    rows = _tents((y - shift[..., 1:]) / scale[..., 1:], size)  # [B, n, height, P]
    with torch.autocast(maps.device.type, enabled=False):
        return rows[:, :, None] @ (maps @ columns.mT[:, :, None])


def _tents(along: Tensor, samples: int) -> Tensor:  # [...] -> [..., samples]
    """The weight of each sample at coordinates from -1, the first sample, to 1, the last."""
    position = (along + 1) * ((samples - _SHORT) / 2)
    places = torch.arange(samples, device=along.device, dtype=along.dtype)
    return (1 - (position[..., None] - places).abs()).clamp(min=0)
