"""Numba twin of convolutions with 4 x 4 kernels and stride 2 in float32, with fewer products.

In blocks of 2 x 2 pixels such a convolution has a 2 x 2 kernel and stride 1. Winograd's F(2, 2)
gives two neighbouring outputs of a kernel (g0, g1), on blocks d0, d1 and d2, from three products:

    m0 = (d0 - d1) g0      m1 = d1 (g0 + g1)      m2 = (d2 - d1) g1
    y0 = d0 g0 + d1 g1 = m0 + m1
    y1 = d1 g0 + d2 g1 = m1 + m2

Applied to rows and columns, a tile of 2 x 2 outputs takes 9 products instead of 16. Each is a
matrix product that sums over the four pixels of a block and the channels. All coefficients are 1 or
-1, so rounding is about that of a plain convolution. Gradients transpose each step.

Source: Lavin and Gray, "Fast algorithms for convolutional neural networks", CVPR 2016, section 4.

C channels come in and N go out, the channels last in memory. An image of H x W pixels has T x U =
ceil(H / 4) x ceil(W / 4) tiles, which read zeros beyond it: tile (t, u) reads pixels 4 t .. 4 t + 5
and 4 u .. 4 u + 5. The tiles of n images are multiplied together: nine matrix products with
R = n T U rows.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from spairkit.kernels.threads import compiled, over_images, part

_ZERO = np.float32(0.0)
_TILES = 256  # rows of a product, about: its tiles then stay in the cache


@part
def _copy(a, out):
    for i in range(len(out)):
        out[i] = a[i]


@part
def _add(a, out):
    for i in range(len(out)):
        out[i] += a[i]


@part
def _subtract(a, b, out):
    for i in range(len(out)):
        out[i] = a[i] - b[i]


@part
def _split(d0, d1, d2, first, middle, last):
    _subtract(d0, d1, first)
    _copy(d1, middle)
    _subtract(d2, d1, last)


@part
def _split_back(first, middle, last, d0, d1, d2):
    """The transpose of `_split`."""
    _copy(first, d0)
    for i in range(len(d1)):
        d1[i] = middle[i] - first[i] - last[i]
    _copy(last, d2)


@compiled
def _split_tiles(
    start,
    stop,
    images,  # [n, H, W, C]
    blocks,  # [3, 3, n, T, U, 2, 2 C] to be filled
):
    _, height, width, channels = images.shape
    patch = np.empty((6, 6, channels), np.float32)
    d = patch.reshape((3, -1))
    steps = np.empty((3, 2, 3, 2 * channels), np.float32)
    s = steps.reshape((3, -1))
    for b in range(start, stop):
        for t in range(blocks.shape[3]):
            for u in range(blocks.shape[4]):
                for y in range(6):
                    for x in range(6):
                        if 4 * t + y < height and 4 * u + x < width:
                            _copy(images[b, 4 * t + y, 4 * u + x], patch[y, x])
                        else:
                            patch[y, x] = _ZERO
                _split(d[0], d[1], d[2], s[0], s[1], s[2])
                for i in range(3):
                    m0, m1, m2 = blocks[i, 0], blocks[i, 1], blocks[i, 2]
                    for q in range(2):
                        e = steps[i, q]
                        _split(e[0], e[1], e[2], m0[b, t, u, q], m1[b, t, u, q], m2[b, t, u, q])


@compiled
def _split_tiles_back(start, stop, blocks, images):
    """The transpose of `_split_tiles`."""
    _, height, width, channels = images.shape
    patch = np.empty((6, 6, channels), np.float32)
    d = patch.reshape((3, -1))
    steps = np.empty((3, 2, 3, 2 * channels), np.float32)
    s = steps.reshape((3, -1))
    for b in range(start, stop):
        images[b] = _ZERO
        for t in range(blocks.shape[3]):
            for u in range(blocks.shape[4]):
                for i in range(3):
                    m0, m1, m2 = blocks[i, 0], blocks[i, 1], blocks[i, 2]
                    for q in range(2):
                        e = steps[i, q]
                        _split_back(
                            m0[b, t, u, q], m1[b, t, u, q], m2[b, t, u, q], e[0], e[1], e[2]
                        )
                _split_back(s[0], s[1], s[2], d[0], d[1], d[2])
                for y in range(min(6, height - 4 * t)):
                    for x in range(min(6, width - 4 * u)):
                        _add(patch[y, x], images[b, 4 * t + y, 4 * u + x])


@compiled
def _join_tiles(
    start,
    stop,
    products,  # [3, 3, n, T, U, N]
    bias,  # [N]
    values,  # [n, ceil(H / 2), ceil(W / 2), N] to be filled
):
    for b in range(start, stop):
        for y in range(values.shape[1]):
            for x in range(values.shape[2]):
                r, c, t, u = y % 2, x % 2, y // 2, x // 2
                m00, m01 = products[r, c, b, t, u], products[r, c + 1, b, t, u]
                m10, m11 = products[r + 1, c, b, t, u], products[r + 1, c + 1, b, t, u]
                out = values[b, y, x]
                for i in range(len(out)):
                    out[i] = (m00[i] + m01[i]) + (m10[i] + m11[i]) + bias[i]


@compiled
def _join_tiles_back(start, stop, values, products):
    """The transpose of `_join_tiles`."""
    for b in range(start, stop):
        for k in range(9):
            products[k // 3, k % 3, b] = _ZERO
        for y in range(values.shape[1]):
            for x in range(values.shape[2]):
                for k in range(4):
                    r, c = y % 2 + k // 2, x % 2 + k % 2
                    _add(values[b, y, x], products[r, c, b, y // 2, x // 2])


def winograd_cpu(images: Tensor, factors: Tensor, bias: Tensor) -> Tensor:
    """The convolution of `spairkit.models.convolutions`, channels last.

    Args:
        images: [B, C, H, W].
        factors: [9, N, 4 C] g0, g0 + g1 and g1 of the weights, down and across.
        bias: [N].

    Returns:
        [B, N, ceil(H / 2), ceil(W / 2)].
    """
    pixels, bias = _pixels(images), bias.detach().contiguous()
    batch, height, width, _ = pixels.shape
    values = pixels.new_empty(batch, (height + 1) // 2, (width + 1) // 2, len(bias))
    for some in _parts(pixels):
        blocks, products = _empty_tiles(pixels[some], factors)
        n = len(pixels[some])
        over_images(_split_tiles, n, pixels[some].numpy(), blocks.numpy())
        torch.bmm(_rows(blocks), factors.transpose(1, 2), out=_rows(products))
        over_images(_join_tiles, n, products.numpy(), bias.numpy(), values[some].numpy())
    return values.permute(0, 3, 1, 2)


def winograd_backward_cpu(
    grad_values: Tensor, values: Tensor, images: Tensor, factors: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of images, factors and bias."""
    pixels, grads = _pixels(images), _pixels(grad_values)
    grad_pixels, grad_factors = torch.empty_like(pixels), torch.zeros_like(factors)
    for some in _parts(pixels):
        blocks, products = _empty_tiles(pixels[some], factors)
        n = len(pixels[some])
        over_images(_split_tiles, n, pixels[some].numpy(), blocks.numpy())
        over_images(_join_tiles_back, n, grads[some].numpy(), products.numpy())
        of_blocks, of_products = _rows(blocks), _rows(products)
        grad_factors.baddbmm_(of_products.transpose(1, 2), of_blocks)
        torch.bmm(of_products, factors, out=of_blocks)
        over_images(_split_tiles_back, n, blocks.numpy(), grad_pixels[some].numpy())
    return grad_pixels.permute(0, 3, 1, 2), grad_factors, grads.sum((0, 1, 2))


def _pixels(images: Tensor) -> Tensor:  # [B, H, W, C]
    return images.detach().permute(0, 2, 3, 1).contiguous()


def _parts(pixels: Tensor) -> Iterator[slice]:
    """Ranges of images that share their products."""
    batch, height, width, _ = pixels.shape
    n = max(1, _TILES // (-(-height // 4) * -(-width // 4)))
    return (slice(i, i + n) for i in range(0, batch, n))


def _empty_tiles(pixels: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """Empty blocks [3, 3, n, T, U, 2, 2 C] and products [3, 3, n, T, U, N]."""
    n, height, width, channels = pixels.shape
    tiles = 3, 3, n, -(-height // 4), -(-width // 4)
    outputs = factors.shape[1]
    return pixels.new_empty(*tiles, 2, 2 * channels), pixels.new_empty(*tiles, outputs)


def _rows(tiles: Tensor) -> Tensor:
    """[9, R, ...] of [3, 3, n, T, U, ...]."""
    return tiles.flatten(5).flatten(2, 4).flatten(0, 1)
