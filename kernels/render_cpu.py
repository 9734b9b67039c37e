"""Numba twin of the renderer, float32, forward and backward: no compiler needed at install.

An object's map is copied into a buffer with a ring of zeros, so that the taps of a pixel need no
tests at the rim. Its channels are C colours, cover (1 on every texel: what is missing is
background), alpha * presence, and importance. Rows are interpolated once for each row of pixels,
then each pixel takes two taps; the gradients go back the same way. Nothing is of the size of
objects times pixels.

With g the gradient of a pixel, Z its summed importance, `change` = image - background, and
for an object with alpha' = a, importance' = w, interpolated colour c and cover v:

    d c_k = w a g_k / Z       d w = a e - q       d a = w e       e = sum_k g_k / Z (c_k - v bg_k)
    d v = -w a sum_k g_k bg_k / Z                                 q = sum_k g_k / Z change_k
"""

import numpy as np
import torch
from torch import Tensor

from spairkit.kernels.constants import MIN_IMPORTANCE, MIN_SIDE
from spairkit.kernels.threads import arrays, compiled, inlined, over_images

_HALF = np.float32(0.5)
_ONE = np.float32(1.0)
_ZERO = np.float32(0.0)
_MIN_SIDE = np.float32(MIN_SIDE)
_MIN_IMPORTANCE = np.float32(MIN_IMPORTANCE)
_NEXT = np.uint64(1)


@inlined
def place(low, high, num_texels, num_pixels, index, fraction, share):
    """First pixel that a map covers on one axis, and one after the last, with the texels per pixel.

    Fills taps, fractions and shares of the box. Indices are unsigned, because Numba tests a signed
    one at every use for being negative.
    """
    scale = np.float32(num_texels) / (high - low)
    pad = _HALF / scale + _HALF
    limit = np.float32(num_pixels)
    first = int(min(max(np.floor(low - pad), _ZERO), limit))
    last = int(min(max(np.ceil(high + pad), _ZERO), limit))
    start = last
    stop = first
    for p in range(first, last):
        # counted from the ring: 0 and num_texels + 1 are on it, where the map ends
        position = (np.float32(p) + _HALF - low) * scale + _HALF
        if position > _ZERO and position < np.float32(num_texels + 1):
            start = min(start, p)
            stop = p + 1
            tap = min(int(position), num_texels)
            index[p] = tap
            fraction[p] = position - np.float32(tap)
            share[p] = (np.float32(p) + _HALF - low) / (high - low)
    return np.uint64(start), np.uint64(stop), scale


@inlined
def copy_with_ring(rgba, presence, nearness, floor, channels, ringed):
    """Copies a map [h, w, C + 1] into the inside of `ringed` [h + 2, w + 2, C + 3]."""
    num_colours = len(channels)
    for r in range(rgba.shape[0]):
        for c in range(rgba.shape[1]):
            for k in range(num_colours):
                ringed[r + 1, c + 1, k] = rgba[r, c, k]
            alpha = rgba[r, c, num_colours] * presence
            importance = alpha * nearness
            if floor > _ZERO and importance < floor:
                importance = floor
            ringed[r + 1, c + 1, num_colours] = _ONE
            ringed[r + 1, c + 1, num_colours + 1] = alpha
            ringed[r + 1, c + 1, num_colours + 2] = importance


@inlined
def interpolate_row(ringed, index, fraction, row):
    """Fills `row` with row `index + fraction` of the map, all texels and channels."""
    for c in range(row.shape[0]):
        upper = ringed[index, c]
        row[c] = upper + fraction * (ringed[index + _NEXT, c] - upper)


@compiled
def _render_forward(
    start,
    stop,
    rgba,  # [B, N, h, w, C + 1]
    boxes,  # [B, N, 4]
    depth,  # [B, N]
    presence,  # [B, N]
    background,  # [B, C, H, W]
    floor,
    channels,  # a tuple of C numbers, so that the compiler knows C
    image,  # [B, C, H, W]
    change,  # [B, C, H, W] image - background
    inverse,  # [B, H, W] 1 / summed importance, 0 where nothing contributes
    keep,  # [B, H, W] d image / d background
):
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
    sums = np.empty((height, width, num_colours + 2), np.float32)  # colours, cover, importance
    for b in range(start, stop):
        sums[:] = _ZERO
        for n in range(num_objects):
            x1, y1, x2, y2 = boxes[b, n, 0], boxes[b, n, 1], boxes[b, n, 2], boxes[b, n, 3]
            if not (np.isfinite(x1) and np.isfinite(y1) and np.isfinite(x2) and np.isfinite(y2)):
                sums[:, :, num_colours + 1] = np.float32(np.nan)
                continue
            if x2 - x1 < _MIN_SIDE or y2 - y1 < _MIN_SIDE:
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
                    e, j = _ONE - f, i + _NEXT
                    a = e * row[i, alpha] + f * row[j, alpha]
                    w = e * row[i, importance] + f * row[j, importance]
                    e, f = e * w * a, f * w * a
                    for k in range(num_colours + 1):
                        sums[y, x, k] += e * row[i, k] + f * row[j, k]
                    sums[y, x, num_colours + 1] += w
        for y in range(height):
            for x in range(width):
                total = sums[y, x, num_colours + 1]
                # written so that NaN stays NaN
                inv = _ZERO if total <= _MIN_IMPORTANCE else _ONE / total
                inverse[b, y, x] = inv
                keep[b, y, x] = _ONE - sums[y, x, cover] * inv
        for k in range(num_colours):
            for y in range(height):
                for x in range(width):
                    bg = background[b, k, y, x]
                    here = (sums[y, x, k] - sums[y, x, cover] * bg) * inverse[b, y, x]
                    change[b, k, y, x] = here
                    image[b, k, y, x] = bg + here


