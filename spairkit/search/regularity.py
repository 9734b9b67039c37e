"""How regular masks are: single objects are convex and of about the expected size.

Where energies are not calibrated they are far from 0 for almost every object, and rank badly. Two
objects that were taken for one, and the rims of larger ones, have odd masks.
"""

import numpy as np
import torch
from scipy.ndimage import find_objects
from scipy.spatial import ConvexHull
from torch import Tensor

from spairkit.preparation import OBJECT_PX

_FULL_AREA = 0.55 * OBJECT_PX**2  # of a mask that is not small, px^2
_CORNERS = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])


def regularity(label_image: Tensor, labels: Tensor) -> Tensor:  # [H, W], [n] -> [n] in [0, 1]
    """The share of its convex hull that a mask fills, times that of a full area, 1 at most.

    A mask without a pixel has 0.
    """
    pixels = label_image.numpy()
    spans = find_objects(pixels)
    values = np.zeros(len(labels), np.float32)
    for i, label in enumerate(labels.tolist()):
        span = spans[label - 1] if label <= len(spans) else None
        if span is None:
            continue
        places = np.argwhere(pixels[span] == label)
        corners = (places[:, None] + _CORNERS).reshape(-1, 2)
        hull = ConvexHull(corners).volume  # the area, in two dimensions
        values[i] = len(places) / hull * min(1.0, len(places) / _FULL_AREA)
    return torch.from_numpy(values)


def ranked(scores: Tensor, regular: Tensor) -> Tensor:  # [n], [n] -> [n]
    """Scores above 1/2, lowered towards it for irregular masks; others stay."""
    return torch.where(scores > 0.5, 0.5 + (scores - 0.5) * regular, scores)
