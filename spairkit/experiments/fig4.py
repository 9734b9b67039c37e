"""Fig. 4: the sum of five digits against the number of training images (main text, section 5.2).

SPAIR and AIR are trained on the images without their sums; then a classifier learns the sums from
the objects that they find, with the glimpse encoder fixed or trained on. The others are trained
from scratch: TrueBB on the true boxes, ConnComp on connected components, ConvNet on the cells of
SPAIR's backbone.

At the scale cpu images have three digits. With five, all but TrueBB were still at chance after
2,500 updates; the paper made up to 200,000.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from spairkit.config import SPAIRConfig
from spairkit.experiments.accuracy import Objects, Task, accuracy_with
from spairkit.experiments.experiment import (
    Conclusion,
    Effort,
    Experiment,
    Measure,
    Measured,
    Scale,
    Settings,
    Trial,
    config_of,
    over_seeds,
    trend,
)
from spairkit.experiments.picture import Chart, Line
from spairkit.experiments.published import FIGURE_4
from spairkit.training.classification import ClassifierTraining

_DIGITS = 5  # in an image of the paper
_UNITS = 128
_MEASURES: dict[str, tuple[Objects, ...]] = {
    "spair": ("fixed", "unfixed"),
    "air": ("fixed", "unfixed"),
    "conncomp": ("components", "truebb", "convnet"),
}
"""By the model of the run on which they are measured; the last two only need its images."""
_EFFORTS: dict[Scale, Effort] = {
    "smoke": Effort(
        "quick",
        2,
        1,
        4,
        4,
        numbers=(_DIGITS,),
        train_images=(8, 16),
        classifier=ClassifierTraining(steps=2, validation_every=1, batch_size=2),
        thresholds=3,
        threshold_images=4,
        tiny=True,
    ),
    "cpu": Effort(
        "quick",
        2500,
        1,
        500,
        numbers=(3,),
        train_images=(1000, 32_000),
        classifier=ClassifierTraining(
            steps=5000, validation_every=500, patience=2000, learning_rate=5e-4
        ),
        threshold_images=100,
    ),
    "full": Effort(
        "paper",
        200_000,
        6,
        1000,
        1000,
        numbers=(_DIGITS,),
        train_images=tuple(1000 * 2**k for k in range(8)),
        classifier=ClassifierTraining(),
        threshold_images=1000,
    ),
}
_CHARTS: dict[str, dict[str, tuple[str, str, Objects]]] = {
    "encoders trained on sums": {
        "SPAIR": ("spair-unfixed", "spair", "unfixed"),
        "AIR": ("air-unfixed", "air", "unfixed"),
        "TrueBB": ("truebb", "conncomp", "truebb"),
        "ConnComp": ("conncomp", "conncomp", "components"),
        "ConvNet": ("convnet", "conncomp", "convnet"),
    },
    "encoders fixed": {
        "SPAIR, fixed": ("spair-fixed", "spair", "fixed"),
        "AIR, fixed": ("air-fixed", "air", "fixed"),
    },
}
"""Lines by the end of a chart's title: name in `FIGURE_4`, model of the run, objects.

SPAIR and AIR come first, so that they have the same colours in both charts."""
_ORDER = ("TrueBB", "SPAIR", "ConnComp", "ConvNet", "AIR")
"""As the paper ranks them, from the best."""


def sum_of_digits(labels: Tensor) -> Tensor:  # [B, N] int64, -1 for none -> [B] int64
    """The sum of the digits of each image."""
    return labels.clamp(min=0).sum(1)


def _trials(settings: Settings, folder: Path) -> list[Trial]:
    effort = EXPERIMENT.effort(settings)
    assert effort.classifier is not None
    (digits,) = effort.numbers
    trials = []
    for seed in range(settings.seeds):
        for size in effort.train_images:
            data = {
                **settings.data,
                "image_height": 48,
                "image_width": 48,
                "min_objects": digits,
                "max_objects": digits,
                "train_images": size,
            }
            like = config_of(effort, "spair", seed, data)
            assert isinstance(like.model, SPAIRConfig)
            task = Task(
                like.data,
                sum_of_digits,
                num_classes=9 * digits + 1,
                units=_UNITS,
                training=effort.classifier,
                backbone=like.model,
            )
            for kind, measures in _MEASURES.items():
                given: dict[str, Any] = {"count": "given"} if kind == "air" else {}
                search = {"search": {"mode": "off"}} if kind == "spair" else {}
                config = config_of(effort, kind, seed, data, model=given, **search)
                named: dict[str, Measure] = {
                    objects: accuracy_with(objects, task) for objects in measures
                }
                trials.append(Trial(f"{kind}-{size}-seed-{seed}", config, named))
    return trials


def _conclude(settings: Settings, folder: Path, measured: Mapping[str, Measured]) -> Conclusion:
    effort = EXPERIMENT.effort(settings)
    sizes, (digits,) = effort.train_images, effort.numbers
    charts = [
        Chart(
            f"Accuracy, {digits} digits, {title}",
            "training images",
            [
                Line(
                    name,
                    {n: over_seeds(measured, f"{kind}-{n}", key, "accuracy") for n in sizes},
                    FIGURE_4[published] if digits == _DIGITS else {},
                )
                for name, (published, kind, key) in lines.items()
            ],
            log_x=True,
        )
        for title, lines in _CHARTS.items()
    ]
    last = {line.name: line.ours[sizes[-1]].mean for line in charts[0].lines}
    true, spair, components, convnet, air = (last[name] for name in _ORDER)
    return Conclusion(
        charts,
        [
            trend(
                "TrueBB > SPAIR > ConnComp > ConvNet, AIR",
                true > spair > components > max(convnet, air),
                f"accuracy of {sizes[-1]:,} images: "
                + ", ".join(f"{name} {last[name]:.3f}" for name in _ORDER),
            )
        ],
    )


EXPERIMENT = Experiment(
    "fig4",
    "the sum of digits against the number of training images, by methods of finding digits",
    _EFFORTS,
    _trials,
    _conclude,
)
