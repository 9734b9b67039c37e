"""How far an object can be trusted where energies are not calibrated (docs/model.md 14.7).

Energies are then far from 0 for almost every object, and rank badly. Single objects have convex
masks of about the expected size that stand out from their surroundings, and the encoder finds them
too.
"""

import math

import numpy as np
import torch
from scipy.ndimage import find_objects, gaussian_filter
from scipy.spatial import ConvexHull
from torch import Tensor

from spairkit.boxes import box_iou
from spairkit.counts import CountPosterior
from spairkit.detections import Detections
from spairkit.preparation import OBJECT_PX

LEAST_TRUST = 0.32
"""Objects with less have a confidence below 1/2."""

_FULL_AREA = 0.55 * OBJECT_PX**2  # of a mask that is not small, px^2
_CUT_OFF = 0.7  # least share of the full area that objects at the ends of the image count with
_SURROUNDINGS = 2 / 3 * OBJECT_PX  # standard deviation of the local mean, px
_LEAST_CONTRAST = 1e-3
_ALONE = 0.25  # factor of an object that the encoder lacks
_MORE, _DOUBT, _STEEP, _USUAL = 1.05, 0.1, 10.0, 0.7  # of the number of objects
_CORNERS = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])


def trust(found: Detections, image: Tensor, encoded: Tensor) -> Tensor:  # [n] in [0, 1]
    """The root of: the mask's regularity, times the root of its contrast, times the encoder's
    agreement.

    Args:
        found: n objects with masks, in the prepared image.
        image: [C, H, W] the prepared image.
        encoded: [m, 4] boxes xyxy of the encoder's objects, px.
    """
    assert found.label_image is not None
    assert found.labels is not None
    brightest = image.amax(0).float().cpu().numpy()
    local = brightest - gaussian_filter(brightest, _SURROUNDINGS)
    shape = regularity(found.label_image, found.labels, found.boxes)
    contrast = contrasts(found.label_image, found.labels, torch.from_numpy(local))
    nothing = torch.zeros(1, 4)  # so that there is a greatest IoU
    agreed = box_iou(found.boxes, torch.cat([encoded.cpu(), nothing])).amax(1)
    return (shape * contrast.sqrt() * (_ALONE + (1 - _ALONE) * agreed)).sqrt()


def doubted_count(confidences: Tensor) -> CountPosterior:
    """The number of objects, from how far those that are found can be trusted.

    Its mean is 1.05 n and its variance (n + 1) / 2 + (s n)^2, of n objects with the mean confidence
    c, with s = exp(-10 (c - .7)) / 10. This fits the errors on annotated images (docs/model.md
    14.7), which are about the model more than about single objects.

    Args:
        confidences: [n] in [1/2, 1], of the objects that are found.
    """
    n = len(confidences)
    relative = 0.0
    if n:
        relative = _DOUBT * math.exp(-_STEEP * (float(confidences.double().mean()) - _USUAL))
    return CountPosterior.spread(_MORE * n, math.sqrt((n + 1) / 2 + (relative * n) ** 2))


def regularity(
    label_image: Tensor,  # [H, W]
    labels: Tensor,  # [n]
    boxes: Tensor,  # [n, 4] xyxy, px
) -> Tensor:  # [n] in [0, 1]
    """The share of its convex hull that a mask fills, times that of a full area, 1 at most.

    Objects at the ends of the image may be cut off there, so they count with at least `_CUT_OFF` of
    a full area. A mask without a pixel has 0.
    """
    pixels = label_image.numpy()
    spans = find_objects(pixels)
    ends = torch.tensor(pixels.shape[::-1])
    at_end = ((boxes[:, :2] <= 0) | (boxes[:, 2:] >= ends)).any(1).tolist()
    values = np.zeros(len(labels), np.float32)
    for i, label in enumerate(labels.tolist()):
        span = spans[label - 1] if label <= len(spans) else None
        if span is None:
            continue
        places = np.argwhere(pixels[span] == label)
        corners = (places[:, None] + _CORNERS).reshape(-1, 2)
        hull = ConvexHull(corners).volume  # the area, in two dimensions
        full = max(len(places) / _FULL_AREA, _CUT_OFF if at_end[i] else 0.0)
        values[i] = len(places) / hull * min(1.0, full)
    return torch.from_numpy(values)


def contrasts(
    label_image: Tensor,  # [H, W]
    labels: Tensor,  # [n]
    local: Tensor,  # [H, W] each pixel less the mean around it
) -> Tensor:  # [n] in (0, 1]
    """The mean of `local` over each mask, at least `_LEAST_CONTRAST`."""
    most = int(labels.max()) if len(labels) else 0
    flat = label_image.flatten().long().clamp(max=most + 1)
    number = torch.bincount(flat, minlength=most + 2)
    total = torch.bincount(flat, local.flatten(), most + 2)
    mean = total / number.clamp(min=1)
    return mean[labels.long()].clamp(_LEAST_CONTRAST, 1).float()


def ranked(scores: Tensor, trusted: Tensor) -> Tensor:  # [n], [n] -> [n]
    """Scores above 1/2, lowered by distrust: to 1/2 at `LEAST_TRUST`; others stay."""
    share = (trusted - LEAST_TRUST) / (1 - LEAST_TRUST)
    return torch.where(scores > 0.5, 0.5 + (scores - 0.5) * share, scores)
