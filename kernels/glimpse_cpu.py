"""Numba twin of the spatial transformer, float32: glimpses, and their gradient to the boxes.

Row r of boxes and glimpses belongs to image r modulo n. A coordinate beyond the image reads the
border pixel and gets no gradient; NaN reads as 0, because it must not become an address.

A frame maps the coordinates of an image to its pixel indices: scale and shift of y and of x.
"""

import numpy as np

from spairkit.kernels.threads import inlined, part

_ONE = np.float32(1.0)
_ZERO = np.float32(0.0)


@inlined
def _place(low, high, num_pixels, scale, shift, tap, fraction, inside):
    """Fills taps and fractions of the points on one axis, and `inside`: 1 where not clamped."""
    num_points = len(tap)
    limit = np.float32(num_pixels - 1)
    for p in range(num_points):
        share = np.float32(p) / np.float32(num_points - 1)
        position = (low + (high - low) * share) * scale + shift
        inside[p] = _ONE if position > _ZERO and position < limit else _ZERO
        position = min(position, limit) if position > _ZERO else _ZERO
        tap[p] = max(min(int(position), num_pixels - 2), 0)
        fraction[p] = position - np.float32(tap[p])


@part
def glimpses_forward(
    images,  # [n, C, H, W]
    boxes,  # [m n, 4] xyxy, pixels
    frames,  # [n, 4]
    glimpses,  # [m n, C, P, P] to be filled
):
    """Cuts the glimpses of boxes out of the images."""
    num_images, num_channels, height, width = images.shape
    size = glimpses.shape[2]
    row, column = np.empty(size, np.uint64), np.empty(size, np.uint64)
    row_fraction, column_fraction = np.empty(size, np.float32), np.empty(size, np.float32)
    inside = np.empty(size, np.float32)
    below, beside = np.uint64(min(1, height - 1)), np.uint64(min(1, width - 1))
    for r in range(len(boxes)):
        frame = frames[r % num_images]
        _place(boxes[r, 1], boxes[r, 3], height, frame[0], frame[1], row, row_fraction, inside)
        _place(boxes[r, 0], boxes[r, 2], width, frame[2], frame[3], column, column_fraction, inside)
        for k in range(num_channels):
            for y in range(size):
                upper = images[r % num_images, k, row[y]]
                lower = images[r % num_images, k, row[y] + below]
                v = row_fraction[y]
                for x in range(size):
                    i, u = column[x], column_fraction[x]
                    j = i + beside
                    left = upper[i] + v * (lower[i] - upper[i])
                    right = upper[j] + v * (lower[j] - upper[j])
                    glimpses[r, k, y, x] = left + u * (right - left)


@part
def glimpses_backward(
    grad_glimpses,  # [m n, C, P, P]
    images,  # [n, C, H, W]
    boxes,  # [m n, 4]
    frames,  # [n, 4]
    grad_boxes,  # [m n, 4] to be filled
):
    """Fills the gradient of the boxes."""
    num_images, num_channels, height, width = images.shape
    size = grad_glimpses.shape[2]
    row, column = np.empty(size, np.uint64), np.empty(size, np.uint64)
    row_fraction, column_fraction = np.empty(size, np.float32), np.empty(size, np.float32)
    row_inside, column_inside = np.empty(size, np.float32), np.empty(size, np.float32)
    grad_rows, grad_columns = np.empty(size, np.float32), np.empty(size, np.float32)
    below, beside = np.uint64(min(1, height - 1)), np.uint64(min(1, width - 1))
    for r in range(len(boxes)):
        frame = frames[r % num_images]
        y_scale, x_scale = frame[0], frame[2]
        _place(
            boxes[r, 1], boxes[r, 3], height, y_scale, frame[1], row, row_fraction, row_inside
        )  # fmt: skip
        _place(
            boxes[r, 0], boxes[r, 2], width, x_scale, frame[3], column, column_fraction,
            column_inside,
        )  # fmt: skip
        for p in range(size):
            grad_rows[p], grad_columns[p] = _ZERO, _ZERO
        for k in range(num_channels):
            for y in range(size):
                upper = images[r % num_images, k, row[y]]
                lower = images[r % num_images, k, row[y] + below]
                v = row_fraction[y]
                grad_row = _ZERO
                for x in range(size):
                    i, u = column[x], column_fraction[x]
                    j = i + beside
                    g = grad_glimpses[r, k, y, x]
                    left, right = lower[i] - upper[i], lower[j] - upper[j]
                    grad_row += g * (left + u * (right - left))
                    grad_columns[x] += g * (upper[j] - upper[i] + v * (right - left))
                grad_rows[y] += grad_row
        for i in range(4):
            grad_boxes[r, i] = _ZERO
        for p in range(size):
            share = np.float32(p) / np.float32(size - 1)
            grad_x = grad_columns[p] * column_inside[p] * x_scale
            grad_y = grad_rows[p] * row_inside[p] * y_scale
            grad_boxes[r, 0] += (_ONE - share) * grad_x
            grad_boxes[r, 1] += (_ONE - share) * grad_y
            grad_boxes[r, 2] += share * grad_x
            grad_boxes[r, 3] += share * grad_y
