"""Fig. 7: with and without lateral context (supplement).

As Fig. 3, trained on 11 to 15 digits. Both networks have kernels of 2 x 2 in the last three layers
of the backbone, so that a cell sees some of its neighbours' pixels in any case. The paper has other
schedules of the count prior for each, which the full scale takes over, and a learned background.

Everything is measured as in the paper, without a search, which would count for the encoder.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spairkit.experiments.experiment import (
    Conclusion,
    Effort,
    Experiment,
    Measured,
    Scale,
    Settings,
    Trial,
    config_of,
    over_seeds,
    trend,
)
from spairkit.experiments.fig3 import FIGURES, as_in_the_paper, crops
from spairkit.experiments.picture import Chart, Line
from spairkit.experiments.published import FIGURE_7

_NAMES = {"lateral": "with lateral context", "no-lateral": "without"}
_PAPER: dict[str, dict[str, Any]] = {
    "lateral": {"odds_decay": 3000.0, "odds_end": 0.0125, "background": "solid"},
    "no-lateral": {"odds_decay": 4000.0, "odds_end": 0.05, "background": "solid"},
}
_EFFORTS: dict[Scale, Effort] = {
    "smoke": Effort("quick", 2, 1, 2, 4, (5, 20), search="off", tiny=True),
    "cpu": Effort("quick", 2500, 2, 200, 64, (1, 3, 5, 8, 10, 13, 15, 18, 20), search="off"),
    "full": Effort("paper", 200_000, 4, 1000, 1000, tuple(range(1, 21)), search="off"),
}


def _trials(settings: Settings, folder: Path) -> list[Trial]:
    effort = EXPERIMENT.effort(settings)
    trials = []
    for seed in range(settings.seeds):
        for name in _NAMES:
            model = {"lateral": name == "lateral", "pointwise_kernel": 2}
            if settings.scale == "full":
                model |= _PAPER[name]
            config = config_of(effort, "spair", seed, crops(settings.data, 11, 15), model=model)
            measures = as_in_the_paper(config.data, effort.numbers)
            trials.append(Trial(f"{name}-seed-{seed}", config, measures))
    return trials


def _conclude(settings: Settings, folder: Path, measured: Mapping[str, Measured]) -> Conclusion:
    numbers = EXPERIMENT.effort(settings).numbers

    def line(name: str, figure: str) -> Line:
        ours = {n: over_seeds(measured, name, f"paper-{n}", figure) for n in numbers}
        return Line(_NAMES[name], ours, FIGURE_7[figure][name])

    charts = [
        Chart(
            title,
            "digits per scene",
            [line(name, figure) for name in _NAMES],
            is_share=figure != "count_error",
        )
        for figure, title in FIGURES.items()
    ]
    trends = []
    for chart, better in zip(charts, ("higher", "lower", "lower"), strict=True):
        own, other = (item.ours for item in chart.lines)
        sign = 1 if better == "higher" else -1
        number = sum(sign * (own[n].mean - other[n].mean) > 0 for n in numbers)
        trends.append(
            trend(
                f"{chart.title} is {better} with lateral context, at every number of digits",
                number == len(numbers),
                f"at {number} of {len(numbers)}; with {numbers[-1]} digits "
                f"{own[numbers[-1]].mean:.3f} and {other[numbers[-1]].mean:.3f}",
            )
        )
    return Conclusion(charts, trends)


EXPERIMENT = Experiment(
    "fig7",
    "SPAIR with and without lateral context, trained and tested as in fig3",
    _EFFORTS,
    _trials,
    _conclude,
)
