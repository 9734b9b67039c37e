"""Groups of embeddings whose clusters are known."""

import pytest
import torch
from torch import Tensor

from spairkit import groups as module
from spairkit.groups import clusters, grouped


def clouds(sizes: list[int], spread: float) -> Tensor:
    """Points round centres ten apart in four dimensions."""
    generator = torch.Generator().manual_seed(0)
    centres = 10 * torch.eye(8)[: len(sizes), :4] + torch.arange(len(sizes))[:, None]
    rows = [centre.expand(size, -1) for centre, size in zip(centres, sizes, strict=True)]
    points = torch.cat(rows)
    return points + spread * torch.randn(points.shape, generator=generator)


@pytest.mark.parametrize("sizes", [[30, 20], [40, 12, 9], [50, 30, 20, 10]])
def test_clusters_become_groups_the_largest_first(sizes: list[int]) -> None:
    order = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(1))
    groups = grouped(clouds(sizes, 0.3)[order])
    starts = torch.tensor(sizes).cumsum(0)
    of_rows = torch.searchsorted(starts, order, right=True)
    assert [len(group) for group in groups] == sizes
    for number, group in enumerate(groups):
        assert (of_rows[group] == number).all()


def test_every_row_is_in_one_group() -> None:
    points = torch.rand(57, 5, generator=torch.Generator().manual_seed(2))
    groups = grouped(points)
    assert sorted(row for group in groups for row in group) == list(range(57))


def test_one_cloud_is_one_group_with_the_most_typical_row_first() -> None:
    points = torch.randn(200, 10, generator=torch.Generator().manual_seed(3))
    points[17] = points.mean(0)
    groups = grouped(points)
    assert len(groups) == 1
    assert groups[0][0] == 17


@pytest.mark.parametrize(
    "points",
    [torch.zeros(1, 4), torch.zeros(40, 0), torch.zeros(40, 4), torch.full((9, 2), float("nan"))],
)
def test_points_without_clusters_are_one_group(points: Tensor) -> None:
    assert grouped(points) == [list(range(len(points)))]


def test_groups_are_deterministic() -> None:
    points = clouds([30, 20, 10], 2.0)
    torch.manual_seed(5)
    first = grouped(points)
    torch.manual_seed(6)
    assert grouped(points) == first


def test_clusters_of_many_rows_are_those_of_some(monkeypatch: pytest.MonkeyPatch) -> None:
    points = clouds([40, 30, 20], 0.3)[torch.randperm(90, generator=torch.Generator())]
    every = clusters(points)
    assert every == [
        1 + next(i for i, rows in enumerate(grouped(points)) if row in rows) for row in range(90)
    ]
    monkeypatch.setattr(module, "_MOST", 31)  # every third
    some = clusters(points)
    pairs = set(zip(every, some, strict=True))
    assert len(pairs) == 3, "the same parts"
    assert clusters(torch.zeros(5, 0)) == clusters(torch.zeros(0, 5)) == []
