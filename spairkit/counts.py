"""`CountPosterior`: the number of objects in an image, as a distribution."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_NEGLIGIBLE = 1e-6  # probability below which an object is left out
_TAIL = 1e-12  # mass of a tail that is cut off, and doubt below which an object is certain
_OBJECTS_BETWEEN_CUTS = 64
_ENDS = 4.0  # standard deviations
_QUANTILES = 10_000


@dataclass(frozen=True, eq=False)
class CountPosterior:
    """p(C | image), the posterior of the number of objects C in one image.

    Its text is the mean and the 90 % interval, as in `7.2 expected, 7 to 8 at 90 %`.

    Raises:
        ValueError: `least` is negative, or `probabilities` is no distribution in float64.

    Example:
        >>> counts = CountPosterior.independent(torch.tensor([1.0, 1.0, 0.5]))
        >>> counts.mean, counts.probability(3), str(counts)
        (2.5, 0.5, '2.5 expected, 2 to 3 at 90 %')
    """

    least: int
    """The smallest count with a probability here."""
    probabilities: Tensor
    """[m] float64 on the CPU, p(C = least + i), with sum 1."""
    is_shared: bool = False
    """Whether the doubt is about the model, and so about all images alike: `total` then assumes
    that all counts are too low, or too high, together."""

    def __post_init__(self) -> None:
        p = self.probabilities
        if self.least < 0:
            raise ValueError(f"least must be at least 0, got {self.least}")
        if p.dim() != 1 or p.dtype != torch.float64:
            raise ValueError(f"probabilities must be [m] float64, got {list(p.shape)} {p.dtype}")
        if not (bool((p >= 0).all()) and abs(float(p.sum()) - 1) < 1e-6):
            raise ValueError(f"probabilities must be from 0 and sum to 1, got {float(p.sum())}")

    def __str__(self) -> str:
        """The mean and the 90 % interval."""
        low, high = self.interval()
        return f"{self.mean:.1f} expected, {low} to {high} at 90 %"

    @classmethod
    def independent(
        cls,
        probabilities: Tensor,  # [n] in [0, 1]
    ) -> "CountPosterior":
        """The number of objects that exist, if each exists independently with its probability.

        This is the Poisson-binomial distribution, by convolution in float64. Probabilities below
        1e-6 are left out, those above 1 - 1e-12 are certain, and tails of mass below 1e-12 are cut
        off.

        Args:
            probabilities: one for each object.

        Raises:
            ValueError: `probabilities` has another shape, or values outside [0, 1].
        """
        values = _checked(probabilities)
        certain = values > 1 - _TAIL
        least, masses = int(certain.sum()), np.ones(1)
        uncertain = values[~certain & (values >= _NEGLIGIBLE)]
        for start in range(0, len(uncertain), _OBJECTS_BETWEEN_CUTS):
            for p in uncertain[start : start + _OBJECTS_BETWEEN_CUTS].tolist():
                masses = np.convolve(masses, (1 - p, p))
            below = int(np.searchsorted(np.cumsum(masses), _TAIL))
            above = int(np.searchsorted(np.cumsum(masses[::-1]), _TAIL))
            masses = masses[below : len(masses) - above]
            least += below
        return cls(least, torch.from_numpy(masses / masses.sum()))

    @classmethod
    def spread(cls, mean: float, deviation: float) -> "CountPosterior":
        """A count whose doubt `is_shared`: a normal distribution over the counts from 0.

        Args:
            mean: of the normal distribution, from 0.
            deviation: its standard deviation, above 0; it ends at four of them.
        """
        least = max(math.ceil(mean - _ENDS * deviation), 0)
        counts = np.arange(least, max(math.floor(mean + _ENDS * deviation), least) + 1)
        masses = np.exp(-(((counts - mean) / deviation) ** 2) / 2)
        return cls(least, torch.from_numpy(masses / masses.sum()), is_shared=True)

    @classmethod
    def total(cls, counts: Sequence["CountPosterior"]) -> "CountPosterior":
        """The number of objects in several images: independent ones, unless a doubt is shared."""
        if len(counts) == 1:
            return counts[0]
        if any(item.is_shared for item in counts):
            return _summed_together(counts)
        least, masses = 0, np.ones(1)
        for item in counts:
            least += item.least
            masses = np.convolve(masses, item.probabilities.numpy())
        return cls(least, torch.from_numpy(masses / masses.sum()))

    @property
    def mean(self) -> float:
        """The expected count."""
        counts = torch.arange(len(self.probabilities), dtype=torch.float64)
        return self.least + float(self.probabilities @ counts)

    def interval(self, share: float = 0.9) -> tuple[int, int]:
        """The shortest interval of counts that holds `share` or more, both ends included.

        Of several, the one that holds the most, and of these the lowest.

        Raises:
            ValueError: `share` is outside (0, 1).
        """
        if not 0 < share < 1:
            raise ValueError(f"share must lie in (0, 1), got {share}")
        below = np.concatenate([[0.0], np.cumsum(self.probabilities.numpy())])
        for length in range(1, len(below)):
            held = below[length:] - below[:-length]
            low = int(held.argmax())
            if held[low] >= share - _TAIL:  # for sums that round down
                break
        return self.least + low, self.least + low + length - 1

    def probability(self, count: int) -> float:
        """p(C = count), 0 outside the counts that are held."""
        index = count - self.least
        return float(self.probabilities[index]) if 0 <= index < len(self.probabilities) else 0.0

    def to_json(self) -> dict[str, Any]:
        """`count_mean`, and `count_interval` as a list of the two ends at 90 %."""
        return {"count_mean": self.mean, "count_interval": list(self.interval())}


def _summed_together(counts: Sequence[CountPosterior]) -> CountPosterior:
    """The sum of counts that are all at the same quantile of their distributions."""
    quantiles = (np.arange(_QUANTILES) + 0.5) / _QUANTILES
    sums = np.zeros(_QUANTILES, np.int64)
    for item in counts:
        sums += item.least + np.searchsorted(np.cumsum(item.probabilities.numpy()), quantiles)
    masses = np.bincount(sums - sums[0]) / _QUANTILES
    return CountPosterior(int(sums[0]), torch.from_numpy(masses), is_shared=True)


def _checked(probabilities: Tensor) -> npt.NDArray[np.float64]:  # [n]
    values: npt.NDArray[np.float64] = probabilities.detach().cpu().double().numpy()
    if values.ndim != 1:
        raise ValueError(f"probabilities must be [n], got {list(values.shape)}")
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError("probabilities must lie in [0, 1]")
    return values
