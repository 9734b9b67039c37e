"""Groups of objects that look alike, by k-means on their embeddings."""

import torch
from torch import Tensor

_MAX_GROUPS = 6
_LEAST_MEMBERS = 4  # objects per group, on average, or there are fewer groups
_LEAST_SILHOUETTE = 0.25  # else all objects are one group
_MOST = 20_000  # rows that make the groups of `clusters`
_ROUNDS = 50
_SEED = 0


def grouped(embeddings: Tensor) -> list[list[int]]:  # [n, A]
    """The rows of each group, the largest group first, in a group the most typical row first.

    There are one to six groups: the number of the greatest mean silhouette (by distances to centres
    instead of to all members), if it reaches .25, else one.

    Args:
        embeddings: [n, A], n from 1; A may be 0.
    """
    points = embeddings.double().nan_to_num()
    best, labels = _LEAST_SILHOUETTE, torch.zeros(len(points), dtype=torch.int64)
    most = min(_MAX_GROUPS, len(points) // _LEAST_MEMBERS)
    for k in range(2, most + 1) if points.shape[1] else ():
        centres = _centres(points, k)
        near, order = torch.cdist(points, centres).topk(2, largest=False)
        silhouette = float(((near[:, 1] - near[:, 0]) / near[:, 1].clamp(min=1e-12)).mean())
        if silhouette > best:
            best, labels = silhouette, order[:, 0]
    groups = []
    for label in labels.unique():
        rows = (labels == label).nonzero()[:, 0]
        distances = (points[rows] - points[rows].mean(0)).norm(dim=1)
        groups.append(rows[distances.argsort(stable=True)].tolist())
    return sorted(groups, key=len, reverse=True)


def clusters(embeddings: Tensor) -> list[int]:  # [n, A]
    """The number of each row's group in `grouped`, from 1, the largest; empty if n or A is 0.

    Of more than 20,000 rows at most 20,000, evenly spread, make the groups, and every row belongs
    to that of the nearest mean.
    """
    if not embeddings.numel():
        return []
    points = embeddings[:: -(-len(embeddings) // _MOST)].double().nan_to_num()
    parts = grouped(points)
    if len(points) < len(embeddings):
        return nearest(embeddings, torch.stack([points[rows].mean(0) for rows in parts])).tolist()
    numbers = torch.zeros(len(embeddings), dtype=torch.int64)
    for number, rows in enumerate(parts, start=1):
        numbers[rows] = number
    return numbers.tolist()


def nearest(embeddings: Tensor, means: Tensor) -> Tensor:  # [n, A], [k, A] -> [n] int64
    """The number of the nearest mean of each row, from 1."""
    return 1 + torch.cdist(embeddings.double().nan_to_num(), means.double()).argmin(1)


def _centres(points: Tensor, k: int) -> Tensor:  # [k, A]
    """k-means, which starts at points drawn by their squared distance to those before."""
    generator = torch.Generator().manual_seed(_SEED)
    first = int(torch.randint(len(points), (), generator=generator))
    centres = points[first : first + 1]
    for _ in range(1, k):
        square = torch.cdist(points, centres).amin(1).square()
        if not bool(square.sum() > 0):  # fewer different points than groups
            return torch.cat([centres, centres[-1:].expand(k - len(centres), -1)])
        drawn = torch.multinomial(square, 1, generator=generator)
        centres = torch.cat([centres, points[drawn]])
    for _ in range(_ROUNDS):
        nearest = torch.cdist(points, centres).argmin(1)
        members = torch.nn.functional.one_hot(nearest, k).double()  # [n, k]
        sizes = members.sum(0)[:, None]
        moved = torch.where(sizes > 0, members.T @ points / sizes.clamp(min=1), centres)
        if torch.equal(moved, centres):
            break
        centres = moved
    return centres
