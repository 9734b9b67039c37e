"""From energies to probabilities, calibrated on images whose objects are known."""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated

import numpy as np
import numpy.typing as npt
import torch
from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass
from scipy.optimize import minimize
from torch import Tensor

from spairkit.counts import CountPosterior
from spairkit.errors import InputError

Array = npt.NDArray[np.float64]

_LEAST_ENERGY = 0.1  # nats; less counts as this
_TEMPERATURES = np.geomspace(0.5, 200.0, 60)
_LEAST_SLOPE = 0.1
_RIDGE = 1e-2  # keeps the slope finite where all objects are real


@dataclass(config=ConfigDict(extra="forbid", strict=True, allow_inf_nan=False), frozen=True)
class Calibration:
    """How energies become probabilities. The defaults are close to those of the packaged model."""

    midpoint: Annotated[float, Field(gt=0, le=1e9)] = 3.0
    """An object that saves this energy, nats, is as likely real as not."""
    slope: Annotated[float, Field(gt=0, le=1e3)] = 1.5
    """Log-odds that a factor of e in energy adds."""
    temperature: Annotated[float, Field(gt=0, le=1e9)] = 2.0
    """A rejected object counts with odds exp(-energy / temperature); nats."""

    def score(self, saved: Tensor) -> Tensor:
        """The probability that objects are real, from the energies that they save, nats."""
        logs = saved.clamp(_LEAST_ENERGY, 1e9).log() - math.log(self.midpoint)
        return torch.sigmoid(self.slope * logs)

    def missed(self, costs: Tensor) -> Tensor:
        """The probability that rejected objects are real, from the energies they cost, nats."""
        return torch.sigmoid(-costs.clamp(min=0) / self.temperature)


def calibration_of(values: Mapping[str, float], source: str) -> Calibration:
    """The calibration in a checkpoint.

    Raises:
        InputError: a value is missing, unknown or out of range; `source` names the file.
    """
    try:
        return Calibration(**values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{source}: calibration.{place}: {first['msg']}") from None


def fit_scores(saved: Array, real: npt.NDArray[np.bool_]) -> tuple[float, float]:
    """Midpoint and slope by logistic regression on the log of the energy.

    Args:
        saved: [n] nats, at least one.
        real: [n] whether the object has a true one.
    """
    logs = np.log(np.clip(saved, _LEAST_ENERGY, 1e9))

    def loss(weights: Array) -> float:  # of slope and intercept
        logits = weights[0] * logs + weights[1]
        nats: float = (np.logaddexp(0, logits) - real * logits).sum()
        return nats + _RIDGE / 2 * float(weights @ weights)

    start = np.array([1.0, -math.log(Calibration().midpoint)])
    bounds = [(_LEAST_SLOPE, None), (None, None)]
    slope, intercept = minimize(loss, start, method="L-BFGS-B", bounds=bounds).x.tolist()
    return math.exp(min(max(-intercept / slope, -2.0), 12.0)), slope


def fit_temperature(
    likelihood: Sequence[tuple[Tensor, Tensor, int]], calibration: Calibration
) -> float:
    """The temperature of the greatest likelihood of the true counts.

    Args:
        likelihood: of each image the energies that its objects save, those that rejected objects
            cost, and the true count.
    """
    best, found = -math.inf, calibration.temperature
    for temperature in _TEMPERATURES.tolist():
        trial = Calibration(calibration.midpoint, calibration.slope, temperature)
        total = 0.0
        for saved, costs, count in likelihood:
            chances = torch.cat([trial.score(saved), trial.missed(costs)])
            total += math.log(CountPosterior.independent(chances).probability(count) + 1e-6)
        if total > best:
            best, found = total, temperature
    return found
