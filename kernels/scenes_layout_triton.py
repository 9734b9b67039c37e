"""Triton twin of the placement of squares: one launch, one program for each scene.

A program makes all attempts itself, so the host need not know which scenes have to start again. The
arithmetic is on integers and equals that of `spairkit.data.scenes`, which explains the rule, and
`spairkit.data.hashing` to the bit.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from spairkit.kernels.constants import SPLITMIX64
from spairkit.kernels.launch import on

# as int64
_GOLDEN, _FIRST, _SECOND = (tl.constexpr(word - (1 << 64)) for word in SPLITMIX64)

_MAX_POSITIONS = 4096  # of a tile
_POSITIONS_PER_THREAD = 8


@triton.jit
def _random(key, counter):
    """int64 in [0, 2^32), the upper half of splitmix64; products wrap around."""
    bits = key + (counter + 1) * _GOLDEN
    bits = (bits ^ ((bits >> 30) & 0x3FFFFFFFF)) * _FIRST
    bits = (bits ^ ((bits >> 27) & 0x1FFFFFFFFF)) * _SECOND
    bits = bits ^ ((bits >> 31) & 0x1FFFFFFFF)
    return (bits >> 32) & 0xFFFFFFFF


@triton.jit
def _below(random, bound):
    """int32 in [0, bound)."""
    return ((random * bound) >> 32).to(tl.int32)


@triton.jit
def _picked(values, n, k):
    """Entry k of a vector."""
    return tl.sum(tl.where(n == k, values, 0), 0)


@triton.jit
def _shared(start, side, other_start, other_side):
    """Pixels that two squares share on one axis."""
    end = tl.minimum(start + side, other_start + other_side)
    return tl.maximum(end - tl.maximum(start, other_start), 0)


@triton.jit
def _allowed(y, x, k, side, n, tops, lefts, sides, rows, columns, max_overlap_px2):
    """[ROWS, COLUMNS] int32: 1 where square k may lie, given those placed before it."""
    overlap = tl.zeros([y.shape[0], x.shape[0]], tl.int32)
    j = 0
    while j < k:
        other = _picked(sides, n, j)
        down = _shared(y, side, _picked(tops, n, j), other)
        across = _shared(x, side, _picked(lefts, n, j), other)
        overlap += down[:, None] * across[None, :]
        j += 1
    inside = (y < rows)[:, None] & (x < columns)[None, :]
    return (inside & (overlap <= max_overlap_px2)).to(tl.int32)


@triton.jit
def _scatter_kernel(
    keys_ptr,  # [B] int64
    counts_ptr,  # [B] int64
    corners_ptr,  # [B, N, 2] int64
    sides_ptr,  # [B, N] int64
    complete_ptr,  # [B] bool
    num_squares, least_side, num_sides, height, width, max_overlap_px2, max_attempts,
    FIRST_WORD: tl.constexpr, SQUARE_WORDS: tl.constexpr, ATTEMPT_WORDS: tl.constexpr,
    SQUARES: tl.constexpr,  # N rounded up to a power of two
    ROWS: tl.constexpr,  # of positions in a tile
    COLUMNS: tl.constexpr,  # all that a square may have
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    key = tl.load(keys_ptr + b)
    count = tl.load(counts_ptr + b).to(tl.int32)
    n = tl.arange(0, SQUARES)
    row, x = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    tops = tl.zeros([SQUARES], tl.int32)
    lefts = tl.zeros([SQUARES], tl.int32)
    sides = tl.zeros([SQUARES], tl.int32)
    found = 0
    attempt = 0
    while (found == 0) & (attempt < max_attempts):
        word = FIRST_WORD + n.to(tl.int64) * SQUARE_WORDS + attempt * ATTEMPT_WORDS
        sides = least_side + _below(_random(key, word), num_sides)
        places = _random(key, word + 1)
        found = 1
        k = 0
        while (k < count) & (found == 1):
            side = _picked(sides, n, k)
            rows, columns = height - side + 1, width - side + 1
            allowed = tl.zeros([ROWS, COLUMNS], tl.int32)
            before, total = 0, 0  # allowed positions above the tile, and down to its end
            top = 0
            while top < rows:
                allowed = _allowed(
                    top + row, x, k, side, n, tops, lefts, sides, rows, columns, max_overlap_px2
                )
                before = total
                total += tl.sum(tl.sum(allowed, 1), 0)
                top += ROWS
            top -= ROWS
            number = _below(_picked(places, n, k), total)
            # back to the tile that holds this position
            while before > number:
                top -= ROWS
                allowed = _allowed(
                    top + row, x, k, side, n, tops, lefts, sides, rows, columns, max_overlap_px2
                )
                before -= tl.sum(tl.sum(allowed, 1), 0)
            in_row = tl.sum(allowed, 1)
            above = before + tl.cumsum(in_row, 0) - in_row
            rank = above[:, None] + tl.cumsum(allowed, 1) - allowed
            position = row[:, None] * COLUMNS + x[None, :]
            chosen = tl.where((allowed == 1) & (rank == number), position, 0)
            chosen = tl.sum(tl.sum(chosen, 1), 0)
            tops = tl.where(n == k, top + chosen // COLUMNS, tops)
            lefts = tl.where(n == k, chosen % COLUMNS, lefts)
            found = tl.where(total > 0, 1, 0)
            k += 1
        attempt += 1
    exists = n < num_squares
    placed = (n < count) & (found == 1)
    square = b * num_squares + n
    tl.store(corners_ptr + 2 * square, tl.where(placed, tops, 0).to(tl.int64), mask=exists)
    tl.store(corners_ptr + 2 * square + 1, tl.where(placed, lefts, 0).to(tl.int64), mask=exists)
    tl.store(sides_ptr + square, tl.where(placed, sides, least_side).to(tl.int64), mask=exists)
    tl.store(complete_ptr + b, found == 1)


def scatter_tile(num_squares: int, rows: int, columns: int) -> dict[str, int]:
    """Constants of the kernel, from the greatest numbers of squares, rows and columns."""
    tile_columns = int(triton.next_power_of_2(columns))
    tile_rows = min(int(triton.next_power_of_2(rows)), max(_MAX_POSITIONS // tile_columns, 1))
    warps = tile_rows * tile_columns // (32 * _POSITIONS_PER_THREAD)
    return {
        "SQUARES": int(triton.next_power_of_2(max(num_squares, 1))),
        "ROWS": tile_rows,
        "COLUMNS": tile_columns,
        "num_warps": max(warps, 1),
    }


def scatter_triton(
    keys: Tensor,  # [B] int64
    counts: Tensor,  # [B] int64
    num_squares: int,
    max_attempts: int,
    words: Sequence[int],  # the first one, words of a square, words of an attempt
    *,
    least_side: int,
    greatest_side: int,
    height: int,
    width: int,
    max_overlap_px2: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Corners [B, N, 2] and sides [B, N], int64, and whether each scene is complete [B], bool.

    Squares of an incomplete scene, or beyond a scene's count, have corner 0 and the least side.
    """
    num_images = len(keys)
    corners = torch.empty(num_images, num_squares, 2, dtype=torch.int64, device=keys.device)
    sides = torch.empty(num_images, num_squares, dtype=torch.int64, device=keys.device)
    complete = torch.empty(num_images, dtype=torch.bool, device=keys.device)
    first_word, square_words, attempt_words = words
    if num_images:
        with on(keys.device):
            _scatter_kernel[(num_images,)](
                keys.contiguous(), counts.contiguous(), corners, sides, complete, num_squares,
                least_side, greatest_side - least_side + 1, height, width, max_overlap_px2,
                max_attempts,
                FIRST_WORD=first_word, SQUARE_WORDS=square_words, ATTEMPT_WORDS=attempt_words,
                **scatter_tile(num_squares, height - least_side + 1, width - least_side + 1),
            )  # fmt: skip
    return corners, sides, complete
