"""The picture of tracks: the path of each over the last frame."""

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from spairkit.detections import Detections
from spairkit.report.drawing import COLOURS, overlay
from spairkit.tracking import Tracks

_DOT = 2.5  # radius at the end of a path, px of the picture


def draw_tracks(
    image: Tensor,  # [3, H, W] in [0, 1]
    last: Detections,
    tracks: Tracks,
) -> Tensor:  # [3, H', W'] uint8
    """The last frame with its objects, as `drawing.overlay` draws them, and the paths of tracks.

    A dot marks where a path ends. Tracks of one object have none.

    Args:
        image: the last frame.
        last: its objects.
        tracks: of all frames.
    """
    picture = Image.fromarray(overlay(image, last).permute(1, 2, 0).numpy())
    scale = picture.width / image.shape[2]
    draw = ImageDraw.Draw(picture)
    starts = np.flatnonzero(np.diff(tracks.number, prepend=0))
    for i, path in enumerate(np.split(np.stack([tracks.x, tracks.y], 1) * scale, starts[1:])):
        if len(path) < 2:
            continue
        colour = COLOURS[i % len(COLOURS)]
        draw.line([tuple(point) for point in path.tolist()], fill=colour, width=2)
        x, y = path[-1]
        draw.ellipse((x - _DOT, y - _DOT, x + _DOT, y + _DOT), fill=colour)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)