@compiled
def _render_backward(
    start, stop,
    grad_image,  # [B, C, H, W]
    rgba,  # [B, N, h, w, C + 1]
    boxes,  # [B, N, 4]
    depth,  # [B, N]
    presence,  # [B, N]
    background,  # [B, C, H, W]
    change,  # [B, C, H, W]
    inverse,  # [B, H, W]
    floor, channels, grad_rgba, grad_boxes, grad_depth, grad_presence,
):  # fmt: skip
    num_objects, map_height, map_width = rgba.shape[1:4]
    height, width = background.shape[2:]
    num_colours = len(channels)
    alpha, importance = num_colours + 1, num_colours + 2
    ringed = np.zeros((map_height + 2, map_width + 2, num_colours + 3), np.float32)
    grad_ringed = np.empty((map_height + 2, map_width + 2, num_colours + 3), np.float32)
    row = np.empty((map_width + 2, num_colours + 3), np.float32)
    flat_ringed = ringed.reshape(map_height + 2, -1)
    flat_row = row.reshape(-1)
    grad_row = np.empty((map_width + 2, num_colours + 3), np.float32)
    flat_grad_row = grad_row.reshape(-1)
    flat_grad_ringed = grad_ringed.reshape(map_height + 2, -1)
    row_index, row_fraction = np.empty(height, np.uint64), np.empty(height, np.float32)
    column_index, column_fraction = np.empty(width, np.uint64), np.empty(width, np.float32)
    row_share, column_share = np.empty(height, np.float32), np.empty(width, np.float32)
    # g_k / Z, minus sum g_k bg_k / Z (the cotangent of the cover), sum g_k change_k / Z
    pixels = np.empty((height, width, num_colours + 2), np.float32)
    for b in range(start, stop):
        for y in range(height):
            for x in range(width):
                uncovered, common = _ZERO, _ZERO
                for k in range(num_colours):
                    g = grad_image[b, k, y, x] * inverse[b, y, x]
                    pixels[y, x, k] = g
                    uncovered -= g * background[b, k, y, x]
                    common += g * change[b, k, y, x]
                pixels[y, x, num_colours] = uncovered
                pixels[y, x, num_colours + 1] = common
        for n in range(num_objects):
            grad_rgba[b, n] = _ZERO
            grad_boxes[b, n] = _ZERO
            grad_depth[b, n] = _ZERO
            grad_presence[b, n] = _ZERO
            x1, y1, x2, y2 = boxes[b, n, 0], boxes[b, n, 1], boxes[b, n, 2], boxes[b, n, 3]
            if not (np.isfinite(x1) and np.isfinite(y1) and np.isfinite(x2) and np.isfinite(y2)):
                continue
            if x2 - x1 < _MIN_SIDE or y2 - y1 < _MIN_SIDE:
                continue
            top, bottom, y_scale = place(
                y1, y2, map_height, height, row_index, row_fraction, row_share
            )
            left, right, x_scale = place(
                x1, x2, map_width, width, column_index, column_fraction, column_share
            )
            if top >= bottom or left >= right:
                continue
            nearness = _ONE / (_ONE + np.exp(depth[b, n]))
            copy_with_ring(rgba[b, n], presence[b, n], nearness, floor, channels, ringed)
            grad_ringed[:] = _ZERO
            grad_x1, grad_x2, grad_y1, grad_y2 = _ZERO, _ZERO, _ZERO, _ZERO
            for y in range(top, bottom):
                interpolate_row(flat_ringed, row_index[y], row_fraction[y], flat_row)
                grad_row[:] = _ZERO
                for x in range(left, right):
                    i, f = column_index[x], column_fraction[x]
                    e, j = _ONE - f, i + _NEXT
                    a = e * row[i, alpha] + f * row[j, alpha]
                    w = e * row[i, importance] + f * row[j, importance]
                    w_a = w * a
                    contrast = _ZERO
                    slope = _ZERO
                    for k in range(num_colours + 1):  # the colours and the cover
                        g = pixels[y, x, k]
                        contrast += g * (e * row[i, k] + f * row[j, k])
                        slope += g * (row[j, k] - row[i, k])
                        grad_row[i, k] += e * w_a * g
                        grad_row[j, k] += f * w_a * g
                    grad_a = w * contrast
                    grad_w = a * contrast - pixels[y, x, num_colours + 1]
                    grad_row[i, alpha] += e * grad_a
                    grad_row[j, alpha] += f * grad_a
                    grad_row[i, importance] += e * grad_w
                    grad_row[j, importance] += f * grad_w
                    slope = (
                        w_a * slope
                        + grad_a * (row[j, alpha] - row[i, alpha])
                        + grad_w * (row[j, importance] - row[i, importance])
                    )
                    grad_x1 -= slope * (_ONE - column_share[x])
                    grad_x2 -= slope * column_share[x]
                i, f = row_index[y], row_fraction[y]
                j = i + _NEXT
                slope = _ZERO
                for c in range(len(flat_row)):
                    g = flat_grad_row[c]
                    slope += g * (flat_ringed[j, c] - flat_ringed[i, c])
                    flat_grad_ringed[i, c] += (_ONE - f) * g
                    flat_grad_ringed[j, c] += f * g
                grad_y1 -= slope * (_ONE - row_share[y])
                grad_y2 -= slope * row_share[y]
            grad_boxes[b, n, 0], grad_boxes[b, n, 2] = grad_x1 * x_scale, grad_x2 * x_scale
            grad_boxes[b, n, 1], grad_boxes[b, n, 3] = grad_y1 * y_scale, grad_y2 * y_scale

            grad_nearness, grad_here = _ZERO, _ZERO
            for r in range(map_height):
                for c in range(map_width):
                    for k in range(num_colours):
                        grad_rgba[b, n, r, c, k] = grad_ringed[r + 1, c + 1, k]
                    opacity = rgba[b, n, r, c, num_colours]
                    grad_alpha = grad_ringed[r + 1, c + 1, alpha]
                    grad_importance = grad_ringed[r + 1, c + 1, importance]
                    if floor > _ZERO and opacity * presence[b, n] * nearness < floor:
                        grad_importance = _ZERO
                    grad_alpha += grad_importance * nearness
                    grad_nearness += grad_importance * opacity
                    grad_here += grad_alpha * opacity
                    grad_rgba[b, n, r, c, num_colours] = grad_alpha * presence[b, n]
            grad_presence[b, n] = grad_here
            grad_depth[b, n] = -grad_nearness * presence[b, n] * nearness * (_ONE - nearness)


