"""Results of the SPAIR paper, read off its plots (docs/model.md 12)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """A mean and its 95 % confidence interval, in [0, 1]; all equal if none was published."""

    mean: float
    low: float
    high: float


_CONNCOMP = {1: 0.989, 3: 0.696, 5: 0.507, 7: 0.426, 9: 0.367}

FIGURE_2: dict[str, dict[int, Published]] = {
    "spair": {
        1: Published(0.789, 0.769, 0.808),
        3: Published(0.696, 0.689, 0.703),
        5: Published(0.673, 0.665, 0.681),
        7: Published(0.659, 0.653, 0.665),
        9: Published(0.624, 0.616, 0.632),
    },
    "air": {
        1: Published(0.790, 0.781, 0.799),
        3: Published(0.455, 0.373, 0.537),
        5: Published(0.130, 0.036, 0.223),
        7: Published(0.081, 0.048, 0.115),
        9: Published(0.065, 0.062, 0.068),
    },
    "dair": {
        1: Published(0.788, 0.780, 0.796),
        3: Published(0.202, 0.030, 0.374),
        5: Published(0.060, 0.030, 0.089),
        7: Published(0.046, 0.031, 0.061),
        9: Published(0.051, 0.047, 0.054),
    },
    "conncomp": {objects: Published(mean, mean, mean) for objects, mean in _CONNCOMP.items()},
}
"""Fig. 2 (docs/model.md 12.1): `ap_spair` by model and number of digits per image.

Images are 48 x 48 pixels with EMNIST digits of 14 pixels; AIR and DAIR are given the true count."""
