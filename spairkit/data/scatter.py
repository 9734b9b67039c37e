"""The paper's placement of squares, for a batch of images at once and without rejection."""

from dataclasses import dataclass

import torch
from torch import Tensor

from spairkit.data.hashing import below


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the squares of a batch of images came to lie."""

    tops: Tensor  # [B, N] int64, pixels
    lefts: Tensor  # [B, N] int64, pixels
    complete: Tensor  # [B] bool, whether every square found a place


def scatter(
    bits: Tensor,  # [B, N] int64
    counts: Tensor,  # [B]
    sides: Tensor,  # [B, N] int64
    *,
    least_side: int,
    height: int,
    width: int,
    max_overlap_px2: int,
) -> Layout:
    """Places squares one after another, each uniformly among the positions allowed to it.

    A position is allowed if the whole square lies inside the image and the overlaps with the
    squares placed before it sum to at most `max_overlap_px2`. The paper draws positions until
    one is allowed (spec section 10), which gives the same distribution. The overlap with a
    square is the product of an overlap of rows and one of columns, so that the map of summed
    overlaps is a matrix product; it is exact in float32, since its terms are integers whose sum
    stays below 2^24.

    Args:
        bits: [B, N] int64 random bits, one word for each square.
        counts: [B] int64. Squares from here on are not placed: their entries mean nothing.
        sides: [B, N] int64, pixels, at least `least_side`.
        least_side: the least side there can be; it fixes the size of the map.
        height: of the image, pixels.
        width: of the image, pixels.
        max_overlap_px2: square pixels.
    """
    num_images, num_squares = bits.shape
    device = bits.device
    tops = torch.zeros(num_images, num_squares, dtype=torch.int64, device=device)
    lefts = torch.zeros_like(tops)
    complete = torch.ones(num_images, dtype=torch.bool, device=device)
    rows = torch.arange(height - least_side + 1, device=device)  # [Y]
    columns = torch.arange(width - least_side + 1, device=device)  # [X]
    images = torch.arange(num_images, device=device)
    for k in range(num_squares):
        side = sides[:, k, None]  # [B, 1]
        shared_rows = _shared(rows, side, tops[:, :k], sides[:, :k])  # [B, k, Y]
        shared_columns = _shared(columns, side, lefts[:, :k], sides[:, :k])  # [B, k, X]
        overlap = shared_rows.transpose(1, 2) @ shared_columns  # [B, Y, X]
        allowed = overlap <= max_overlap_px2
        # a side beyond the least leaves the last rows and columns no room
        allowed &= (rows <= height - side)[:, :, None] & (columns <= width - side)[:, None, :]
        before = allowed.sum(2).cumsum(1)  # [B, Y]
        total = before[:, -1]
        # the place with this number in raster order: first its row, then its column
        number = below(bits[:, k], total)[:, None]
        top = (before <= number).sum(1).clamp(max=len(rows) - 1)
        number = number - torch.where(top > 0, before[images, top - 1], 0)[:, None]
        left = (allowed[images, top].cumsum(1) <= number).sum(1).clamp(max=len(columns) - 1)
        tops[:, k], lefts[:, k] = top, left
        complete &= (total > 0) | (counts <= k)
    return Layout(tops, lefts, complete)


def _shared(starts: Tensor, side: Tensor, others: Tensor, other_sides: Tensor) -> Tensor:
    """Pixels that [start, start + side) shares with other intervals: [Y], [B, 1], [B, k] twice."""
    low = torch.maximum(starts, others[:, :, None])
    high = torch.minimum(starts + side[:, :, None], (others + other_sides)[:, :, None])
    return (high - low).clamp(min=0).float()  # [B, k, Y]