def render_cpu(
    rgba: Tensor, boxes: Tensor, depth: Tensor, presence: Tensor, background: Tensor, floor: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """image, change, inverse and keep; `render_backward_cpu` needs the last three."""
    shape = background.shape
    image, change = _empty(shape), _empty(shape)
    inverse, keep = _empty(shape[:1] + shape[2:]), _empty(shape[:1] + shape[2:])
    inputs = arrays(rgba, boxes, depth, presence, background)
    outputs = arrays(image, change, inverse, keep)
    channels = (0,) * shape[1]
    over_images(_render_forward, shape[0], *inputs, np.float32(floor), channels, *outputs)
    return image, change, inverse, keep


def render_backward_cpu(
    grad_image: Tensor, rgba: Tensor, boxes: Tensor, depth: Tensor, presence: Tensor,
    background: Tensor, change: Tensor, inverse: Tensor, keep: Tensor, floor: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of rgba (in its own dtype), boxes, depth, presence and background."""
    grads = tuple(_empty(t.shape) for t in (rgba, boxes, depth, presence))
    inputs = arrays(grad_image, rgba, boxes, depth, presence, background, change, inverse)
    channels = (0,) * background.shape[1]
    over_images(
        _render_backward, rgba.shape[0], *inputs, np.float32(floor), channels, *arrays(*grads)
    )
    grad_rgba, grad_boxes, grad_depth, grad_presence = grads
    grad_background = (grad_image * keep[:, None]).contiguous()
    return grad_rgba.to(rgba.dtype), grad_boxes, grad_depth, grad_presence, grad_background


def _empty(shape: torch.Size) -> Tensor:
    # not in the default dtype, which the caller may have changed
    return torch.empty(shape, dtype=torch.float32)
