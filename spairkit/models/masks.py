"""Masks of owned pixels, and the boxes drawn round them.

Every pixel belongs to the object that contributes most to it in the composited image. The mask of
an object is the part of its pixels that the image itself supports.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from spairkit.backends import runs_compiled
from spairkit.kernels.constants import MIN_SIDE
from spairkit.rendering import taps

LEAST_CONTRAST = 0.01
"""Contrast to the background that an object must make alone to own a pixel."""

HEIGHT_PERCENTILE = 80
"""An object's height is this percentile of the image's contrast over its pixels."""


@dataclass(frozen=True)
class Masks:
    """The masks of the objects of one image."""

    label_image: npt.NDArray[np.int32]  # [H, W] 1 + the slot of the object, 0 elsewhere
    slots: npt.NDArray[np.int64]  # [m] slots whose mask has a pixel, ascending
    boxes: npt.NDArray[np.float32]  # [m, 4] xyxy, px, round their masks


def owners(
    maps: Tensor,  # [B, N, P, P, 4] colour and alpha in [0, 1]
    boxes: Tensor,  # [B, N, 4] xyxy, px
    depth: Tensor,  # [B, N]
    presence: Tensor,  # [B, N] in [0, 1]
    background: Tensor,  # [B, 3, 1, 1]
    size: tuple[int, int],  # height and width, px
    importance_floor: float,
) -> Tensor:  # [B, H, W] int32, CPU
    """1 + the slot that owns each pixel, 0 where there is none.

    In the notation of `render`, the contrast of an object at a pixel is alpha' max_c |o'_c -
    background_c|, and the owner is the object with the greatest gamma' times contrast, of those
    whose contrast exceeds `LEAST_CONTRAST`; the first of equals.
    """
    maps, boxes, depth, presence, background = (
        x.detach().cpu() for x in (maps, boxes, depth, presence, background)
    )
    background = background.expand(-1, -1, *size)
    if not runs_compiled(maps, boxes, depth, presence, background):
        return owners_by_torch(maps, boxes, depth, presence, background, importance_floor)
    from spairkit.kernels.owners_cpu import owners_cpu

    return owners_cpu(maps, boxes, depth, presence, background, importance_floor, LEAST_CONTRAST)


def owners_by_torch(
    maps: Tensor,
    boxes: Tensor,
    depth: Tensor,
    presence: Tensor,
    background: Tensor,  # [B, 3, H, W]
    importance_floor: float,
) -> Tensor:
    """The result of `owners` by plain torch, object by object, in any dtype."""
    height, width = background.shape[-2:]
    colour, alpha = maps[..., :3], maps[..., 3:] * presence[..., None, None, None]
    importance = alpha * torch.sigmoid(-depth)[..., None, None, None]
    importance = importance.clamp(min=importance_floor)
    values = torch.cat([colour, torch.ones_like(alpha), alpha, importance], dim=-1)
    x1, y1, x2, y2 = boxes.unbind(-1)
    empty = (x2 - x1 < MIN_SIDE) | (y2 - y1 < MIN_SIDE) | (presence <= 0)
    rows = taps(y1, y2, empty, maps.shape[2], height)  # [B, N, H, P]
    columns = taps(x1, x2, empty, maps.shape[3], width)  # [B, N, W, P]
    owner = torch.zeros(len(maps), height, width, dtype=torch.int32)
    most = maps.new_zeros(len(maps), height, width)
    for n in range(presence.shape[1]):
        here = values[:, n].permute(0, 3, 1, 2)  # [B, 6, P, P]
        here = rows[:, n, None] @ here @ columns[:, n, None].mT  # [B, 6, H, W]
        contrast = here[:, 4] * (here[:, :3] - here[:, 3:4] * background).abs().amax(1)
        share = here[:, 5] * contrast
        owns = (contrast > LEAST_CONTRAST) & (share > most)
        owner = torch.where(owns, n + 1, owner)
        most = torch.where(owns, share, most)
    return owner


def masks_of(
    owner: npt.NDArray[np.int32],  # [H, W] as from `owners`
    contrast: npt.NDArray[np.float32],  # [H, W] of the image to the background
    share: float,
) -> Masks:
    """Each object's pixels where the image's contrast exceeds `share` of the object's height.

    The height is the `HEIGHT_PERCENTILE` of the image's contrast over the pixels that the object
    owns, so a single bright pixel does not count, and with .5 a mask ends at half the height of a
    blurred object.
    """
    labels = np.zeros(owner.shape, np.int32)
    place = np.flatnonzero(owner)
    label, value = owner.flat[place], contrast.flat[place]
    order = np.lexsort((value, label))
    place, label, value = place[order], label[order], value[order]
    start = _starts(label)
    length = np.append(start[1:], len(label)) - start
    height = value[start + (length - 1) * HEIGHT_PERCENTILE // 100]
    kept = value > share * np.repeat(height, length)
    place, label = place[kept], label[kept]
    labels.flat[place] = label
    start = _starts(label)
    if not len(start):
        return Masks(labels, np.zeros(0, np.int64), np.zeros((0, 4), np.float32))
    y, x = np.divmod(place, owner.shape[1])
    low = [np.minimum.reduceat(axis, start) for axis in (x, y)]
    high = [np.maximum.reduceat(axis, start) + 1 for axis in (x, y)]
    boxes = np.stack(low + high, axis=-1).astype(np.float32)
    return Masks(labels, label[start].astype(np.int64) - 1, boxes)


def _starts(label: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    """Index of the first of each run of equal labels; labels are above 0."""
    starts = np.flatnonzero(label[1:] != label[:-1]) + 1
    return np.concatenate([np.zeros(min(len(label), 1), np.int64), starts])
