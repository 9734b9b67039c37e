"""Groups of objects that look alike, over all images of a folder."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from spairkit.groups import grouped

_CONFIDENT = 0.5  # objects above it make the groups; the others join the nearest
_MOST = 20_000  # objects that make the groups

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

    Both are empty if objects have no embeddings, or all look alike. Up to 20,000 objects of
    confidences above .5, evenly spread, make the groups; every other one belongs to that of the
    nearest mean.

    Args:
        objects: embeddings [n, A], confidences [n] and boxes [n, 4] of each image, by its index.
    """
    images = sorted(image for image in objects if objects[image][0].size)
    rows = [
        (image, row) for image in images for row in np.flatnonzero(objects[image][1] > _CONFIDENT)
    ]
    every = -(-len(rows) // _MOST)
    rows = rows[::every] if rows else rows
    if not rows:
        return [], {}
    points = torch.from_numpy(
        np.stack([objects[image][0][row] for image, row in rows]).astype(float)
    )
    parts = grouped(points)
    if len(parts) < 2:
        return [], {}
    means = torch.stack([points[part].mean(0) for part in parts])
    numbers = {}
    for image in images:
        embeddings = torch.from_numpy(objects[image][0].astype(float))
        numbers[image] = 1 + torch.cdist(embeddings, means).argmin(1).numpy()
    confident = [numbers[image][objects[image][1] > _CONFIDENT] for image in images]
    sizes = np.bincount(np.concatenate(confident), minlength=len(parts) + 1)
    groups = []
    for number, part in enumerate(parts, start=1):
        image, row = rows[part[0]]
        x1, y1, x2, y2 = objects[image][2][row].tolist()
        groups.append(Group(image, (x1, y1, x2, y2), int(sizes[number])))
    return groups, numbers
