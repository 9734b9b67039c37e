"""The wavefront visits every cell once, after its neighbours, and indexes them correctly."""

import pytest
import torch

from spairkit.models.wavefront import LOOKBACK, NEIGHBOURS, even_waves, wavefront


@pytest.mark.parametrize(
    ("rows", "columns", "waves"), [(4, 4, 10), (7, 7, 19), (18, 14, 48), (1, 6, 6), (6, 1, 11)]
)
def test_waves_index_their_neighbours(rows: int, columns: int, waves: int) -> None:
    front = wavefront(rows, columns, torch.device("cpu"))
    assert len(front.waves) == waves
    assert sorted(front.order.tolist()) == list(range(rows * columns))
    assert front.order[front.places].tolist() == list(range(rows * columns))
    done: list[list[tuple[int, int]]] = []
    for wave in front.waves:
        cells = [divmod(k, columns) for k in front.order[wave.start : wave.stop].tolist()]
        pool: list[tuple[int, int] | None] = [None]
        pool += [cell for group in done[-LOOKBACK:] for cell in group]
        for (i, j), near in zip(cells, wave.neighbours.tolist(), strict=True):
            for (di, dj), row in zip(NEIGHBOURS, near, strict=True):
                cell = (i + di, j + dj)
                inside = 0 <= cell[0] < rows and 0 <= cell[1] < columns
                assert pool[row] == (cell if inside else None)
        done.append(cells)


@pytest.mark.parametrize(("rows", "columns"), [(4, 4), (3, 5), (1, 6), (6, 1)])
def test_followers_are_the_inverse_of_neighbours(rows: int, columns: int) -> None:
    front = wavefront(rows, columns, torch.device("cpu"))
    num_cells = rows * columns
    cells = [divmod(k, columns) for k in front.order.tolist()]
    for d, (di, dj) in enumerate(NEIGHBOURS):
        for place, (i, j) in enumerate(cells):
            near, after = int(front.neighbours[place, d]), int(front.followers[place, d])
            for other, cell in ((near, (i + di, j + dj)), (after, (i - di, j - dj))):
                assert (cells[other] == cell) if other < num_cells else (cell not in cells)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (4, 4), (3, 5), (1, 6), (6, 1), (9, 4)])
def test_waves_of_one_size_index_their_neighbours(rows: int, columns: int) -> None:
    even = even_waves(rows, columns)
    waves, size = even.order.shape
    assert even.order.flatten()[even.places].tolist() == list(range(rows * columns))
    window: list[tuple[int, int] | None] = [None] * (LOOKBACK * size)
    seen = set()
    for t in range(waves):
        cells: list[tuple[int, int] | None] = []
        for n, raster in enumerate(even.order[t].tolist()):
            if int(even.places[raster]) != t * size + n:
                cells.append(None)  # filled up
                assert even.neighbours[t, n].tolist() == [0] * 4
                continue
            i, j = divmod(raster, columns)
            for (di, dj), index in zip(NEIGHBOURS, even.neighbours[t, n].tolist(), strict=True):
                inside = 0 <= i + di < rows and 0 <= j + dj < columns
                assert ([None, *window][index]) == ((i + di, j + dj) if inside else None)
            cells.append((i, j))
            seen.add((i, j))
        window = [*window[size:], *cells]
    assert len(seen) == rows * columns
