"""The spatial transformer that cuts glimpses out of images (docs/model.md 3.4)."""

from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from spairkit.models.parts import Part

_FAR = 1e9  # halves of the image; float32 has no place inside a box that goes so far


def extract_glimpses(
    images: Tensor,  # [B, C, H, W]
    boxes: Tensor,  # [B, n, 4] xyxy, pixels
    size: int,
    part: Part | Sequence[Part] | None = None,  # of larger images of one size, if the images are
) -> Tensor:  # [B, n, C, size, size]
    """The images inside boxes, resampled to size x size, with gradients to boxes and images.

    On each axis `size` points run from edge to edge of the box, both included. Image coordinates
    map linearly to pixel indices 0 .. H - 1; beyond the image the border pixel is read. The
    renderer uses pixel centres instead; the mismatch is the authors'. In a part, coordinates map as
    in the larger image; there is one part for all images, or one for each.

    Source: docs/model.md 3.4 (Sonnet's AffineGridWarper and the authors' `resampler_edge`).
    """
    batch, channels, height, width = images.shape
    scale, steps = _constants(height, width, size, boxes.device, boxes.dtype)
    if part is None:
        corners = boxes * scale - 1  # edges of the image at -1 and 1, as grid_sample wants them
    else:
        # pixel i of the part is pixel i + start of the image: (y + start) (length - 1) / length
        parts = [part] if isinstance(part, Part) else part
        factors, shifts = [], []
        for axis, (length, extent) in enumerate(zip(parts[0].size, (height, width), strict=True)):
            most = max(extent - 1, 1)
            factors.append(2 * (length - 1) / (length * most))
            shifts.append([2 * p.corner[axis] / (length * most) + 1 for p in parts])
        shift = boxes.new_tensor(shifts[::-1] * 2).T[:, None]  # [1 or B, 1, 4]
        corners = boxes * boxes.new_tensor(factors[::-1] * 2) - shift
    # infinity times the 0 of an image of one pixel would be NaN
    low, high = corners.clamp(-_FAR, _FAR).unsqueeze(-2).split(2, dim=-1)  # [B, n, 1, 2]
    grid = torch.addcmul(low, high - low, steps)  # [B, n, size^2, 2]
    # one tall grid for all boxes of an image avoids a copy of the image for each box
    grid = grid.reshape(batch, -1, size, 2)
    # torch's gradient on the CPU would use NaN as an address
    grid = grid.nan_to_num(-1.0)
    cut = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=True)
    return cut.reshape(batch, channels, -1, size, size).transpose(1, 2)


@cache  # without limit: a recorded CUDA graph reads from their addresses
def _constants(
    height: int, width: int, size: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """[4] factors from pixels to a range of 2; [size^2, 2] x, y of points, 0 to 1 in the box."""
    # training could not use a tensor that was created in inference mode
    with torch.inference_mode(False):
        scale = torch.tensor([2 / width, 2 / height] * 2, device=device, dtype=dtype)
        steps = torch.linspace(0, 1, size, device=device, dtype=dtype)
        return scale, torch.cartesian_prod(steps, steps).flip(-1)  # x runs fastest
