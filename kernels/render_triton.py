"""Triton twin of the renderer, forward: one launch, one program for each tile of each image.

A program tests 32 boxes at once against its tile and packs the results into a word, whose set bits
it then visits. No tensor has the size of objects times pixels. Functions that the backward pass
shares are here too. The formulas are those of `spairkit.kernels.render_cpu`.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from spairkit.kernels import constants
from spairkit.kernels.launch import on

MIN_SIDE = tl.constexpr(constants.MIN_SIDE)
_MIN_IMPORTANCE = tl.constexpr(constants.MIN_IMPORTANCE)
_HUGE = tl.constexpr(3.4028234663852886e38)  # the greatest float; infinity and NaN exceed it


@triton.jit
def axis_taps(pixel, low, high, TEXELS: tl.constexpr):
    """On one axis: whether a map covers a pixel, its first texel (from -1), the fraction beyond."""
    side = tl.where(high - low < MIN_SIDE, 1.0, high - low)
    position = (pixel.to(tl.float32) + 0.5 - low) * tl.div_rn(TEXELS * 1.0, side) - 0.5
    covered = (position > -1.0) & (position < TEXELS)
    position = tl.where(covered, position, 0.0)
    first = tl.floor(position)
    return covered, first.to(tl.int32), position - first


@triton.jit
def texel_values(
    map_ptr, row, column, here, channel, H: tl.constexpr, W: tl.constexpr, K: tl.constexpr
):
    """[P, K] float32 values of one texel for each pixel, and [P] 1 inside the map, else 0."""
    inside = here & (row >= 0) & (row < H) & (column >= 0) & (column < W)
    address = map_ptr + ((row * W + column) * K)[:, None] + channel[None, :]
    return tl.load(address, mask=inside[:, None], other=0.0).to(tl.float32), inside.to(tl.float32)


@triton.jit
def tap_weights(f, e):
    """Weights of the taps at (0, 0), (0, 1), (1, 0) and (1, 1), for fractions down and across."""
    w11 = f * e
    w10, w01 = f - w11, e - w11
    return 1.0 - f - w01, w01, w10, w11


@triton.jit
def weighted(w00, w01, w10, w11, t00, t01, t10, t11):
    """[P, K] interpolated values of four taps."""
    return w00[:, None] * t00 + w01[:, None] * t01 + w10[:, None] * t10 + w11[:, None] * t11


@triton.jit
def planes(ptr, b, y, x, channel, stride_b, stride_c, stride_y, stride_x, mask):
    """[P, K] values at pixels of an image, by strides; 0 beyond the mask."""
    pixel = (y * stride_y + x * stride_x)[:, None]
    return tl.load(ptr + b * stride_b + pixel + (channel * stride_c)[None, :], mask=mask, other=0.0)


@triton.jit
def picked(values, channel, C: tl.constexpr):
    """[P]: one channel of [P, K]."""
    return tl.sum(tl.where((channel == C)[None, :], values, 0.0), 1)


@triton.jit
def finite_box(x1, y1, x2, y2):
    # in this order: with both x first, LLVM fails an assertion for sm_100 (Triton 3.7.1)
    first = (tl.abs(x1) <= _HUGE) & (tl.abs(y1) <= _HUGE)
    return first & (tl.abs(x2) <= _HUGE) & (tl.abs(y2) <= _HUGE)


@triton.jit
def _render_forward_kernel(
    rgba_ptr,  # [B, N, h, w, C + 1]
    boxes_ptr,  # [B, N, 4] float32
    depth_ptr,  # [B, N] float32
    presence_ptr,  # [B, N] float32
    background_ptr,  # [B, C, H, W] float32, by strides
    image_ptr,  # [B, C, H, W] float32
    change_ptr,  # [B, C, H, W] float32
    inverse_ptr,  # [B, H, W] float32
    keep_ptr,  # [B, H, W] float32
    num_objects, height, width, tiles_x, tiles, stride_b, stride_c, stride_y, stride_x, floor,
    MAP_H: tl.constexpr, MAP_W: tl.constexpr,
    C: tl.constexpr,  # 1 or 3: with alpha a power of two
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, HAS_FLOOR: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    b = (program // tiles).to(tl.int64)
    tile = program % tiles
    top, left = (tile // tiles_x) * TILE_H, (tile % tiles_x) * TILE_W
    p = tl.arange(0, TILE_H * TILE_W)
    y, x = top + p // TILE_W, left + p % TILE_W
    on_image = (y < height) & (x < width)
    channel = tl.arange(0, C + 1)
    sums = tl.zeros([TILE_H * TILE_W, C + 1], tl.float32)
    covered = tl.zeros([TILE_H * TILE_W], tl.float32)
    total = tl.zeros([TILE_H * TILE_W], tl.float32)

    bit = tl.arange(0, 32)
    one = tl.full([32], 1, tl.uint32)
    start = 0
    while start < num_objects:
        n = start + bit
        exists = n < num_objects
        box_ptr = boxes_ptr + (b * num_objects + n) * 4
        x1 = tl.load(box_ptr, mask=exists, other=0.0)
        y1 = tl.load(box_ptr + 1, mask=exists, other=0.0)
        x2 = tl.load(box_ptr + 2, mask=exists, other=0.0)
        y2 = tl.load(box_ptr + 3, mask=exists, other=0.0)
        # an object reaches half a texel beyond its box
        reach_x, reach_y = (x2 - x1) * (0.5 / MAP_W), (y2 - y1) * (0.5 / MAP_H)
        meets = (x2 - x1 >= MIN_SIDE) & (y2 - y1 >= MIN_SIDE)
        meets &= (x1 - reach_x < left + TILE_W) & (x2 + reach_x > left)
        meets &= (y1 - reach_y < top + TILE_H) & (y2 + reach_y > top)
        # a box that is not finite is drawn too, as NaN
        meets = exists & (meets | (finite_box(x1, y1, x2, y2) == 0))
        bits = tl.sum(tl.where(meets, one << bit.to(tl.uint32), 0), 0).to(tl.uint32)
        while bits != 0:
            rest = bits & (bits - 1)
            lowest = bits ^ rest
            # the exponent of a power of two is its position
            n0 = start + ((lowest.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127)
            bits = rest
            item = b * num_objects + n0
            left_x, top_y = tl.load(boxes_ptr + item * 4), tl.load(boxes_ptr + item * 4 + 1)
            right_x, bottom_y = tl.load(boxes_ptr + item * 4 + 2), tl.load(boxes_ptr + item * 4 + 3)
            poison = tl.where(finite_box(left_x, top_y, right_x, bottom_y), 0.0, float("nan"))
            presence = tl.load(presence_ptr + item)
            nearness = 1.0 / (1.0 + tl.exp(tl.load(depth_ptr + item)))
            in_y, i, f = axis_taps(y, top_y, bottom_y, MAP_H)
            in_x, j, e = axis_taps(x, left_x, right_x, MAP_W)
            here = in_y & in_x & on_image
            map_ptr = rgba_ptr + item * (MAP_H * MAP_W * (C + 1))
            t00, m00 = texel_values(map_ptr, i, j, here, channel, MAP_H, MAP_W, C + 1)
            t01, m01 = texel_values(map_ptr, i, j + 1, here, channel, MAP_H, MAP_W, C + 1)
            t10, m10 = texel_values(map_ptr, i + 1, j, here, channel, MAP_H, MAP_W, C + 1)
            t11, m11 = texel_values(map_ptr, i + 1, j + 1, here, channel, MAP_H, MAP_W, C + 1)
            w00, w01, w10, w11 = tap_weights(f, e)
            value = weighted(w00, w01, w10, w11, t00, t01, t10, t11)
            cover = w00 * m00 + w01 * m01 + w10 * m10 + w11 * m11
            alpha = picked(value, channel, C) * presence
            if HAS_FLOOR:
                dim = presence * nearness
                importance = w00 * m00 * at_least(picked(t00, channel, C) * dim, floor)
                importance += w01 * m01 * at_least(picked(t01, channel, C) * dim, floor)
                importance += w10 * m10 * at_least(picked(t10, channel, C) * dim, floor)
                importance += w11 * m11 * at_least(picked(t11, channel, C) * dim, floor)
            else:
                importance = alpha * nearness
            blend = importance * alpha
            total += importance + poison
            covered += blend * cover
            sums += blend[:, None] * value
        start += 32

    colour = on_image[:, None] & (channel < C)[None, :]
    background = planes(
        background_ptr, b, y, x, channel, stride_b, stride_c, stride_y, stride_x, colour
    )
    untouched = total <= _MIN_IMPORTANCE  # written so that NaN stays NaN
    inverse = tl.where(untouched, 0.0, 1.0 / tl.where(untouched, 1.0, total))
    change = (sums - covered[:, None] * background) * inverse[:, None]
    pixel = y * width + x
    plane = b * C * height * width + pixel[:, None] + (channel * (height * width))[None, :]
    tl.store(image_ptr + plane, background + change, mask=colour)
    tl.store(change_ptr + plane, change, mask=colour)
    tl.store(inverse_ptr + b * height * width + pixel, inverse, mask=on_image)
    tl.store(keep_ptr + b * height * width + pixel, 1.0 - covered * inverse, mask=on_image)


@triton.jit
def at_least(value, floor):
    return tl.where(value < floor, floor, value)  # written so that NaN stays NaN


def forward_tile(num_objects: int) -> dict[str, int]:
    """Constants of the kernel: small tiles waste fewer pixels, large ones test fewer boxes."""
    if num_objects < 576:
        return {"TILE_H": 8, "TILE_W": 8, "num_warps": 1}
    return {"TILE_H": 16, "TILE_W": 16, "num_warps": 4}


def render_triton(
    rgba: Tensor, boxes: Tensor, depth: Tensor, presence: Tensor, background: Tensor, floor: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """image, change, inverse and keep; `render_backward_triton` needs the last three."""
    num_images, num_objects, map_height, map_width, _ = rgba.shape
    _, num_colours, height, width = background.shape
    empty = partial(torch.empty, device=rgba.device, dtype=torch.float32)
    image, change = empty(background.shape), empty(background.shape)
    inverse, keep = empty(num_images, height, width), empty(num_images, height, width)
    tile = forward_tile(num_objects)
    objects = (x.contiguous() for x in (rgba, boxes, depth, presence))
    tiles_x = triton.cdiv(width, tile["TILE_W"])
    tiles = tiles_x * triton.cdiv(height, tile["TILE_H"])
    if tiles * num_images:
        with on(rgba.device):
            _render_forward_kernel[(tiles * num_images,)](
                *objects, background, image, change, inverse, keep, num_objects, height, width,
                tiles_x, tiles, *background.stride(), floor,
                MAP_H=map_height, MAP_W=map_width, C=num_colours, HAS_FLOOR=floor > 0, **tile,
            )  # fmt: skip
    return image, change, inverse, keep
