"""The paper's placement of squares, for a batch of images at once and without rejection."""

import torch
from torch import Tensor

from spairkit.data.hashing import below


def scatter(
    draws: Tensor,  # [B, N] int64
    counts: Tensor,  # [B]
    sides: Tensor,  # [B, N] int64
    *,
    least_side: int,
    greatest_side: int,
    height: int,
    width: int,
    max_overlap_px2: int,
) -> tuple[Tensor, Tensor]:  # [B, N, 2] int64, [B] bool
    """Places squares one after another, each uniformly among the positions allowed to it.

    A position is allowed if the whole square lies inside the image and the overlaps with the
    squares placed before it sum to at most `max_overlap_px2`. The paper draws positions until
    one is allowed (docs/model.md 10), which gives the same distribution.

    The overlap of two squares is the product of the rows and the columns that they share, so
    the map of summed overlaps is a matrix product. It is exact in float32 as far as it matters:
    its terms are integers, and what could be rounded, sums from 2^24 on, is beyond any limit.

    Args:
        draws: [B, N] int64 in [0, 2^32), one for each square.
        counts: [B]. Squares from this one on may find no place.
        sides: [B, N] int64, pixels, from `least_side` to `greatest_side`.
        least_side: pixels.
        greatest_side: pixels.
        height: of the image, pixels.
        width: of the image, pixels.
        max_overlap_px2: square pixels, less than 2^24.

    Returns:
        [B, N, 2] int64: top and left of each square, pixels, 0 where it found no place; and
        [B] bool: whether the first `counts` of the image found theirs.
    """
    num_images, num_squares = draws.shape
    length = max(height, width) - least_side + 1
    starts = torch.arange(length, device=draws.device).float()  # [M], of rows and columns alike
    spans = sides.float()[:, :, None, None]
    ends = starts + spans  # [B, N, 1, M]
    limits = torch.full((2, 1), height, device=draws.device)
    limits[1] = width
    inside = ends <= limits  # [B, N, 2, M]
    ragged = height != width or least_side != greatest_side
    low = torch.zeros(num_images, num_squares, 2, 1, device=draws.device)
    high = torch.zeros_like(low)
    found = torch.ones(num_images, num_squares, dtype=torch.bool, device=draws.device)
    for k in range(num_squares):
        shared = torch.minimum(ends[:, k, None], high[:, :k])
        shared = shared.sub_(torch.maximum(starts, low[:, :k])).clamp_(min=0)  # [B, k, 2, M]
        rows, columns = shared.unbind(2)
        allowed = (rows.mT @ columns).le_(max_overlap_px2)  # [B, M, M], 0 or 1
        if ragged:
            allowed *= inside[:, k, 0, :, None]
            allowed *= inside[:, k, 1, None, :]
        before = allowed.flatten(1).cumsum(1, dtype=torch.int32)
        total = before[:, -1:]
        number = below(draws[:, k, None], total).int()
        place = torch.searchsorted(before, number, right=True)
        place = torch.where(total > 0, place, 0)
        corner = torch.cat([place // length, place % length], dim=1)[:, :, None]  # [B, 2, 1]
        low[:, k] = corner
        high[:, k] = corner + spans[:, k]
        found[:, k] = total[:, 0] > 0
    unwanted = torch.arange(num_squares, device=draws.device) >= counts[:, None]
    return low.squeeze(3).long(), (found | unwanted).all(1)
