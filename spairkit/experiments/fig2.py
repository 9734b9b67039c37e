"""Fig. 2: average precision against the number of digits in an image (main text, section 5.1).

One model is trained for each of 1, 3, 5, 7 and 9 digits in 48 x 48 pixels. AIR and DAIR are given
the number; SPAIR infers it; ConnComp has a threshold for each. The paper measures the boxes of
z_where; ours beside them have the search and are drawn round masks.

The authors trained on 64,000 images; ours are new in every update.
"""

from collections.abc import Mapping
from pathlib import Path

from spairkit.config import SearchMode
from spairkit.experiments.experiment import (
    MASK_CONTRAST,
    Conclusion,
    Effort,
    Experiment,
    Measured,
    Scale,
    Settings,
    Trial,
    config_of,
    figures_on,
    over_seeds,
    trend,
)
from spairkit.experiments.picture import Chart, Line
from spairkit.experiments.published import FIGURE_2, Published
from spairkit.experiments.settings import MODELS
from spairkit.metrics import NAMES

_NUMBERS = (1, 3, 5, 7, 9)
_KINDS = "spair", "air", "dair", "conncomp"
_OFF: dict[str, SearchMode | None] = {"spair": "off", "air": None, "dair": None, "conncomp": None}
_EFFORTS: dict[Scale, Effort] = {
    "smoke": Effort(
        "quick", 2, 1, 4, 4, (1, 3), thresholds=3, threshold_images=4, search="refine", tiny=True
    ),
    "cpu": Effort("quick", 1500, 1, 150, 64, (1, 5, 9), thresholds=50),
    "full": Effort("paper", 200_000, 6, 1000, 1000, _NUMBERS, threshold_images=1000),
}


def _trials(settings: Settings, folder: Path) -> list[Trial]:
    effort = EXPERIMENT.effort(settings)
    trials = []
    for seed in range(settings.seeds):
        for number in effort.numbers:
            data = {
                **settings.data,
                "image_height": 48,
                "image_width": 48,
                "min_objects": number,
                "max_objects": number,
            }
            for kind in _KINDS:
                given = {"count": "given"} if kind in ("air", "dair") else {}
                config = config_of(effort, kind, seed, data, model=given)
                raw = None if kind == "conncomp" else 0.0
                measures = {"paper": figures_on(config.data, box_contrast=raw, search=_OFF[kind])}
                if kind == "spair":
                    measures["ours"] = figures_on(config.data, box_contrast=MASK_CONTRAST)
                trials.append(Trial(f"{kind}-{number}-seed-{seed}", config, measures))
    return trials


def _conclude(settings: Settings, folder: Path, measured: Mapping[str, Measured]) -> Conclusion:
    numbers = EXPERIMENT.effort(settings).numbers

    def line(name: str, kind: str, measure: str, figure: str) -> Line:
        ours = {n: over_seeds(measured, f"{kind}-{n}", measure, figure) for n in numbers}
        has_paper = measure == "paper" and figure == "ap_spair"
        return Line(name, ours, FIGURE_2[kind] if has_paper else {})

    charts = [
        Chart(
            NAMES[figure],
            "digits per image",
            [
                *(line(MODELS[kind], kind, "paper", figure) for kind in _KINDS),
                line("SPAIR, masks and search", "spair", "ours", figure),
            ],
        )
        for figure in ("ap_spair", "ap")
    ]
    spair, air, dair, conncomp, _ = (item.ours for item in charts[0].lines)
    few, many = numbers[0], numbers[-1]
    return Conclusion(
        charts,
        [
            trend(
                f"with {many} digits SPAIR is better than AIR, DAIR and ConnComp",
                spair[many].mean > max(item[many].mean for item in (air, dair, conncomp)),
                _at(many, SPAIR=spair, AIR=air, DAIR=dair, ConnComp=conncomp),
            ),
            trend(
                f"from {few} to {many} digits SPAIR loses least",
                all(
                    spair[few].mean - spair[many].mean < item[few].mean - item[many].mean
                    for item in (air, dair, conncomp)
                ),
                _at(few, SPAIR=spair, AIR=air, DAIR=dair, ConnComp=conncomp),
            ),
        ],
    )


def _at(number: int, **lines: Mapping[int, Published]) -> str:
    values = ", ".join(f"{name} {line[number].mean:.3f}" for name, line in lines.items())
    return f"AP paper of {number}: {values}"


EXPERIMENT = Experiment(
    "fig2",
    "AP against the number of digits, one model for each: SPAIR, AIR, DAIR and ConnComp",
    _EFFORTS,
    _trials,
    _conclude,
)
