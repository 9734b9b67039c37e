"""Beyond the paper: shapes of any colour that hide each other, found with exact masks to compare.

Two kinds of scenes of our own (`spairkit.data.shapes`), in the manner of Multi-dSprites and CLEVR,
64 x 64 pixels. SPAIR infers the colour of the ground. It is measured by the masks of what it finds
(ARI-FG), by boxes and by counts. The published figures of others are on those datasets, not on our
scenes, so they are for orientation only.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spairkit.config import DataConfig
from spairkit.data.datasets import data_settings
from spairkit.data.image_files import shapes_source, write_images
from spairkit.data.shapes import KINDS, SIDE, shapes
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
from spairkit.experiments.published import OBJECTS_ARI
from spairkit.experiments.side_by_side import Panel, draw_side_by_side, first_panels
from spairkit.storage.runs import Run

_MEASURES = {"SPAIR, search": "search", "SPAIR, encoder alone": "encoder"}
_FIGURES = {
    "ari": "ARI-FG",
    "ap": "AP",
    "ap50": "AP50",
    "count_accuracy": "count right",
    "count_error": "count error (objects)",
}
_TITLES = {"flat": "1 to 5 flat shapes", "solid": "3 to 10 solid shapes"}
_LEAST_ARI = 0.9  # where the parts are found, if masks are not exact
_TRAIN_SEED, _TEST_SEED = 0, 1
_SHOWN = 2  # scenes of a kind in the picture
_MODEL: dict[str, Any] = {
    "background": "mlp",
    "presence_bias": -3.0,
    "likelihood": "normal",
    "least_noise": 0.2,
    "box_contrast": 0.25,
}
"""A pixel of medium colour costs little by the Bernoulli likelihood, too little to pay for an
object. Objects are rare at first, so that the background is learned before they explain it."""
_TRAIN: dict[str, dict[str, Any]] = {"quick": {"training_wheels": 300}, "paper": {}}
_EFFORTS: dict[Scale, Effort] = {
    "smoke": Effort("quick", 2, 1, 2, 4, train_images=(12,), search="refine", tiny=True),
    "cpu": Effort("quick", 1200, 1, 40, 64, train_images=(2000,)),
    "full": Effort("paper", 200_000, 4, 320, 1000, train_images=(50_000,)),
}


def _folders(folder: Path, kind: str) -> tuple[Path, Path]:
    """Those of training and test scenes."""
    return folder / kind, folder / f"{kind}-test"


def _test_data(folder: Path, kind: str, data: DataConfig) -> DataConfig:
    return replace(data, path=str(_folders(folder, kind)[1].resolve()))


def _true_masks(kind: str, number: int) -> Tensor:  # [64, 64] int32
    return torch.from_numpy(shapes(kind, _TEST_SEED, number).masks)


def _trials(settings: Settings, folder: Path) -> list[Trial]:
    effort = EXPERIMENT.effort(settings)
    trials = []
    for kind in KINDS:
        train, test = _folders(folder, kind)
        for place, seed, number in (
            (train, _TRAIN_SEED, effort.train_images[0]),
            (test, _TEST_SEED, effort.test_images),
        ):
            if not place.exists():
                write_images(shapes_source(kind, seed, number), place)
        data = data_settings(str(train))["data"] | {"image_height": SIDE, "image_width": SIDE}
        for seed in range(settings.seeds):
            config = config_of(
                effort, "spair", seed, data, model=_MODEL, train=_TRAIN[effort.preset]
            )
            images, masks = _test_data(folder, kind, config.data), partial(_true_masks, kind)
            measures = {
                "search": figures_on(images, true_masks=masks),
                "encoder": figures_on(images, search="off", true_masks=masks),
            }
            trials.append(Trial(f"{kind}-seed-{seed}", config, measures))
    return trials


def _conclude(settings: Settings, folder: Path, measured: Mapping[str, Measured]) -> Conclusion:
    charts = [
        Chart(
            _TITLES[kind],
            "figure",
            [
                Line(
                    title,
                    {
                        name: over_seeds(measured, kind, measure, key)
                        for key, name in _FIGURES.items()
                    },
                )
                for title, measure in _MEASURES.items()
            ],
        )
        for kind in KINDS
    ]
    trends = []
    for kind, chart in zip(KINDS, charts, strict=True):
        ours = chart.lines[0].ours["ARI-FG"].mean
        trends.append(
            trend(
                f"{chart.title}: parts are found, ARI-FG of {_LEAST_ARI} or more",
                ours >= _LEAST_ARI,
                f"{ours:.3f}",
            )
        )
        trends += [
            f"published, not the same scenes: ARI-FG {mean:.3f} ± {std:.3f} by {method}"
            for method, (mean, std) in OBJECTS_ARI[kind].items()
        ]
    return Conclusion(charts, trends, partial(_draw, folder))


def _draw(folder: Path, note: str) -> bytes:
    """Test scenes with the boxes that the runs of the first seed find."""
    panels: list[Panel] = []
    for kind in KINDS:
        run = folder / "runs" / f"{kind}-seed-0"
        detectors = {
            title: load(run, "cpu", search="off" if measure == "encoder" else None)
            for title, measure in _MEASURES.items()
        }
        data = _test_data(folder, kind, Run.open(run).config.data)
        panels += [
            replace(panel, name=f"{kind} {panel.name}")
            for panel in first_panels(data, detectors, _SHOWN)
        ]
    return draw_side_by_side(panels, SIDE, note)


EXPERIMENT = Experiment(
    "objects",
    "scenes of coloured shapes that hide each other: masks, boxes and counts of SPAIR",
    _EFFORTS,
    _trials,
    _conclude,
    takes_digits=False,
)
