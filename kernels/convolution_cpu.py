"""Numba twin of convolutions with 4 x 4 kernels and stride 2, float32, with fewer products.

In blocks of 2 x 2 pixels such a convolution has a 2 x 2 kernel and stride 1. Winograd's F(2, 2)
gives two neighbouring outputs of a kernel (g0, g1), on blocks d0, d1 and d2, from three products:

    m0 = (d0 - d1) g0      m1 = d1 (g0 + g1)      m2 = (d2 - d1) g1
    y0 = d0 g0 + d1 g1 = m0 + m1
    y1 = d1 g0 + d2 g1 = m1 + m2

In two dimensions it gives a tile of 2 x 2 outputs from 9 products instead of 16 (Lavin and Gray,
"Fast algorithms for convolutional neural networks", CVPR 2016, section 4). A product here is one of
matrices, summed over the four pixels of a block and the input channels. All factors are 1 or -1, so
errors in float32 are at most twice those of torch's convolutions. Gradients transpose each step.

An image of H x W pixels has ceil(H / 4) x ceil(W / 4) tiles, which read zeros beyond it: tile
(i, j) reads pixels 4 i .. 4 i + 5 and 4 j .. 4 j + 5. Rows of about 288 tiles share their products,
so intermediate results stay in the cache. The composition of a batch, and its cuts between threads,
may change the last bit of a result.

C channels come in and N go out. Images are [B, H, W C], with the channels of a pixel side by side.
The 3 x 3 steps down and across are the first axis of `tiles` [9, R, 4 C], `products` [9, R, N] and
`factors` [9, N, 4 C].
"""

import numpy as np
import torch
from torch import Tensor

from spairkit.kernels.threads import compiled, over_images, part, single_threaded_blas

_ZERO = np.float32(0.0)
_TILES = 288  # with shared products


@compiled
def _factors(
    weight,  # [N, C, 4, 4]
    factors,  # [9, N, 4 C]
):
    channels = weight.shape[1]
    for n in range(len(weight)):
        for q in range(2):
            for s in range(2):
                for c in range(channels):
                    g = weight[n, c]
                    g00, g01 = g[q, s], g[q, 2 + s]
                    g10, g11 = g[2 + q, s], g[2 + q, 2 + s]
                    at = (2 * q + s) * channels + c
                    factors[0, n, at] = g00
                    factors[1, n, at] = g00 + g01
                    factors[2, n, at] = g01
                    factors[3, n, at] = g00 + g10
                    factors[4, n, at] = (g00 + g01) + (g10 + g11)
                    factors[5, n, at] = g01 + g11
                    factors[6, n, at] = g10
                    factors[7, n, at] = g10 + g11
                    factors[8, n, at] = g11


@compiled
def _factors_backward(
    grads,  # [9, N, 4 C] of the factors
    grad_weight,  # [N, C, 4, 4]
):
    channels = grad_weight.shape[1]
    for n in range(len(grad_weight)):
        for q in range(2):
            for s in range(2):
                for c in range(channels):
                    g = grads[:, n, (2 * q + s) * channels + c]
                    grad_weight[n, c, q, s] = (g[0] + g[1]) + (g[3] + g[4])
                    grad_weight[n, c, q, 2 + s] = (g[1] + g[2]) + (g[4] + g[5])
                    grad_weight[n, c, 2 + q, s] = (g[3] + g[4]) + (g[6] + g[7])
                    grad_weight[n, c, 2 + q, 2 + s] = (g[4] + g[5]) + (g[7] + g[8])


@part
def _copy(out, a):
    for i in range(len(out)):
        out[i] = a[i]


@part
def _difference(out, a, b):
    for i in range(len(out)):
        out[i] = a[i] - b[i]


@part
def _difference_of_differences(out, a, b, c, d):
    for i in range(len(out)):
        out[i] = (a[i] - b[i]) - (c[i] - d[i])


@part
def _minus_both(out, a, b, c):
    for i in range(len(out)):
        out[i] = a[i] - b[i] - c[i]


