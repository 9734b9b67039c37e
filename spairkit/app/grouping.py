"""Groups of objects that look alike, over all images of a folder."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from spairkit.groups import clusters, nearest

_CONFIDENT = 0.5  # objects above it make the groups; the others join the nearest

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Group:
    """Objects that look alike, by a typical one."""

    image: int
    """Index of the image in which it lies."""
    box: tuple[float, float, float, float]
    """x1, y1, x2, y2, px."""
    count: int
    """Objects with confidences above .5."""


def groups_of(
    objects: Mapping[int, tuple[Array, Array, Array]],
) -> tuple[list[Group], dict[int, npt.NDArray[np.int64]]]:
    """The groups, the largest first, and for each image the number of each object's, from 1.

    Objects of confidences above .5 make the groups, the clusters of `detect --table`; every other
    one belongs to that of the nearest mean. If all look alike there is no group, and all numbers
    are 1. There are no numbers without embeddings, or if no confidence is above .5.

    Args:
        objects: embeddings [n, A], confidences [n] and boxes [n, 4] of each image, by its index.
    """
    images = sorted(image for image in objects if objects[image][0].size)
    rows = [
        (image, row) for image in images for row in np.flatnonzero(objects[image][1] > _CONFIDENT)
    ]
    if not rows:
        return [], {}
    points = torch.from_numpy(np.stack([objects[image][0][row] for image, row in rows]))
    chosen = torch.tensor(clusters(points))
    points = points.double().nan_to_num()
    means = torch.stack([points[chosen == n].mean(0) for n in range(1, int(chosen.max()) + 1)])
    numbers = {
        image: nearest(torch.from_numpy(objects[image][0]), means).numpy() for image in images
    }
    for (image, row), number in zip(rows, chosen.tolist(), strict=True):
        numbers[image][row] = number
    groups = []
    for number, mean in enumerate(means if len(means) > 1 else [], start=1):
        own = (chosen == number).nonzero()[:, 0]
        image, row = rows[int(own[(points[own] - mean).norm(dim=1).argmin()])]
        x1, y1, x2, y2 = objects[image][2][row].tolist()
        groups.append(Group(image, (x1, y1, x2, y2), len(own)))
    return groups, numbers
