"""Glimpses and placed maps against loops over pixels in float64, and their gradients."""

import math

import pytest
import torch
from torch import Tensor

from spairkit.models.affine import cut, place


def sample(image: list[list[float]], row: float, column: float) -> float:
    """Bilinear interpolation of the four neighbours, with zeros outside."""
    total = 0.0
    for r in (math.floor(row), math.floor(row) + 1):
        for c in (math.floor(column), math.floor(column) + 1):
            if 0 <= r < len(image) and 0 <= c < len(image[0]):
                total += (1 - abs(row - r)) * (1 - abs(column - c)) * image[r][c]
    return total


def index(along: float, samples: int) -> float:
    return (along + 1) * (samples - 1.001) / 2


def boxes(batch: int, num: int) -> tuple[Tensor, Tensor]:
    """Scales and shifts of boxes, some of which extend beyond the image."""
    generator = torch.Generator().manual_seed(2)
    scale = 0.05 + 0.9 * torch.rand(batch, num, 2, generator=generator, dtype=torch.float64)
    shift = 2 * torch.rand(batch, num, 2, generator=generator, dtype=torch.float64) - 1
    return scale, shift


def test_cut_equals_a_loop_over_pixels() -> None:
    images = torch.rand(2, 3, 7, 10, dtype=torch.float64)
    scale, shift = boxes(2, 3)
    glimpses = cut(images, scale, shift, 5)
    assert glimpses.shape == (2, 3, 3, 5, 5)
    for b in range(2):
        for n in range(3):
            (w, h), (x, y) = scale[b, n].tolist(), shift[b, n].tolist()
            for c in range(3):
                image = images[b, c].tolist()
                for i in range(5):
                    for j in range(5):
                        u, v = -1 + 2 * j / 4, -1 + 2 * i / 4
                        expected = sample(image, index(h * v + y, 7), index(w * u + x, 10))
                        assert float(glimpses[b, n, c, i, j]) == pytest.approx(expected, abs=1e-12)


def test_place_equals_a_loop_over_pixels() -> None:
    maps = torch.rand(2, 3, 3, 5, 5, dtype=torch.float64)
    scale, shift = boxes(2, 3)
    placed = place(maps, scale, shift, 7, 10)
    assert placed.shape == (2, 3, 3, 7, 10)
    for b in range(2):
        for n in range(3):
            (w, h), (x, y) = scale[b, n].tolist(), shift[b, n].tolist()
            for c in range(3):
                texels = maps[b, n, c].tolist()
                for i in range(7):
                    for j in range(10):
                        # the inverse affine map (1/w, 0, -x/w; 0, 1/h, -y/h)
                        u = (-1 + 2 * j / 9) / w - x / w
                        v = (-1 + 2 * i / 6) / h - y / h
                        expected = sample(texels, index(v, 5), index(u, 5))
                        assert float(placed[b, n, c, i, j]) == pytest.approx(expected, abs=1e-12)


def test_cutting_the_whole_image_returns_it() -> None:
    images = torch.rand(1, 3, 9, 9, dtype=torch.float64)
    whole = torch.ones(1, 1, 2, dtype=torch.float64), torch.zeros(1, 1, 2, dtype=torch.float64)
    # the sampling grid is a thousandth of a texel short, as in the authors' code
    torch.testing.assert_close(cut(images, *whole, 9)[:, 0], images, atol=2e-3, rtol=0)
    torch.testing.assert_close(
        place(images[:, None], *whole, 9, 9)[:, 0], images, atol=2e-3, rtol=0
    )


def test_place_inverts_cut() -> None:
    """Approximately, for a smooth image that is bright in the middle of a box."""
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, 64, dtype=torch.float64)] * 2, indexing="ij")
    image = torch.exp(-((x - 0.2) ** 2 + (y + 0.3) ** 2) / 0.05).expand(1, 3, 64, 64)
    scale = torch.tensor([[[0.5, 0.6]]], dtype=torch.float64)
    shift = torch.tensor([[[0.2, -0.3]]], dtype=torch.float64)
    back = place(cut(image, scale, shift, 40), scale, shift, 64, 64)[:, 0]
    torch.testing.assert_close(back, image, atol=0.02, rtol=0)


def test_gradients_match_finite_differences() -> None:
    scale, shift = boxes(1, 2)
    scale, shift = scale.requires_grad_(), shift.requires_grad_()
    images = torch.rand(1, 2, 6, 5, dtype=torch.float64, requires_grad=True)
    maps = torch.rand(1, 2, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    check = torch.autograd.gradcheck
    assert check(
        lambda i, s, t: cut(i, s, t, 4), (images, scale, shift), eps=1e-7, atol=1e-6, rtol=1e-5
    )
    assert check(
        lambda m, s, t: place(m, s, t, 6, 5), (maps, scale, shift), eps=1e-7, atol=1e-6, rtol=1e-5
    )
