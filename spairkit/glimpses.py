"""The spatial transformer that cuts glimpses out of images (spec section 3.4)."""

import torch
import torch.nn.functional as F
from torch import Tensor


def extract_glimpses(
    images: Tensor,  # [B, C, H, W]
    boxes: Tensor,  # [B, n, 4] xyxy, pixels
    size: int,
) -> Tensor:  # [B, n, C, size, size]
    """The images inside boxes, resampled to size x size, with gradients to boxes and images.

    `size` points per axis run from edge to edge of the box, both ends included; image
    coordinates map linearly to pixel indices 0 .. H - 1; outside, the border pixel is taken.
    The renderer uses pixel centres instead; the authors' code has the same difference.

    Source: section 3.4 (Sonnet's AffineGridWarper and the authors' `resampler_edge`).
    """
    batch, channels, height, width = images.shape
    steps = torch.linspace(0, 1, size, device=boxes.device, dtype=boxes.dtype)
    extent = boxes.new_tensor([width, height, width, height])
    corners = 2 * boxes / extent - 1  # [B, n, 4] in [-1, 1] inside the image
    x1, y1, x2, y2 = corners.unsqueeze(-2).unbind(-1)  # [B, n, 1] each
    x = x1 + (x2 - x1) * steps  # [B, n, size]
    y = y1 + (y2 - y1) * steps
    shape = (batch, boxes.shape[1], size, size)
    grid = torch.stack([x[:, :, None, :].expand(shape), y[:, :, :, None].expand(shape)], dim=-1)
    # all boxes of an image as one tall grid: no copy of the image for each box
    grid = grid.reshape(batch, -1, size, 2)
    cut = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=True)
    return cut.reshape(batch, channels, -1, size, size).transpose(1, 2)
