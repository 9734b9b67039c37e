"""The schedule of the cells: in waves instead of one by one, with the same results.

A cell reads its neighbours top-left, top, top-right and left. Cells (i, j) with equal 2 i + j do
not depend on each other and form one wave: a 4 x 4 grid takes 10 waves instead of 16 steps.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

NEIGHBOURS = ((-1, -1), (-1, 0), (-1, 1), (0, -1))
"""Row and column offsets: top-left, top, top-right, left (docs/model.md 3.2)."""

LOOKBACK = 3
"""Waves from a cell back to its farthest neighbour: top-left has 2 (i - 1) + (j - 1)."""


@dataclass(frozen=True, eq=False)
class Wave:
    """Cells that are computed together: places start to stop in wave order."""

    start: int
    stop: int
    neighbours: Tensor  # [stop - start, 4] int64
    """Indices into [edge, the cells of the last LOOKBACK waves, oldest first]."""


@dataclass(frozen=True, eq=False)
class Wavefront:
    """A schedule for a grid of rows x columns cells; K = rows * columns."""

    waves: tuple[Wave, ...]
    order: Tensor  # [K] int64, the raster index of each place in wave order
    places: Tensor  # [K] int64, the place in wave order of each raster index
    neighbours: Tensor  # [K, 4] int64 places of NEIGHBOURS of each place; K is the edge
    followers: Tensor  # [K, 4] int64 the inverse: the place whose NEIGHBOURS[d] it is, or K


@dataclass(frozen=True, eq=False)
class EvenWaves:
    """The waves of a grid at the size n of the largest, for loops over steps of one shape.

    What is missing in a wave is filled up with cells that have no neighbours and are read by none.
    """

    order: Tensor  # [T, n] int64, the raster index of each cell; 0 where a wave is filled up
    neighbours: Tensor  # [T, n, 4] int64
    """Indices into [edge, the cells of the last LOOKBACK waves, oldest first]."""
    places: Tensor  # [K] int64, the index in [T n] of each raster index


@cache  # without limit: a recorded CUDA graph reads from its address
@torch.inference_mode(False)  # cached tensors are used outside the mode too
def wavefront(rows: int, columns: int, device: torch.device) -> Wavefront:
    """The schedule for a grid, cached for each size."""
    groups = [
        [(i, t - 2 * i) for i in range(rows) if 0 <= t - 2 * i < columns]
        for t in range(columns + 2 * (rows - 1))
    ]
    waves, start = [], 0
    for t, cells in enumerate(groups):
        pool = [cell for group in groups[max(0, t - LOOKBACK) : t] for cell in group]
        row_of = {cell: 1 + row for row, cell in enumerate(pool)}
        near = [[row_of.get((i + di, j + dj), 0) for di, dj in NEIGHBOURS] for i, j in cells]
        neighbours = torch.tensor(near, dtype=torch.int64, device=device).reshape(-1, 4)
        waves.append(Wave(start, start + len(cells), neighbours))
        start += len(cells)
    cells = [cell for group in groups for cell in group]
    place_of = {cell: place for place, cell in enumerate(cells)}
    order, neighbours, followers = (
        torch.tensor(table, dtype=torch.int64, device=device)
        for table in (
            [i * columns + j for i, j in cells],
            [[place_of.get((i + y, j + x), start) for y, x in NEIGHBOURS] for i, j in cells],
            [[place_of.get((i - y, j - x), start) for y, x in NEIGHBOURS] for i, j in cells],
        )
    )
    return Wavefront(tuple(waves), order, order.argsort(), neighbours, followers)


@cache
@torch.inference_mode(False)
def even_waves(rows: int, columns: int) -> EvenWaves:
    """The waves of a grid, all of one size, on the CPU; cached for each size."""
    front = wavefront(rows, columns, torch.device("cpu"))
    size = max(wave.stop - wave.start for wave in front.waves)
    order = torch.zeros(len(front.waves), size, dtype=torch.int64)
    neighbours = torch.zeros(len(front.waves), size, len(NEIGHBOURS), dtype=torch.int64)
    even = torch.zeros(rows * columns + 1, dtype=torch.int64)  # of each place, and of the edge
    for t, wave in enumerate(front.waves):
        own, number = slice(wave.start, wave.stop), wave.stop - wave.start
        order[t, :number] = front.order[own]
        even[own] = t * size + torch.arange(number)
        near = front.neighbours[own]
        index = 1 + even[near] - (t - LOOKBACK) * size
        neighbours[t, :number] = torch.where(near == rows * columns, 0, index)
    return EvenWaves(order, neighbours, even[front.places])
