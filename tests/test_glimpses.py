"""Glimpses against a loop over their pixels (spec section 3.4)."""

import math

import pytest
import torch
from torch import Tensor

from spairkit.glimpses import box_gradient, extract_glimpses, glimpse_rows


def glimpse_by_loop(image: Tensor, box: list[float], size: int) -> Tensor:
    """Points from edge to edge of the box, mapped to pixel index p = share * (W - 1), clamped."""
    channels, height, width = image.shape
    x1, y1, x2, y2 = box
    result = torch.zeros(channels, size, size, dtype=image.dtype)
    for r in range(size):
        for c in range(size):
            y = (y1 + (y2 - y1) * r / (size - 1)) / height * (height - 1)
            x = (x1 + (x2 - x1) * c / (size - 1)) / width * (width - 1)
            y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
            top, left = min(math.floor(y), height - 2), min(math.floor(x), width - 2)
            v, u = y - top, x - left
            above = (1 - u) * image[:, top, left] + u * image[:, top, left + 1]
            below = (1 - u) * image[:, top + 1, left] + u * image[:, top + 1, left + 1]
            result[:, r, c] = (1 - v) * above + v * below
    return result


@pytest.mark.parametrize(("height", "width"), [(9, 14), (48, 48)])
def test_matches_a_loop_over_pixels(height: int, width: int) -> None:
    torch.manual_seed(0)
    images = torch.rand(2, 3, height, width, dtype=torch.float64)
    boxes = torch.rand(2, 5, 4, dtype=torch.float64) * width - 3
    boxes[..., 2:] = boxes[..., :2] + torch.rand(2, 5, 2, dtype=torch.float64) * 12
    actual = extract_glimpses(images, boxes, 6)
    for b in range(2):
        for n in range(5):
            expected = glimpse_by_loop(images[b], boxes[b, n].tolist(), 6)
            torch.testing.assert_close(actual[b, n], expected, rtol=0, atol=1e-12)


def test_the_whole_image_at_its_own_size_is_the_image() -> None:
    images = torch.rand(1, 3, 8, 8)
    boxes = torch.tensor([[[0.0, 0.0, 8.0, 8.0]]])
    torch.testing.assert_close(extract_glimpses(images, boxes, 8)[:, 0], images)


def test_gradients_match_differences() -> None:
    torch.manual_seed(0)
    images = torch.rand(1, 2, 7, 9, dtype=torch.float64)
    boxes = torch.tensor([[[1.37, 0.71, 6.13, 5.9]]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda b: extract_glimpses(images, b, 4), (boxes,))


@pytest.mark.parametrize(("height", "width"), [(9, 14), (1, 1), (1, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["compiled", "torch"])
def test_rows_and_their_gradient_match_autograd(
    dtype: torch.dtype, height: int, width: int
) -> None:
    torch.manual_seed(0)
    images = torch.rand(3, 2, height, width, dtype=dtype)
    boxes = torch.rand(12, 4, dtype=dtype) * width - 3
    boxes[:, 2:] = boxes[:, :2] + torch.rand(12, 2, dtype=dtype) * 12
    exact = boxes.double().requires_grad_()
    by_image = exact.unflatten(0, (4, 3)).transpose(0, 1)
    expected = extract_glimpses(images.double(), by_image, 6).transpose(0, 1).reshape(12, -1)
    actual = torch.empty(12, 2 * 6 * 6, dtype=dtype)
    glimpse_rows(images, boxes, 6, actual)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=tolerance)
    grad = torch.randn(actual.shape, dtype=dtype)
    (slope,) = torch.autograd.grad(expected, exact, grad.double())
    ours = box_gradient(grad, images, boxes, 6).double()
    torch.testing.assert_close(ours, slope, rtol=10 * tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # Numba, and torch
def test_boxes_that_are_no_numbers_read_inside_the_image(dtype: torch.dtype) -> None:
    images = torch.rand(1, 3, 8, 8, dtype=dtype)
    rows = [[math.nan, 0.0, math.inf, 4.0], [-math.inf, 1e30, 1e30, math.nan]]
    boxes = torch.tensor(rows, dtype=dtype)
    glimpses = torch.empty(2, 48, dtype=dtype)
    glimpse_rows(images, boxes, 4, glimpses)
    assert bool(((glimpses >= 0) & (glimpses <= 1)).all())
    assert box_gradient(torch.ones(2, 48, dtype=dtype), images, boxes, 4).shape == (2, 4)
