"""Means over seeds and their confidence intervals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy import stats

from spairkit.experiments.published import Published


@dataclass(frozen=True)
class Interval(Published):
    """A mean over seeds and its 95 % confidence interval; all equal for a single seed."""

    values: tuple[float, ...]

    def __str__(self) -> str:
        half_width = f" ± {self.high - self.mean:.3f}" if len(self.values) > 1 else ""
        return f"{self.mean:.3f}{half_width}"


def t_interval(values: Sequence[float]) -> Interval:
    """The mean of at least one independent value and its 95 % interval by Student's t."""
    mean, degrees = fmean(values), len(values) - 1
    error = stdev(values) / math.sqrt(len(values)) if degrees else 0.0
    half_width = float(stats.t.ppf(0.975, degrees)) * error if degrees else 0.0
    return Interval(mean, mean - half_width, mean + half_width, tuple(values))
