"""Triton twin of the renderer, backward: one launch without atomics, so bits do not vary.

One program serves one object: it gathers the gradients of the pixels in its box and returns them to
the texels by two small products with the weights of the taps, Wy^T G Wx. Maps of more than 32
texels a side are cut into bands, one program each, and three small sums over the bands follow.
Further programs scale the gradient of the background. The formulas are those of
`spairkit.kernels.render_cpu`.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from spairkit.kernels.launch import on
from spairkit.kernels.render_triton import (
    MIN_SIDE,
    at_least,
    axis_taps,
    finite_box,
    picked,
    planes,
    tap_weights,
    texel_values,
    weighted,
)


@triton.jit
def _tap_weights(first, fraction, SIZE: tl.constexpr):
    """[P, SIZE]: the weight of every texel at every pixel, on one axis."""
    offset = tl.arange(0, SIZE)[None, :] - first[:, None]
    far = tl.where(offset == 1, fraction[:, None], 0.0)
    return tl.where(offset == 0, 1.0 - fraction[:, None], far)


@triton.jit
def _to_texels(
    values, wx, wy, acc, TILE_H: tl.constexpr, TILE_W: tl.constexpr, K: tl.constexpr,
    SIZE_H: tl.constexpr, SIZE_W: tl.constexpr,
):  # fmt: skip
    """acc + Wy^T values Wx for [P, K] values; acc is [SIZE_H, K * SIZE_W]."""
    by_channel = tl.permute(tl.reshape(values, [TILE_H, TILE_W, K]), (2, 0, 1))
    rows = tl.dot(tl.reshape(by_channel, [K * TILE_H, TILE_W]), wx, input_precision="ieee")
    rows = tl.permute(tl.reshape(rows, [K, TILE_H, SIZE_W]), (1, 0, 2))
    rows = tl.reshape(rows, [TILE_H, K * SIZE_W])
    return tl.dot(tl.trans(wy), rows, acc, input_precision="ieee")


@triton.jit
def _scale_background(
    grad_ptr, keep_ptr, grad_background_ptr, b, tile, height, width,
    stride_gb, stride_gc, stride_gy, stride_gx, C: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """grad_background = grad_image * keep on one run of pixels."""
    pixel = tile * TILE + tl.arange(0, TILE)
    here = pixel < height * width
    keep = tl.load(keep_ptr + b * height * width + pixel, mask=here, other=0.0)
    y, x = pixel // width, pixel % width
    for k in tl.static_range(C):
        grad = tl.load(
            grad_ptr + b * stride_gb + k * stride_gc + y * stride_gy + x * stride_gx,
            mask=here,
            other=0.0,
        )
        tl.store(grad_background_ptr + (b * C + k) * height * width + pixel, grad * keep, mask=here)


@triton.jit
def _pixels(low, high, first, limit, TEXELS: tl.constexpr, SIZE: tl.constexpr):
    """First pixel, and one after the last, that may touch the texels first .. first + SIZE."""
    texel = (high - low) * (1.0 / TEXELS)
    end = tl.minimum(first + SIZE, TEXELS)
    start = tl.floor(low + texel * (first - 0.5) - 0.5)
    stop = tl.ceil(low + texel * (end + 0.5) + 0.5)
    start = tl.minimum(tl.maximum(start, 0.0), limit * 1.0)
    return start.to(tl.int32), tl.minimum(tl.maximum(stop, 0.0), limit * 1.0).to(tl.int32)


@triton.jit
def _render_backward_kernel(
    grad_ptr,  # [B, C, H, W] float32, by strides
    rgba_ptr,  # [B, N, h, w, C + 1]
    boxes_ptr,  # [B, N, 4] float32
    depth_ptr,  # [B, N] float32
    presence_ptr,  # [B, N] float32
    background_ptr,  # [B, C, H, W] float32, by strides
    change_ptr,  # [B, C, H, W] float32
    inverse_ptr,  # [B, H, W] float32
    keep_ptr,  # [B, H, W] float32
    grad_rgba_ptr,  # [B, N, h, w, C + 1]
    grad_boxes_ptr,  # [B, N, BANDS, 4] float32
    grad_depth_ptr,  # [B, N, BANDS] float32
    grad_presence_ptr,  # [B, N, BANDS] float32
    grad_background_ptr,  # [B, C, H, W] float32
    num_objects, height, width,
    programs,  # objects, then runs of pixels, of one image
    stride_gb, stride_gc, stride_gy, stride_gx, stride_b, stride_c, stride_y, stride_x, floor,
    MAP_H: tl.constexpr, MAP_W: tl.constexpr,
    SIZE_H: tl.constexpr,  # texels of a band, which one program serves
    SIZE_W: tl.constexpr, BANDS: tl.constexpr, BANDS_W: tl.constexpr,
    C: tl.constexpr,  # 1 or 3: with alpha a power of two
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, RUN: tl.constexpr, HAS_FLOOR: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(0) // programs).to(tl.int64)
    n = tl.program_id(0) % programs
    if n >= num_objects * BANDS:
        _scale_background(
            grad_ptr, keep_ptr, grad_background_ptr, b, n - num_objects * BANDS, height, width,
            stride_gb, stride_gc, stride_gy, stride_gx, C, RUN,
        )  # fmt: skip
    else:
        part = b * num_objects * BANDS + n
        item = part // BANDS
        first_row = (n % BANDS) // BANDS_W * SIZE_H
        first_column = (n % BANDS) % BANDS_W * SIZE_W
        x1, y1 = tl.load(boxes_ptr + item * 4), tl.load(boxes_ptr + item * 4 + 1)
        x2, y2 = tl.load(boxes_ptr + item * 4 + 2), tl.load(boxes_ptr + item * 4 + 3)
        drawn = finite_box(x1, y1, x2, y2) & (x2 - x1 >= MIN_SIDE) & (y2 - y1 >= MIN_SIDE)
        # an object that is not drawn gets an empty range of pixels
        x1, x2 = tl.where(drawn, x1, -2.0), tl.where(drawn, x2, -1.0)
        y1, y2 = tl.where(drawn, y1, -2.0), tl.where(drawn, y2, -1.0)
        presence = tl.load(presence_ptr + item)
        nearness = 1.0 / (1.0 + tl.exp(tl.load(depth_ptr + item)))
        left, right = _pixels(x1, x2, first_column, width, MAP_W, SIZE_W)
        top, bottom = _pixels(y1, y2, first_row, height, MAP_H, SIZE_H)
        map_ptr = rgba_ptr + item * (MAP_H * MAP_W * (C + 1))

        p = tl.arange(0, TILE_H * TILE_W)
        channel = tl.arange(0, C + 1)
        is_alpha = (channel == C)[None, :]
        grad_map = tl.zeros([SIZE_H, (C + 1) * SIZE_W], tl.float32)
        # of the importance above a floor; as a fifth channel it would double their number
        grad_floored = tl.zeros([SIZE_H, SIZE_W], tl.float32)
        grad_x1 = tl.zeros([TILE_H * TILE_W], tl.float32)
        grad_x2 = tl.zeros([TILE_H * TILE_W], tl.float32)
        grad_y1 = tl.zeros([TILE_H * TILE_W], tl.float32)
        grad_y2 = tl.zeros([TILE_H * TILE_W], tl.float32)
        grad_presence = tl.zeros([TILE_H * TILE_W], tl.float32)
        grad_nearness = tl.zeros([TILE_H * TILE_W], tl.float32)
        tile_y = top
        while tile_y < bottom:
            tile_x = left
            while tile_x < right:
                y, x = tile_y + p // TILE_W, tile_x + p % TILE_W
                in_y, i, f = axis_taps(y, y1, y2, MAP_H)
                in_x, j, e = axis_taps(x, x1, x2, MAP_W)
                here = in_y & in_x & (y < bottom) & (x < right)
                colour = here[:, None] & (channel < C)[None, :]
                pixel = y * width + x
                inverse = tl.load(inverse_ptr + b * height * width + pixel, mask=here, other=0.0)
                plane = (
                    b * C * height * width + pixel[:, None] + (channel * (height * width))[None, :]
                )
                change = tl.load(change_ptr + plane, mask=colour, other=0.0)
                grad = planes(
                    grad_ptr, b, y, x, channel, stride_gb, stride_gc, stride_gy, stride_gx, colour
                )
                background = planes(
                    background_ptr, b, y, x, channel, stride_b, stride_c, stride_y, stride_x, colour
                )
                grad = grad * inverse[:, None]  # 0 for the channel of alpha
                uncovered = tl.sum(grad * background, 1)
                common = tl.sum(grad * change, 1)
                t00, m00 = texel_values(map_ptr, i, j, here, channel, MAP_H, MAP_W, C + 1)
                t01, m01 = texel_values(map_ptr, i, j + 1, here, channel, MAP_H, MAP_W, C + 1)
                t10, m10 = texel_values(map_ptr, i + 1, j, here, channel, MAP_H, MAP_W, C + 1)
                t11, m11 = texel_values(map_ptr, i + 1, j + 1, here, channel, MAP_H, MAP_W, C + 1)
                w00, w01, w10, w11 = tap_weights(f, e)
                value = weighted(w00, w01, w10, w11, t00, t01, t10, t11)
                cover = w00 * m00 + w01 * m01 + w10 * m10 + w11 * m11
                opacity = picked(value, channel, C)
                alpha = opacity * presence
                contrast = tl.sum(grad * value, 1) - uncovered * cover
                if HAS_FLOOR:
                    dim = presence * nearness
                    g00 = m00 * at_least(picked(t00, channel, C) * dim, floor)
                    g01 = m01 * at_least(picked(t01, channel, C) * dim, floor)
                    g10 = m10 * at_least(picked(t10, channel, C) * dim, floor)
                    g11 = m11 * at_least(picked(t11, channel, C) * dim, floor)
                    importance = w00 * g00 + w01 * g01 + w10 * g10 + w11 * g11
                    grad_importance = alpha * contrast - common
                    grad_alpha = importance * contrast
                else:
                    importance = alpha * nearness
                    grad_importance = alpha * contrast - common
                    grad_alpha = importance * contrast + grad_importance * nearness
                blend = importance * alpha
                grad_value = tl.where(
                    is_alpha, (grad_alpha * presence)[:, None], grad * blend[:, None]
                )
                # the loss's derivative by the weight of each tap; differences give the slopes
                s00 = tl.sum(grad_value * t00, 1) - uncovered * blend * m00
                s01 = tl.sum(grad_value * t01, 1) - uncovered * blend * m01
                s10 = tl.sum(grad_value * t10, 1) - uncovered * blend * m10
                s11 = tl.sum(grad_value * t11, 1) - uncovered * blend * m11
                if HAS_FLOOR:
                    s00 += grad_importance * g00
                    s01 += grad_importance * g01
                    s10 += grad_importance * g10
                    s11 += grad_importance * g11
                slope_x = (s01 - s00) + f * ((s11 - s10) - (s01 - s00))
                slope_y = (s10 - s00) + e * ((s11 - s01) - (s10 - s00))
                to_presence, to_nearness = grad_alpha * opacity, grad_importance * alpha
                if BANDS > 1:
                    # a pixel between two bands belongs to that of its first texel
                    own_y = (tl.maximum(i, 0) >= first_row) & (i < first_row + SIZE_H)
                    own_x = (tl.maximum(j, 0) >= first_column) & (j < first_column + SIZE_W)
                    own = own_y & own_x
                    slope_x, slope_y = tl.where(own, slope_x, 0.0), tl.where(own, slope_y, 0.0)
                    to_presence = tl.where(own, to_presence, 0.0)
                    to_nearness = tl.where(own, to_nearness, 0.0)
                grad_presence += to_presence
                grad_nearness += to_nearness
                share_x = (x.to(tl.float32) + 0.5 - x1) / (x2 - x1)
                share_y = (y.to(tl.float32) + 0.5 - y1) / (y2 - y1)
                grad_x1 -= slope_x * (1.0 - share_x)
                grad_x2 -= slope_x * share_x
                grad_y1 -= slope_y * (1.0 - share_y)
                grad_y2 -= slope_y * share_y

                _in, column, beyond_x = axis_taps(tile_x + tl.arange(0, TILE_W), x1, x2, MAP_W)
                _in, row, beyond_y = axis_taps(tile_y + tl.arange(0, TILE_H), y1, y2, MAP_H)
                wx = _tap_weights(column - first_column, beyond_x, SIZE_W)
                wy = _tap_weights(row - first_row, beyond_y, SIZE_H)
                grad_map = _to_texels(
                    grad_value, wx, wy, grad_map, TILE_H, TILE_W, C + 1, SIZE_H, SIZE_W
                )
                if HAS_FLOOR:
                    grad_floored = _to_texels(
                        grad_importance, wx, wy, grad_floored, TILE_H, TILE_W, 1, SIZE_H, SIZE_W
                    )
                tile_x += TILE_W
            tile_y += TILE_H

        r = first_row + tl.arange(0, SIZE_H)[:, None, None]
        c = first_column + tl.arange(0, SIZE_W)[None, :, None]
        k = channel[None, None, :]
        texel = (r * MAP_W + c) * (C + 1) + k
        in_map = (r < MAP_H) & (c < MAP_W)
        grads = tl.permute(tl.reshape(grad_map, [SIZE_H, C + 1, SIZE_W]), (0, 2, 1))
        here_presence, here_nearness = tl.sum(grad_presence, 0), tl.sum(grad_nearness, 0)
        if HAS_FLOOR:
            in_alpha = in_map & (k == C)
            opacities = tl.load(map_ptr + texel, mask=in_alpha, other=0.0).to(tl.float32)
            above = in_alpha & (opacities * (presence * nearness) >= floor)
            # importance gets a gradient only above the floor
            grad_above = tl.where(above, grad_floored[:, :, None], 0.0)
            grads += grad_above * (presence * nearness)
            total = tl.sum(tl.reshape(grad_above * opacities, [SIZE_H * SIZE_W * (C + 1)]), 0)
            here_presence += total * nearness
            here_nearness = total * presence
        tl.store(grad_rgba_ptr + item * (MAP_H * MAP_W * (C + 1)) + texel, grads, mask=in_map)
        x_scale, y_scale = MAP_W / (x2 - x1), MAP_H / (y2 - y1)
        tl.store(grad_boxes_ptr + part * 4, tl.sum(grad_x1, 0) * x_scale)
        tl.store(grad_boxes_ptr + part * 4 + 1, tl.sum(grad_y1, 0) * y_scale)
        tl.store(grad_boxes_ptr + part * 4 + 2, tl.sum(grad_x2, 0) * x_scale)
        tl.store(grad_boxes_ptr + part * 4 + 3, tl.sum(grad_y2, 0) * y_scale)
        tl.store(grad_presence_ptr + part, here_presence)
        tl.store(grad_depth_ptr + part, -here_nearness * nearness * (1.0 - nearness))


def backward_tile(map_height: int, map_width: int) -> dict[str, int]:
    """Constants of the kernel: tiles of pixels and bands of the map.

    A program holds the gradient of its band in registers, which suffice for 32 texels a side.
    """
    rows, columns = (
        min(32, max(16, triton.next_power_of_2(side))) for side in (map_height, map_width)
    )
    bands_x = triton.cdiv(map_width, columns)
    return {
        "MAP_H": map_height,
        "MAP_W": map_width,
        "SIZE_H": rows,
        "SIZE_W": columns,
        "BANDS": bands_x * triton.cdiv(map_height, rows),
        "BANDS_W": bands_x,
        "TILE_H": 16,
        "TILE_W": 16,
        "RUN": 1024,  # pixels of the background whose gradients one program scales
        "num_warps": 8,
    }


def register_limit(map_side: int, floor: float) -> dict[str, int]:
    """The option of a launch that bounds the registers of a thread, where none spills by it.

    Left alone, the assembler takes 173 for maps of 14 texels a side with a floor, and then a
    multiprocessor holds one block; at 104 it holds two. AMD's compiler has no such option.
    """
    if floor == 0 or map_side > 16 or torch.version.hip:
        return {}
    return {"maxnreg": 104}


def render_backward_triton(
    grad_image: Tensor, rgba: Tensor, boxes: Tensor, depth: Tensor, presence: Tensor,
    background: Tensor, change: Tensor, inverse: Tensor, keep: Tensor, floor: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of rgba (in its own dtype), boxes, depth, presence and background."""
    num_images, num_objects, map_height, map_width, _ = rgba.shape
    _, num_colours, height, width = background.shape
    tile = backward_tile(map_height, map_width)
    parts = num_images, num_objects, tile["BANDS"]
    grad_rgba = torch.empty(rgba.shape, dtype=rgba.dtype, device=rgba.device)
    empty = partial(torch.empty, device=rgba.device, dtype=torch.float32)
    grad_boxes, grad_depth, grad_presence = empty(*parts, 4), empty(parts), empty(parts)
    grad_background = empty(background.shape)
    objects = (x.contiguous() for x in (rgba, boxes, depth, presence))
    saved = (x.contiguous() for x in (change, inverse, keep))
    programs = num_objects * tile["BANDS"] + triton.cdiv(height * width, tile["RUN"])
    if programs * num_images:
        with on(rgba.device):
            _render_backward_kernel[(programs * num_images,)](
                grad_image, *objects, background, *saved, grad_rgba, grad_boxes, grad_depth,
                grad_presence, grad_background, num_objects, height, width, programs,
                *grad_image.stride(), *background.stride(), floor,
                C=num_colours, HAS_FLOOR=floor > 0, **tile,
                **register_limit(max(map_height, map_width), floor),
            )  # fmt: skip
    grad_boxes, grad_depth, grad_presence = (
        part.squeeze(2) if tile["BANDS"] == 1 else part.sum(2)
        for part in (grad_boxes, grad_depth, grad_presence)
    )
    return grad_rgba, grad_boxes, grad_depth, grad_presence, grad_background
