"""Scenes on a GPU as two operators of torch, with shapes for tracing."""

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.library.custom_op("spairkit::scatter", mutates_args=())
def scatter_op(
    keys: Tensor,  # [B] int64
    counts: Tensor,  # [B] int64
    num_squares: int, least_side: int, greatest_side: int, height: int, width: int,
    max_overlap_px2: int, max_attempts: int,
    words: Sequence[int],  # the first one, words of a square, words of an attempt
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Corners [B, N, 2] and sides [B, N], int64, and whether each scene is complete [B], bool.

    Squares of an incomplete scene, or beyond a scene's count, have corner 0 and the least side.
    Runs on GPUs; elsewhere `spairkit.data.scenes` uses plain torch.
    """
    from spairkit.kernels.scenes_layout_triton import scatter_triton

    return scatter_triton(
        keys, counts, num_squares, least_side, greatest_side, height, width, max_overlap_px2,
        max_attempts, words,
    )  # fmt: skip


@scatter_op.register_fake
def _(keys, counts, num_squares, *_):
    num_images = len(keys)
    return (
        keys.new_empty(num_images, num_squares, 2),
        keys.new_empty(num_images, num_squares),
        keys.new_empty(num_images, dtype=torch.bool),
    )


@torch.library.custom_op("spairkit::compose", mutates_args=())
def compose_op(
    table: Tensor,  # [E, side * side] uint8, opacity of the pixels of each glyph
    entries: Tensor,  # [B, N] int64, rows of the table
    corners: Tensor,  # [B, N, 2] int64, top and left, pixels
    colours: Tensor,  # [B or 1, N or 1, C] int32, 0 to 255; C is 1 where channels are alike, else 3
    backgrounds: Tensor,  # [B, C] int32, 0 to 255
    height: int,
    width: int,
    side: int,
) -> Tensor:
    """Images [B, 3, H, W] in [0, 1]: glyphs pasted in turn, each time rounded to a byte."""
    from spairkit.kernels.scenes_compose_triton import compose_triton

    return compose_triton(table, entries, corners, colours, backgrounds, height, width, side)


@compose_op.register_fake
def _(table, entries, corners, colours, backgrounds, height, width, side):
    return table.new_empty(len(entries), 3, height, width, dtype=torch.float32)
