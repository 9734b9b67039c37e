"""The spatial transformer that cuts glimpses out of images (docs/model.md 3.4)."""

from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from spairkit.models.parts import Part

_XYXY = [1, 0, 1, 0]  # of a pair of y and x
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
    # a trace must not leave its tensors in the cache
    constants = _constants.__wrapped__ if torch.compiler.is_compiling() else _constants
    scale, steps = constants(height, width, size, boxes.device, boxes.dtype)
    if part is None:
        corners = boxes * scale - 1  # edges of the image at -1 and 1, as grid_sample wants them
    else:
        index_scale, shift = pixel_frames(images, part).to(boxes).unflatten(1, (2, 2)).unbind(-1)
        most = boxes.new_tensor([max(height - 1, 1), max(width - 1, 1)])
        factor, shift = 2 * index_scale / most, 2 * shift / most - 1  # [B, 2] of y and x
        corners = boxes * factor[:, None, _XYXY] + shift[:, None, _XYXY]
    # infinity times the 0 of an image of one pixel would be NaN
    low, high = corners.clamp(-_FAR, _FAR).unsqueeze(-2).split(2, dim=-1)  # [B, n, 1, 2]
    grid = torch.addcmul(low, high - low, steps)  # [B, n, size^2, 2]
    # one tall grid for all boxes of an image avoids a copy of the image for each box
    grid = grid.reshape(batch, -1, size, 2)
    # torch's gradient on the CPU would use NaN as an address
    grid = grid.nan_to_num(-1.0)
    cut = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=True)
    return cut.reshape(batch, channels, -1, size, size).transpose(1, 2)


def pixel_frames(images: Tensor, part: Part | Sequence[Part] | None) -> Tensor:  # [B, 4] float64
    """Scale and shift from coordinates in px to pixel indices of images [B, C, H, W], of y and x.

    An image of length L has the index y (L - 1) / L. Pixel i of a part is pixel i + start of the
    image, so y in the part has the index (y + start) (L - 1) / L - start.
    """
    batch, *extent = len(images), images.shape[-2], images.shape[-1]
    parts = [part] * batch if part is None or isinstance(part, Part) else part
    rows = []
    for p in parts:
        (height, width), (y, x) = (extent, (0, 0)) if p is None else (p.size, p.corner)
        rows.append([(height - 1) / height, -y / height, (width - 1) / width, -x / width])
    return torch.tensor(rows, dtype=torch.float64)


@cache  # without limit: a recorded CUDA graph reads from their addresses
def _constants(
    height: int, width: int, size: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """[4] factors from pixels to a range of 2; [size^2, 2] x, y of points, 0 to 1 in the box."""
    # training could not use a tensor that was created in inference mode
    with torch.inference_mode(False):
        x, y = (torch.full((1,), 2 / n, device=device, dtype=dtype) for n in (width, height))
        scale = torch.cat([x, y, x, y])  # no tensor of a list, which a traced loop cannot hold
        steps = torch.linspace(0, 1, size, device=device, dtype=dtype)
        return scale, torch.cartesian_prod(steps, steps).flip(-1)  # x runs fastest
