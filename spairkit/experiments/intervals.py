"""Means over seeds, and how sure they are."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scipy import stats


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % t-interval, which reaches `half_width` to both sides."""

    mean: float
    half_width: float | None
    """None where a single value says nothing about it."""
    values: tuple[float, ...]

    @property
    def low(self) -> float:
        """The lower end; the mean where there is no interval."""
        return self.mean - (self.half_width or 0.0)

    @property
    def high(self) -> float:
        """The upper end, likewise."""
        return self.mean + (self.half_width or 0.0)

    def to_json(self) -> dict[str, Any]:
        """Plain values under the names of the fields."""
        return {"mean": self.mean, "half_width": self.half_width, "values": list(self.values)}


def t_interval(values: Sequence[float]) -> Interval:
    """The mean of independent values and its 95 % interval by Student's t.

    Raises:
        ValueError: there is no value.
    """
    num = len(values)
    if num == 0:
        raise ValueError("values must hold at least one, got none")
    mean = math.fsum(values) / num
    if num == 1:
        return Interval(mean, None, tuple(values))
    variance = math.fsum((value - mean) ** 2 for value in values) / (num - 1)
    half_width = float(stats.t.ppf(0.975, num - 1)) * math.sqrt(variance / num)
    return Interval(mean, half_width, tuple(values))