@part
def _read(image, i, j, patch):
    """Copies the pixels of tile (i, j) from an image [H, W C] into a patch [6, 6 C]."""
    width = patch.shape[1]
    start = 4 * j * (width // 6)
    inside = min(image.shape[1] - start, width)
    for r in range(6):
        row = patch[r]
        if 4 * i + r < len(image):
            _copy(row[:inside], image[4 * i + r, start:])
            row[inside:] = _ZERO
        else:
            row[:] = _ZERO


@part
def _add(patch, i, j, image):
    """The transpose of `_read`."""
    width = patch.shape[1]
    start = 4 * j * (width // 6)
    inside = min(image.shape[1] - start, width)
    for r in range(min(6, len(image) - 4 * i)):
        row, line = patch[r], image[4 * i + r, start:]
        for c in range(inside):
            line[c] += row[c]


@part
def _split(patch, tiles, at):
    """Fills tile `at` from a patch [6, 6 C]: differences down, then across."""
    pair = patch.shape[1] // 3
    for q in range(2):
        d1 = patch[2 + q]
        b0, b1, b2 = d1[:pair], d1[pair : 2 * pair], d1[2 * pair :]
        for end in range(2):
            d, step = patch[4 * end + q], 6 * end
            a0, a1, a2 = d[:pair], d[pair : 2 * pair], d[2 * pair :]
            _difference_of_differences(tiles[step, at, q], a0, b0, a1, b1)
            _difference(tiles[step + 1, at, q], a1, b1)
            _difference_of_differences(tiles[step + 2, at, q], a2, b2, a1, b1)
        _difference(tiles[3, at, q], b0, b1)
        _copy(tiles[4, at, q], b1)
        _difference(tiles[5, at, q], b2, b1)


@part
def _join(tiles, at, patch):
    """The transpose of `_split`."""
    pair = patch.shape[1] // 3
    for q in range(2):
        for end in range(2):
            d, step = patch[4 * end + q], 6 * end
            t0, t1, t2 = tiles[step, at, q], tiles[step + 1, at, q], tiles[step + 2, at, q]
            _copy(d[:pair], t0)
            _minus_both(d[pair : 2 * pair], t1, t0, t2)
            _copy(d[2 * pair :], t2)
        d0, d1, d2 = patch[q], patch[2 + q], patch[4 + q]
        t3, t4, t5 = tiles[3, at, q], tiles[4, at, q], tiles[5, at, q]
        _copy(d1[:pair], t3)
        _minus_both(d1[pair : 2 * pair], t4, t3, t5)
        _copy(d1[2 * pair :], t5)
        _minus_both(d1, d1, d0, d2)


@part
def _sum_products(products, at, bias, i, j, values):
    """Fills the outputs of tile (i, j) of an image [rows, columns, N] from the products `at`."""
    # outputs beyond the image are written first, then overwritten
    below, right = min(2 * i + 1, len(values) - 1), min(2 * j + 1, values.shape[1] - 1)
    y11, y10 = values[below, right], values[below, 2 * j]
    y01, y00 = values[2 * i, right], values[2 * i, 2 * j]
    for n in range(len(bias)):
        m3, m4, m5 = products[3, at, n], products[4, at, n], products[5, at, n]
        a0, a1, a2 = products[0, at, n] + m3, products[1, at, n] + m4, products[2, at, n] + m5
        b0, b1, b2 = products[6, at, n] + m3, products[7, at, n] + m4, products[8, at, n] + m5
        y11[n] = b1 + b2 + bias[n]
        y10[n] = b0 + b1 + bias[n]
        y01[n] = a1 + a2 + bias[n]
        y00[n] = a0 + a1 + bias[n]


@part
def _spread(grads, i, j, nothing, products, at):
    """The transpose of `_sum_products`."""
    down, across = 2 * i + 1 < len(grads), 2 * j + 1 < grads.shape[1]
    y00 = grads[2 * i, 2 * j]
    y01 = grads[2 * i, 2 * j + 1] if across else nothing
    y10 = grads[2 * i + 1, 2 * j] if down else nothing
    y11 = grads[2 * i + 1, 2 * j + 1] if down and across else nothing
    for n in range(len(y00)):
        g00, g01, g10, g11 = y00[n], y01[n], y10[n], y11[n]
        left, right = g00 + g10, g01 + g11
        products[0, at, n] = g00
        products[1, at, n] = g00 + g01
        products[2, at, n] = g01
        products[3, at, n] = left
        products[4, at, n] = left + right
        products[5, at, n] = right
        products[6, at, n] = g10
        products[7, at, n] = g10 + g11
        products[8, at, n] = g11


@part
def _accumulate(sums, more):
    for n in range(len(sums)):
        row, added = sums[n], more[n]
        for c in range(len(row)):
            row[c] += added[c]


@compiled
def _convolve(
    start,  # of all rows of tiles
    stop,
    images,  # [B, H, W C]
    factors,  # [9, N, 4 C]
    bias,  # [N]
    values,  # [B, ceil(H / 2), ceil(W / 2), N]
):
    outputs, inputs = factors.shape[1:]
    down, across = (values.shape[1] + 1) // 2, (values.shape[2] + 1) // 2
    at_once = max(_TILES // across, 1)  # rows of tiles
    patch = np.empty((6, 6 * (inputs // 4)), np.float32)
    tiles = np.empty((9, at_once * across, inputs), np.float32)
    blocks = tiles.reshape((9, at_once * across, 2, inputs // 2))
    products = np.empty((9, at_once * across, outputs), np.float32)
    for first in range(start, stop, at_once):
        last = min(first + at_once, stop)
        for row in range(first, last):
            for j in range(across):
                _read(images[row // down], row % down, j, patch)
                _split(patch, blocks, (row - first) * across + j)
        count = (last - first) * across
        for k in range(9):
            np.dot(tiles[k, :count], factors[k].T, products[k, :count])
        for row in range(first, last):
            for j in range(across):
                at = (row - first) * across + j
                _sum_products(products, at, bias, row % down, j, values[row // down])


@compiled
def _convolve_backward(
    start,  # of the parts that the batch is cut into
    stop,
    images,  # [B, H, W C]
    factors,  # [9, N, 4 C]
    grad_values,  # [B, ceil(H / 2), ceil(W / 2), N]
    grad_factors,  # [parts, 9, N, 4 C], is added to
    grad_images,  # [B, H, W C]
):
    outputs, inputs = factors.shape[1:]
    down, across = (grad_values.shape[1] + 1) // 2, (grad_values.shape[2] + 1) // 2
    at_once = max(_TILES // across, 1)
    patch = np.empty((6, 6 * (inputs // 4)), np.float32)
    nothing = np.zeros(outputs, np.float32)
    tiles = np.empty((9, at_once * across, inputs), np.float32)
    blocks = tiles.reshape((9, at_once * across, 2, inputs // 2))
    products = np.empty((9, at_once * across, outputs), np.float32)
    more = np.empty((outputs, inputs), np.float32)
    for number in range(start, stop):
        begin = len(images) * number // len(grad_factors)
        end = len(images) * (number + 1) // len(grad_factors)
        grad_images[begin:end] = _ZERO
        for first in range(begin * down, end * down, at_once):
            last = min(first + at_once, end * down)
            for row in range(first, last):
                for j in range(across):
                    at = (row - first) * across + j
                    _read(images[row // down], row % down, j, patch)
                    _split(patch, blocks, at)
                    _spread(grad_values[row // down], row % down, j, nothing, products, at)
            count = (last - first) * across
            for k in range(9):
                np.dot(products[k, :count].T, tiles[k, :count], more)
                _accumulate(grad_factors[number, k], more)
                np.dot(products[k, :count], factors[k], tiles[k, :count])
            for row in range(first, last):
                for j in range(across):
                    _join(blocks, (row - first) * across + j, patch)
                    _add(patch, row % down, j, grad_images[row // down])


def convolve_cpu(images: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """[B, N, ceil(H / 2), ceil(W / 2)], channels last, from [B, C, H, W], [N, C, 4, 4] and [N]."""
    num_images, _, height, width = images.shape
    values = images.new_empty(num_images, (height + 1) // 2, (width + 1) // 2, len(weight))
    operands = _lines(images), _factors_of(weight), bias.detach().contiguous().numpy()
    with single_threaded_blas():
        over_images(_convolve, num_images * ((height + 3) // 4), *operands, values.numpy())
    return values.permute(0, 3, 1, 2)


def convolve_backward_cpu(
    grad_values: Tensor, values: Tensor, images: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of images, weight and bias."""
    grads = grad_values.permute(0, 2, 3, 1).contiguous()
    factors = _factors_of(weight)
    parts = max(min(torch.get_num_threads(), len(images)), 1)
    grad_factors = weight.new_zeros(parts, *factors.shape)
    grad_images = images.new_empty(images.permute(0, 2, 3, 1).shape)
    with single_threaded_blas():
        over_images(
            _convolve_backward, parts, _lines(images), factors, grads.numpy(),
            grad_factors.numpy(), _lines(grad_images.permute(0, 3, 1, 2)),
        )  # fmt: skip
    grad_weight = weight.new_empty(weight.shape)
    _factors_backward(grad_factors.sum(0).numpy(), grad_weight.numpy())
    return grad_images.permute(0, 3, 1, 2), grad_weight, grads.sum((0, 1, 2))


def _lines(images: Tensor) -> np.ndarray:  # [B, H, W C]
    return images.detach().permute(0, 2, 3, 1).contiguous().flatten(2).numpy()


def _factors_of(weight: Tensor) -> np.ndarray:
    outputs, channels = weight.shape[:2]
    factors = weight.new_empty(9, outputs, 4 * channels).numpy()
    _factors(weight.detach().contiguous().numpy(), factors)
    return factors
