"""Numba twin of `masks.owners`: the object that contributes most at each pixel."""

import numpy as np
import torch
from torch import Tensor

from spairkit.kernels.constants import MIN_SIDE
from spairkit.kernels.render_cpu import copy_with_ring, interpolate_row, place
from spairkit.kernels.threads import arrays, compiled, over_images

_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)
_MIN_SIDE = np.float32(MIN_SIDE)


@compiled
def _owners(
    start, stop,
    rgba,  # [B, N, h, w, C + 1]
    boxes,  # [B, N, 4]
    depth,  # [B, N]
    presence,  # [B, N]
    background,  # [B, C, H, W]
    floor,
    least,  # contrast that an owner makes alone
    channels,  # a tuple of C numbers, so that the compiler knows C
    owner,  # [B, H, W] int32
    share,  # [B, H, W] importance times the contrast of the owner so far
):  # fmt: skip
    num_objects, map_height, map_width = rgba.shape[1:4]
    height, width = background.shape[2:]
    num_colours = len(channels)
    cover, alpha, importance = num_colours, num_colours + 1, num_colours + 2
    ringed = np.zeros((map_height + 2, map_width + 2, num_colours + 3), np.float32)
    row = np.empty((map_width + 2, num_colours + 3), np.float32)
    flat_ringed = ringed.reshape(map_height + 2, -1)
    flat_row = row.reshape(-1)
    row_index, row_fraction = np.empty(height, np.uint64), np.empty(height, np.float32)
    column_index, column_fraction = np.empty(width, np.uint64), np.empty(width, np.float32)
    row_share, column_share = np.empty(height, np.float32), np.empty(width, np.float32)
    for b in range(start, stop):
        owner[b] = 0
        share[b] = _ZERO
        for n in range(num_objects):
            x1, y1, x2, y2 = boxes[b, n, 0], boxes[b, n, 1], boxes[b, n, 2], boxes[b, n, 3]
            if presence[b, n] <= _ZERO or x2 - x1 < _MIN_SIDE or y2 - y1 < _MIN_SIDE:
                continue
            top, bottom, _ = place(y1, y2, map_height, height, row_index, row_fraction, row_share)
            left, right, _ = place(
                x1, x2, map_width, width, column_index, column_fraction, column_share
            )
            if top >= bottom or left >= right:
                continue
            nearness = _ONE / (_ONE + np.exp(depth[b, n]))
            copy_with_ring(rgba[b, n], presence[b, n], nearness, floor, channels, ringed)
            for y in range(top, bottom):
                interpolate_row(flat_ringed, row_index[y], row_fraction[y], flat_row)
                for x in range(left, right):
                    i, f = column_index[x], column_fraction[x]
                    e, j = _ONE - f, i + np.uint64(1)
                    a = e * row[i, alpha] + f * row[j, alpha]
                    w = e * row[i, importance] + f * row[j, importance]
                    v = e * row[i, cover] + f * row[j, cover]
                    contrast = _ZERO
                    for k in range(num_colours):
                        colour = e * row[i, k] + f * row[j, k]
                        contrast = max(contrast, abs(colour - v * background[b, k, y, x]))
                    contrast *= a
                    if contrast > least and w * contrast > share[b, y, x]:
                        owner[b, y, x] = n + 1
                        share[b, y, x] = w * contrast


def owners_cpu(
    rgba: Tensor, boxes: Tensor, depth: Tensor, presence: Tensor, background: Tensor,
    floor: float, least: float,
) -> Tensor:  # fmt: skip
    """[B, H, W] int32: 1 + the index of the owner of each pixel, 0 where there is none."""
    batch, colours, height, width = background.shape
    owner = torch.empty(batch, height, width, dtype=torch.int32)
    share = torch.empty(batch, height, width, dtype=torch.float32)
    inputs = arrays(rgba, boxes, depth, presence, background)
    limits = np.float32(floor), np.float32(least)
    outputs = owner.numpy(), share.numpy()
    over_images(_owners, batch, *inputs, *limits, (0,) * colours, *outputs)
    return owner
