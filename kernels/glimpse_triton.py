"""Triton twin of the spatial transformer inside the loop over cells: glimpses, and their gradient.

A tile has M rows, each a box of an image, and N numbers of their glimpses [3, side, side]. A
coordinate beyond the image reads the border pixel and gets no gradient; NaN reads as 0, because it
must not become an address.
"""

import triton
import triton.language as tl


@triton.jit
def _axis(low, high, point, num_points, num_pixels):
    """[M, N] first taps and fractions of points on one axis, where not clamped; share; scale.

    The points run from edge to edge of boxes [M]. A coordinate beyond the image reads the border
    pixel; NaN reads as 0.
    """
    limit = num_pixels - 1.0
    scale = limit / num_pixels
    share = point.to(tl.float32)[None, :] / (num_points - 1.0)
    position = (low[:, None] + (high - low)[:, None] * share) * scale
    inside = (position > 0) & (position < limit)
    position = tl.where(position > 0, tl.where(position < limit, position, limit), 0.0)
    tap = tl.maximum(tl.minimum(position.to(tl.int32), num_pixels - 2), 0)
    return tap, position - tap.to(tl.float32), inside, share, scale


@triton.jit
def _pixels(images_ptr, image, channel, row, column, mask, height, width):
    """[M, N] the four pixels round a point: upper left and right, lower left and right."""
    place = (image * 3)[:, None] + channel[None, :]
    place = images_ptr + (place * height + row) * width + column
    below = tl.where(row + 1 < height, width, 0)
    beside = tl.where(column + 1 < width, 1, 0)
    upper_left = tl.load(place, mask=mask, other=0.0)
    upper_right = tl.load(place + beside, mask=mask, other=0.0)
    lower_left = tl.load(place + below, mask=mask, other=0.0)
    lower_right = tl.load(place + below + beside, mask=mask, other=0.0)
    return upper_left, upper_right, lower_left, lower_right


@triton.jit
def cut_glimpses(
    images_ptr, latents_ptr, record_ptr, image, boxes, glimpses, exists, side, height, width,
    M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Fills the glimpses of a tile; `boxes` and `glimpses` are places [M]."""
    x1 = tl.load(latents_ptr + boxes, mask=exists, other=0.0)
    y1 = tl.load(latents_ptr + boxes + 1, mask=exists, other=0.0)
    x2 = tl.load(latents_ptr + boxes + 2, mask=exists, other=0.0)
    y2 = tl.load(latents_ptr + boxes + 3, mask=exists, other=0.0)
    pixels = side * side
    begin = 0
    while begin < 3 * pixels:
        q = begin + tl.arange(0, N)
        mask = exists[:, None] & (q < 3 * pixels)[None, :]
        row, v, _inside, _share, _scale = _axis(y1, y2, q % pixels // side, side, height)
        column, u, _inside, _share, _scale = _axis(x1, x2, q % side, side, width)
        upper_left, upper_right, lower_left, lower_right = _pixels(
            images_ptr, image, q // pixels, row, column, mask, height, width
        )
        left = upper_left + v * (lower_left - upper_left)
        right = upper_right + v * (lower_right - upper_right)
        place = record_ptr + glimpses[:, None] + q[None, :]
        tl.store(place, left + u * (right - left), mask=mask)
        begin += N


@triton.jit
def boxes_back(
    images_ptr, latents_ptr, grads_ptr, image, boxes, glimpses, exists, side, height, width,
    M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """[M] gradients of x1, y1, x2, y2 from those of the glimpses; the first two are places."""
    x1 = tl.load(latents_ptr + boxes, mask=exists, other=0.0)
    y1 = tl.load(latents_ptr + boxes + 1, mask=exists, other=0.0)
    x2 = tl.load(latents_ptr + boxes + 2, mask=exists, other=0.0)
    y2 = tl.load(latents_ptr + boxes + 3, mask=exists, other=0.0)
    grad_x1, grad_y1 = tl.zeros([M], tl.float32), tl.zeros([M], tl.float32)
    grad_x2, grad_y2 = tl.zeros([M], tl.float32), tl.zeros([M], tl.float32)
    pixels = side * side
    begin = 0
    while begin < 3 * pixels:
        q = begin + tl.arange(0, N)
        mask = exists[:, None] & (q < 3 * pixels)[None, :]
        row, v, moves_y, share_y, scale_y = _axis(y1, y2, q % pixels // side, side, height)
        column, u, moves_x, share_x, scale_x = _axis(x1, x2, q % side, side, width)
        upper_left, upper_right, lower_left, lower_right = _pixels(
            images_ptr, image, q // pixels, row, column, mask, height, width
        )
        grad = tl.load(grads_ptr + glimpses[:, None] + q[None, :], mask=mask, other=0.0)
        left, right = lower_left - upper_left, lower_right - upper_right
        grad_y = tl.where(moves_y, grad * (left + u * (right - left)) * scale_y, 0.0)
        grad_x = upper_right - upper_left + v * (right - left)
        grad_x = tl.where(moves_x, grad * grad_x * scale_x, 0.0)
        grad_x1 += tl.sum((1.0 - share_x) * grad_x, 1)
        grad_y1 += tl.sum((1.0 - share_y) * grad_y, 1)
        grad_x2 += tl.sum(share_x * grad_x, 1)
        grad_y2 += tl.sum(share_y * grad_y, 1)
        begin += N
    return grad_x1, grad_y1, grad_x2, grad_y2
