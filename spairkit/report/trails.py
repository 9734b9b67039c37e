"""The picture of tracks: the path of each over the last frame."""

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from spairkit.detections import Detections
from spairkit.report.colours import colour_numbers, palette
from spairkit.report.drawing import display_levels, overlay, reduced
from spairkit.tracking import Tracks

_DOT = 2.5  # radius at the end of a path, px of the picture


def draw_tracks(
    image: Tensor,  # [3, H, W] in [0, 1]
    last: Detections,
    tracks: Tracks,
) -> Tensor:  # [3, H', W'] uint8
    """The last frame with its objects, as `drawing.overlay` draws them, and the paths of tracks.

    A track has one colour, for its path and for its object in the last frame. A dot marks where a
    path ends. Tracks of one object have none.

    Args:
        image: the last frame.
        last: its objects.
        tracks: of all frames.
    """
    known = palette(reduced(image, max(image.shape[1:]), display_levels(image)))
    chosen = np.arange(len(tracks)) % len(known)
    ends = tracks.frame == tracks.frame.max(initial=0)
    owner = np.zeros(len(last), np.int64)
    if len(last):
        owner[tracks.row[ends]] = tracks.number[ends] - 1
        chosen[owner] = colour_numbers(last.boxes, wanted=owner)
    colours = [known[number] for number in chosen[owner].tolist()]
    picture = Image.fromarray(overlay(image, last, colours).permute(1, 2, 0).numpy())
    scale = picture.width / image.shape[2]
    draw = ImageDraw.Draw(picture)
    starts = np.flatnonzero(np.diff(tracks.number, prepend=0))
    for i, path in enumerate(np.split(np.stack([tracks.x, tracks.y], 1) * scale, starts[1:])):
        if len(path) < 2:
            continue
        colour = known[chosen[i]]
        draw.line([tuple(point) for point in path.tolist()], fill=colour, width=2)
        x, y = path[-1]
        draw.ellipse((x - _DOT, y - _DOT, x + _DOT, y + _DOT), fill=colour)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)
