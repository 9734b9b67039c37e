"""Figures that the SPAIR paper published, read off its plots (docs/model.md 12)."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """A mean and the ends of its 95 % interval, in [0, 1]; all one where none is given."""

    mean: float
    low: float
    high: float


def _shares(rows: Mapping[int, tuple[float, ...]]) -> dict[int, Published]:
    """From percentages: mean, low, high; or the mean alone."""
    return {
        n: Published(*(round(value / 100, 3) for value in (row if len(row) == 3 else row * 3)))
        for n, row in rows.items()
    }


FIGURE_2: dict[str, dict[int, Published]] = {
    "spair": _shares(
        {
            1: (78.9, 76.9, 80.8),
            3: (69.6, 68.9, 70.3),
            5: (67.3, 66.5, 68.1),
            7: (65.9, 65.3, 66.5),
            9: (62.4, 61.6, 63.2),
        }
    ),
    "air": _shares(
        {
            1: (79.0, 78.1, 79.9),
            3: (45.5, 37.3, 53.7),
            5: (13.0, 3.6, 22.3),
            7: (8.1, 4.8, 11.5),
            9: (6.5, 6.2, 6.8),
        }
    ),
    "dair": _shares(
        {
            1: (78.8, 78.0, 79.6),
            3: (20.2, 3.0, 37.4),
            5: (6.0, 3.0, 8.9),
            7: (4.6, 3.1, 6.1),
            9: (5.1, 4.7, 5.4),
        }
    ),
    "conncomp": _shares({1: (98.9,), 3: (69.6,), 5: (50.7,), 7: (42.6,), 9: (36.7,)}),
}
"""Fig. 2 (docs/model.md 12.1): `ap_spair` over the number of digits in every image of
48 x 48 pixels, EMNIST digits of 14. AIR and DAIR are told the number."""
