"""Glimpses against a loop over their pixels (docs/model.md 3.4)."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from spairkit.kernels.glimpse_cpu import glimpses_backward, glimpses_forward
from spairkit.kernels.threads import compiled
from spairkit.models.glimpses import extract_glimpses, pixel_frames
from spairkit.models.parts import Part


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
def test_glimpses_match_a_loop_over_pixels(height: int, width: int) -> None:
    torch.manual_seed(0)
    images = torch.rand(2, 3, height, width, dtype=torch.float64)
    boxes = torch.rand(2, 5, 4, dtype=torch.float64) * width - 3
    boxes[..., 2:] = boxes[..., :2] + torch.rand(2, 5, 2, dtype=torch.float64) * 12
    actual = extract_glimpses(images, boxes, 6)
    for b in range(2):
        for n in range(5):
            expected = glimpse_by_loop(images[b], boxes[b, n].tolist(), 6)
            torch.testing.assert_close(actual[b, n], expected, rtol=0, atol=1e-12)


def test_glimpse_of_the_whole_image_equals_the_image() -> None:
    images = torch.rand(1, 3, 8, 8)
    boxes = torch.tensor([[[0.0, 0.0, 8.0, 8.0]]])
    torch.testing.assert_close(extract_glimpses(images, boxes, 8)[:, 0], images)


def test_gradients_match_finite_differences() -> None:
    torch.manual_seed(0)
    images = torch.rand(1, 2, 7, 9, dtype=torch.float64)
    boxes = torch.tensor([[[1.37, 0.71, 6.13, 5.9]]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda b: extract_glimpses(images, b, 4), (boxes,), atol=1e-6, rtol=1e-5
    )


def compiled_glimpses(images: Tensor, boxes: Tensor, size: int, part: Part | None = None) -> Tensor:
    glimpses = np.empty((len(boxes), images.shape[1], size, size), np.float32)
    frames = pixel_frames(images, part).float().numpy()
    CUT(images.numpy(), boxes.numpy(), frames, glimpses)
    return torch.from_numpy(glimpses).flatten(1)


def compiled_gradient(grad: Tensor, images: Tensor, boxes: Tensor, size: int) -> Tensor:
    grad_boxes = np.empty((len(boxes), 4), np.float32)
    glimpses = grad.reshape(len(boxes), images.shape[1], size, size)
    frames = pixel_frames(images, None).float().numpy()
    CUT_BACK(glimpses.numpy(), images.numpy(), boxes.numpy(), frames, grad_boxes)
    return torch.from_numpy(grad_boxes)


# as the compiled loop over cells inlines them
CUT = compiled(lambda *arguments: glimpses_forward(*arguments))
CUT_BACK = compiled(lambda *arguments: glimpses_backward(*arguments))


@pytest.mark.parametrize(("height", "width"), [(9, 14), (1, 1), (1, 7)])
def test_compiled_glimpses_match_autograd(height: int, width: int) -> None:
    torch.manual_seed(0)
    images = torch.rand(3, 2, height, width)
    boxes = torch.rand(12, 4) * width - 3
    boxes[:, 2:] = boxes[:, :2] + torch.rand(12, 2) * 12
    exact = boxes.double().requires_grad_()
    by_image = exact.unflatten(0, (4, 3)).transpose(0, 1)
    expected = extract_glimpses(images.double(), by_image, 6).transpose(0, 1).reshape(12, -1)
    actual = compiled_glimpses(images, boxes, 6).double()
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    grad = torch.randn(actual.shape)
    (slope,) = torch.autograd.grad(expected, exact, grad.double())
    ours = compiled_gradient(grad, images, boxes, 6).double()
    torch.testing.assert_close(ours, slope, rtol=1e-4, atol=1e-4)


def test_nan_boxes_sample_inside_the_image() -> None:
    images = torch.rand(1, 3, 8, 8)
    rows = [[math.nan, 0.0, math.inf, 4.0], [-math.inf, 1e30, 1e30, math.nan]]
    boxes = torch.tensor(rows)
    glimpses = compiled_glimpses(images, boxes, 4)
    assert bool(((glimpses >= 0) & (glimpses <= 1)).all())
    assert compiled_gradient(torch.ones(2, 48), images, boxes, 4).shape == (2, 4)
    assert bool(extract_glimpses(images, boxes[None], 4).isfinite().all())
