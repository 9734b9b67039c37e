"""Triton twin of the composition of scenes: one launch, one program for a run of pixels.

Glyphs are pasted one after the other in registers, and only finished pixels are written. The
arithmetic is on integers up to the last division, so the bits are those of plain torch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from spairkit.kernels.launch import on

COMPOSE_BLOCK, COMPOSE_WARPS = 512, 4


@triton.jit
def _compose_kernel(
    table_ptr,  # [E, SIDE * SIDE] uint8
    entries_ptr,  # [B, N] int64
    corners_ptr,  # [B, N, 2] int64
    colours_ptr,  # [B, N, C] int32, by strides
    backgrounds_ptr,  # [B, C] int32
    images_ptr,  # [B, 3, H, W] float32
    num_glyphs, height, width, blocks, side, stride_b, stride_n, stride_c,
    C: tl.constexpr,  # 1 if all channels are alike, else 3
    CH: tl.constexpr,  # C rounded up to a power of two
    BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    b = (program // blocks).to(tl.int64)
    pixel = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    y, x = pixel // width, pixel % width
    exists = pixel < height * width
    channel = tl.arange(0, CH)
    in_colour = channel < C
    background = tl.load(backgrounds_ptr + b * C + channel, mask=in_colour, other=0)
    values = tl.zeros([CH, BLOCK], tl.int32) + background[:, None]
    k = 0
    while k < num_glyphs:
        glyph = b * num_glyphs + k
        entry = tl.load(entries_ptr + glyph)
        row = y - tl.load(corners_ptr + 2 * glyph).to(tl.int32)
        column = x - tl.load(corners_ptr + 2 * glyph + 1).to(tl.int32)
        inside = exists & (row >= 0) & (row < side) & (column >= 0) & (column < side)
        texel = entry * side * side + row * side + column
        alpha = tl.load(table_ptr + texel, mask=inside, other=0).to(tl.int32)[None, :]
        colour_ptr = colours_ptr + b * stride_b + k * stride_n
        colour = tl.load(colour_ptr + channel * stride_c, mask=in_colour, other=0)
        # to be divided by 255, rounded
        mixed = values * (255 - alpha) + colour[:, None] * alpha + 128
        values = (mixed + (mixed >> 8)) >> 8
        k += 1
    light = tl.div_rn(values.to(tl.float32), 255.0)
    # one channel is written three times
    plane = tl.arange(0, 4)
    plane_ptr = images_ptr + (b * 3 + plane[:, None]) * height * width
    written = (plane < 3)[:, None] & exists[None, :]
    tl.store(plane_ptr + pixel[None, :], tl.broadcast_to(light, [4, BLOCK]), mask=written)


def compose_triton(
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
    num_images, num_glyphs = entries.shape
    num_channels = backgrounds.shape[1]
    images = torch.empty(num_images, 3, height, width, device=table.device, dtype=torch.float32)
    blocks = triton.cdiv(height * width, COMPOSE_BLOCK)
    colours = colours.expand(num_images, num_glyphs, num_channels)
    if num_images:
        with on(table.device):
            _compose_kernel[(num_images * blocks,)](
                table, entries.contiguous(), corners.contiguous(), colours,
                backgrounds.contiguous(), images, num_glyphs, height, width, blocks, side,
                *colours.stride(), C=num_channels, CH=triton.next_power_of_2(num_channels),
                BLOCK=COMPOSE_BLOCK, num_warps=COMPOSE_WARPS,
            )  # fmt: skip
    return images
