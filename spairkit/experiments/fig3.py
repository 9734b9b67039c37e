"""Fig. 3: transfer to larger and more crowded images (main text, section 5.2).

SPAIR is trained on crops of 48 x 48 pixels of scenes of 84 x 84 with 1 to 5, 6 to 10 or 11 to 15
digits, and tested on whole scenes with exactly n digits. ConnComp has a threshold for each n and
figure. The paper measures the boxes of z_where and the counts of the encoder; ours beside them have
the search, and boxes round masks.

The authors trained on 100,000 crops; ours are new in every update.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from spairkit.config import DataConfig
from spairkit.experiments.experiment import (
    MASK_CONTRAST,
    Conclusion,
    Effort,
    Experiment,
    Measure,
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
from spairkit.experiments.published import FIGURE_3, Published
from spairkit.metrics import NAMES

FIGURES = {
    "ap_spair": NAMES["ap_spair"],
    "count_error": "count error (objects)",
    "count_wrong": "count wrong (share)",
}
"""What Figs. 3 and 7 show, and its name."""

_SIDE, _CROP = 84, 48
_RANGES = {"1-5": (1, 5), "6-10": (6, 10), "11-15": (11, 15)}
_CRITERIA = {"ap_spair": "ap", "count_error": "count_error", "count_wrong": "count_accuracy"}
_COMPARED = (5, 10, 20)  # digits at which counts are compared with the paper's
_KEPT = 0.75  # share of the AP at the end of training counts that is left, if it falls gracefully
_EFFORTS: dict[Scale, Effort] = {
    "smoke": Effort(
        "quick", 2, 1, 2, 4, (5, 20), thresholds=3, threshold_images=2, search="refine", tiny=True
    ),
    "cpu": Effort(
        "quick",
        2500,
        1,
        150,
        64,
        (1, 5, 10, 15, 20),
        thresholds=50,
        threshold_images=100,
        searched_images=20,
    ),
    "full": Effort("paper", 200_000, 8, 1000, 1000, tuple(range(1, 21)), threshold_images=1000),
}


def crops(data: Mapping[str, Any], least: int, most: int) -> dict[str, Any]:
    """Values of `DataConfig` for crops of scenes with `least` to `most` digits."""
    return {
        **data,
        "image_height": _CROP,
        "image_width": _CROP,
        "scene_height": _SIDE,
        "scene_width": _SIDE,
        "min_objects": least,
        "max_objects": most,
    }


def whole(data: DataConfig, number: int) -> DataConfig:
    """Whole scenes with exactly so many digits, like those that crops were taken from."""
    return replace(
        data,
        image_height=_SIDE,
        image_width=_SIDE,
        scene_height=0,
        scene_width=0,
        min_objects=number,
        max_objects=number,
    )


def as_in_the_paper(data: DataConfig, numbers: Sequence[int]) -> dict[str, Measure]:
    """A measure `paper-N` for each number: boxes of z_where, without a search."""
    return {
        f"paper-{n}": figures_on(whole(data, n), search="off", box_contrast=0.0) for n in numbers
    }


def _trials(settings: Settings, folder: Path) -> list[Trial]:
    effort = EXPERIMENT.effort(settings)
    searched = effort.searched_images or effort.test_images
    trials = []
    for seed in range(settings.seeds):
        for name, (least, most) in _RANGES.items():
            config = config_of(effort, "spair", seed, crops(settings.data, least, most))
            measures = as_in_the_paper(config.data, effort.numbers) | {
                f"ours-{n}": figures_on(
                    replace(whole(config.data, n), test_images=searched),
                    box_contrast=MASK_CONTRAST,
                )
                for n in effort.numbers
            }
            trials.append(Trial(f"{name}-seed-{seed}", config, measures))
    scenes = trials[0].config.data
    for number in effort.numbers:
        data = vars(whole(scenes, number))
        for figure, criterion in _CRITERIA.items():
            config = config_of(effort, "conncomp", 0, data, model={"criterion": criterion})
            measures = {"test": figures_on(config.data)}
            trials.append(Trial(f"conncomp-{number}-{figure}-seed-0", config, measures))
    return trials


def _conclude(settings: Settings, folder: Path, measured: Mapping[str, Measured]) -> Conclusion:
    effort = EXPERIMENT.effort(settings)
    numbers, searched = effort.numbers, effort.searched_images or effort.test_images

    def conncomp(figure: str) -> Line:
        ours = {n: over_seeds(measured, f"conncomp-{n}-{figure}", "test", figure) for n in numbers}
        return Line("ConnComp", ours, FIGURE_3[figure]["conncomp"])

    def spair(name: str, measure: str, figure: str) -> Line:
        ours = {n: over_seeds(measured, name, f"{measure}-{n}", figure) for n in numbers}
        return Line(f"SPAIR {name}", ours, FIGURE_3[figure][name])

    charts = {
        (measure, figure): Chart(
            f"{title}, {kind}",
            "digits per scene",
            [*(spair(name, measure, figure) for name in _RANGES), conncomp(figure)],
            is_share=figure != "count_error",
        )
        for measure, kind in (
            ("paper", "as in the paper"),
            ("ours", f"search, {searched:,} scenes"),
        )
        for figure, title in FIGURES.items()
    }
    ap = {line.name.removeprefix("SPAIR "): line.ours for line in charts["paper", "ap_spair"].lines}
    trends = [_is_graceful(name, ap[name], most) for name, (_, most) in _RANGES.items()]
    last = numbers[-1]
    trends.append(
        trend(
            f"with {last} digits, training on 1 to 5 is worst",
            ap["1-5"][last].mean < min(ap["6-10"][last].mean, ap["11-15"][last].mean),
            ", ".join(f"AP paper {name} {ap[name][last].mean:.3f}" for name in _RANGES),
        )
    )
    for number in sorted(set(_COMPARED) & set(numbers)):
        paper = FIGURE_3["count_wrong"]["11-15"][number].mean
        off, search = (
            spair("11-15", measure, "count_wrong").ours[number].mean
            for measure in ("paper", "ours")
        )
        trends.append(
            trend(
                f"with {number} digits, counts are wrong no more often than in the paper",
                off <= paper,
                f"trained on 11 to 15: {off:.3f}, with search {search:.3f}, paper {paper:.3f}",
            )
        )
    return Conclusion(list(charts.values()), trends)


def _is_graceful(name: str, ap: Mapping[int, Published], most: int) -> str:
    """Whether AP falls little beyond the counts of training."""
    inside, last = max((n for n in ap if n <= most), default=min(ap)), max(ap)
    before, after = ap[inside].mean, ap[last].mean
    paper = FIGURE_3["ap_spair"][name]
    return trend(
        f"trained on {name}, {last} digits keep {_KEPT:.0%} of the AP of {inside}",
        after >= _KEPT * before,
        f"AP paper {before:.3f} and {after:.3f}; the paper's "
        f"{paper[inside].mean:.3f} and {paper[last].mean:.3f}",
    )


EXPERIMENT = Experiment(
    "fig3",
    "transfer: SPAIR trained on crops, tested on whole scenes with 1 to 20 digits",
    _EFFORTS,
    _trials,
    _conclude,
)
