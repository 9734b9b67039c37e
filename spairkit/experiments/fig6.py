"""Fig. 6: Space Invaders (main text, section 5.4).

Frames of games played at random, 173 x 160 pixels; the test frames are of other games. SPAIR is
trained on random crops of 48 x 48 pixels and finds the sprites of whole frames, in two ways: as
`spairkit train --data` does, with what a look at the frames measures, and as in the paper, in the
frames' own colours with a background of one colour. The search of the first way starts from a
watershed, so its encoder is also measured alone, and the watershed, which needs no training, stands
beside them. The paper shows pictures only; here the game's memory gives the true boxes.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from spairkit.config import SPAIRConfig
from spairkit.data.datasets import data_settings
from spairkit.data.image_files import invaders_source, write_images
from spairkit.detector import load
from spairkit.experiments.experiment import (
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
from spairkit.experiments.side_by_side import draw_side_by_side, first_panels
from spairkit.images import list_images
from spairkit.storage.runs import Run
from spairkit.survey import look

_LINES = {
    "SPAIR, measured frames": ("measured", "test"),
    "the same, no search": ("measured", "encoder"),
    "SPAIR, as in the paper": ("colours", "test"),
    "Watershed": ("watershed", "test"),
}
"""Method and measure of each line."""

_FIGURES = {
    "ap": "AP",
    "ap50": "AP50",
    "ap_spair": "AP paper",
    "count_error": "count error (objects)",
    "count_bias": "count bias (objects)",
}
_FRAMES: dict[Scale, int] = {"smoke": 8, "cpu": 100, "full": 1000}
_TRAIN, _TEST = "frames", "test"  # folders; a seed each
_SHOWN = 3  # frames in the picture
_COLOURS: dict[str, Any] = {
    "background": "mode",
    "box_contrast": 0.0,
    "beta": 1.0,
    "pointwise_kernel": 2,
    "odds_decay": 3000.0,
    "odds_end": 0.1,
}
"""The paper's settings, except that its background colour is learned in a stage before."""

_EFFORTS: dict[Scale, Effort] = {
    "smoke": Effort("quick", 2, 1, 2, 4, tiny=True),
    "cpu": Effort("quick", 2500, 2, 20, 128),
    "full": Effort("paper", 200_000, 6, 100, 1000),
}


def _trials(settings: Settings, folder: Path) -> list[Trial]:
    effort = EXPERIMENT.effort(settings)
    numbers = {_TRAIN: _FRAMES[settings.scale], _TEST: effort.test_images}
    for seed, (name, number) in enumerate(numbers.items()):
        if not (folder / name).exists():
            write_images(invaders_source(seed, number), folder / name)
    data = data_settings(str(folder / _TRAIN))["data"]
    measured = look(list_images(folder / _TRAIN)).settings(SPAIRConfig(), {})
    measured.pop("train")  # another start would change the config of a trial
    prepared = data | measured.pop("data", {})
    trials = []
    for seed in range(settings.seeds):
        configs = {
            "measured": config_of(effort, "spair", seed, prepared, **measured),
            "colours": config_of(
                effort, "spair", seed, data, model=_COLOURS, search={"mode": "off"}
            ),
        }
        if not seed:
            prepare = measured["prepare"]
            configs["watershed"] = config_of(effort, "watershed", seed, data, prepare=prepare)
        for name, config in configs.items():
            test = replace(config.data, path=str((folder / _TEST).resolve()))
            measures = {"test": figures_on(test)}
            if name == "measured":
                measures["encoder"] = figures_on(test, search="off")
            trials.append(Trial(f"{name}-seed-{seed}", config, measures))
    return trials


def _conclude(settings: Settings, folder: Path, measured: Mapping[str, Measured]) -> Conclusion:
    lines = [
        Line(
            title,
            {name: over_seeds(measured, method, measure, key) for key, name in _FIGURES.items()},
        )
        for title, (method, measure) in _LINES.items()
    ]
    ap = [line.ours["AP"].mean for line in lines]
    trends = [
        trend(
            "SPAIR finds the sprites better than a watershed",
            max(ap[:-1]) > ap[-1],
            "AP " + ", ".join(f"{value:.3f}" for value in ap),
        ),
        "the paper has pictures of this experiment, and no figures",
    ]
    return Conclusion([Chart("Space Invaders", "figure", lines)], trends, partial(_draw, folder))


def _draw(folder: Path, note: str) -> bytes:
    """Test frames with the boxes that the runs of the first seed find."""
    runs = {title: folder / "runs" / f"{method}-seed-0" for title, (method, _) in _LINES.items()}
    detectors = {
        title: load(run, "cpu", search="off" if _LINES[title][1] == "encoder" else None)
        for title, run in runs.items()
    }
    data = Run.open(next(iter(runs.values()))).config.data
    test = replace(data, path=str((folder / _TEST).resolve()))
    panels = first_panels(test, detectors, _SHOWN)
    return draw_side_by_side(panels, max(panels[0].image.shape[1:]), note)


EXPERIMENT = Experiment(
    "fig6",
    "Space Invaders: SPAIR trained on crops of frames, tested on whole frames (extra atari)",
    _EFFORTS,
    _trials,
    _conclude,
    takes_digits=False,
)
