"""Table 1: whether seven cards of the game SET hold a set (main text, section 5.3).

SPAIR is trained without labels and infers the colour of the background; then a classifier learns
from the cards that it finds. TrueBB, on the true boxes, and ConvNet, on the cells of SPAIR's
backbone, are trained from scratch.

At the scale cpu images have three cards. With seven, a classifier on the true boxes was still at
chance after 8,000 updates; the paper made up to 200,000, for 58 %.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from spairkit.config import SPAIRConfig
from spairkit.data.cards import has_set
from spairkit.data.datasets import CARDS
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
from spairkit.experiments.picture import Chart, Line, draw_methods
from spairkit.experiments.published import TABLE_1, Published
from spairkit.training.classification import ClassifierTraining

_UNITS = 256
_CARDS = 7  # in an image of the paper
_CHANCE = 0.5
_METHODS: dict[str, tuple[Objects, str | None]] = {
    "SPAIR": ("unfixed", "spair"),
    "SPAIR, fixed": ("fixed", None),
    "ConvNet": ("convnet", "convnet"),
    "TrueBB": ("truebb", "truebb"),
}
"""Objects, and the name in `TABLE_1`."""
_EFFORTS: dict[Scale, Effort] = {
    "smoke": Effort(
        "quick",
        2,
        1,
        4,
        4,
        numbers=(_CARDS,),
        train_images=(16,),
        classifier=ClassifierTraining(steps=2, validation_every=1, batch_size=2),
        tiny=True,
    ),
    "cpu": Effort(
        "quick",
        1200,
        1,
        500,
        numbers=(3,),
        train_images=(128_000,),
        classifier=ClassifierTraining(
            steps=1200, validation_every=300, patience=1200, learning_rate=1e-3
        ),
    ),
    "full": Effort(
        "paper",
        200_000,
        6,
        1000,
        1000,
        numbers=(_CARDS,),
        train_images=(128_000,),
        classifier=ClassifierTraining(patience=20_000),
    ),
}
_MODEL: dict[str, dict[str, Any]] = {
    "quick": {"background": "mlp"},
    "paper": {
        "background": "mlp",
        "pointwise_kernel": 2,
        "colour_scale": 1.0,
        "alpha_scale": 1.0,
        "alpha_bias": 1.0,
    },
}
"""By preset; the paper's are the authors' settings for this experiment (docs/model.md 12.3)."""


def _label(labels: Tensor) -> Tensor:  # [B, N] -> [B] int64
    return has_set(labels).long()


def _trials(settings: Settings, folder: Path) -> list[Trial]:
    effort = EXPERIMENT.effort(settings)
    assert effort.classifier is not None
    (images,), (cards,) = effort.train_images, effort.numbers
    trials = []
    for seed in range(settings.seeds):
        data = {**CARDS, "min_objects": cards, "max_objects": cards, "train_images": images}
        train = {"training_wheels": 0} if effort.preset == "paper" else {}
        config = config_of(
            effort,
            "spair",
            seed,
            data,
            model=_MODEL[effort.preset],
            search={"mode": "off"},
            train=train,
        )
        assert isinstance(config.model, SPAIRConfig)
        task = Task(config.data, _label, 2, _UNITS, effort.classifier, config.model)
        named: dict[str, Measure] = {
            objects: accuracy_with(objects, task) for objects, _ in _METHODS.values()
        }
        trials.append(Trial(f"spair-seed-{seed}", config, named))
    return trials


def _conclude(settings: Settings, folder: Path, measured: Mapping[str, Measured]) -> Conclusion:
    effort = EXPERIMENT.effort(settings)
    (images,), (cards,) = effort.train_images, effort.numbers
    lines = []
    for name, (objects, known) in _METHODS.items():
        paper = {}
        if known is not None and cards == _CARDS:
            mean, _ = TABLE_1[known]
            paper = {images: Published(mean, mean, mean)}
        ours = {images: over_seeds(measured, "spair", objects, "accuracy")}
        lines.append(Line(name, ours, paper))
    chart = Chart(f"Accuracy, {cards} cards", "training images", lines)
    means = {line.name: line.ours[images].mean for line in lines}
    return Conclusion(
        [chart],
        [
            trend(
                "SPAIR and TrueBB are better than ConvNet",
                min(means["SPAIR"], means["TrueBB"]) > means["ConvNet"],
                ", ".join(f"{name} {value:.3f}" for name, value in means.items()),
            )
        ],
        partial(
            draw_methods,
            {line.name: line.ours[images] for line in lines},
            {line.name: line.published[images] for line in lines if line.published},
            "accuracy (dotted: chance)",
            level=_CHANCE,
        ),
    )


EXPERIMENT = Experiment(
    "table1",
    "whether cards of the game SET hold a set: SPAIR, ConvNet and TrueBB",
    _EFFORTS,
    _trials,
    _conclude,
    takes_digits=False,
)
