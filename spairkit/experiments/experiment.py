"""What an experiment is: named trainings, what is measured on each, and what follows from it.

FOLDER/settings.json
FOLDER/runs/TRIAL-seed-N/               a run, as of `spairkit train`
FOLDER/runs/TRIAL-seed-N/measured.json  its figures; each is written when it is measured
FOLDER/results.json, table.txt, figure.png
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
from torch import Tensor

from spairkit import evaluation
from spairkit.config import Config, DataConfig, SearchMode
from spairkit.config_values import merge
from spairkit.data.datasets import evaluation_batches, open_dataset
from spairkit.data.scenes import Batch
from spairkit.detections import Detections
from spairkit.detector import load
from spairkit.experiments.intervals import Interval, t_interval
from spairkit.experiments.picture import Chart
from spairkit.experiments.shared_runs import Started
from spairkit.label_images import foreground_ari
from spairkit.presets import resolve
from spairkit.training.classification import ClassifierTraining
from spairkit.training.loop import Event

Scale = Literal["smoke", "cpu", "full"]
"""`smoke` exercises every line, `cpu` takes 3 to 16 minutes of CPU time, `full` is the paper's."""

Figures = dict[str, float]
"""Figures by name, all finite."""

Measure = Callable[
    [Path, torch.device, Callable[[], bool]], Generator[Started | Event, None, Figures | None]
]
"""Measures a trained run in a folder, on a device; returns None if the function given says stop.

It yields the events of trainings of its own, if it has any. What it has begun it resumes or repeats
the next time."""

MASK_CONTRAST = 0.03
"""The contrast at which the masks of our results end, as in the preset quick."""

_BATCH_SIZE = 32
_THRESHOLD = 0.5  # of the score of what is found
_VALIDATIONS = 10  # of a run
_NETWORK = {"what": 4, "encoder_hidden": (8,), "decoder_hidden": (8,)}
_TINY: dict[str, dict[str, Any]] = {
    "spair": {"backbone_channels": (4,), "features": 8, "hidden": 8, "passthrough": 4, **_NETWORK},
    "air": {"units": 8, "output_hidden": 8, **_NETWORK},
    "dair": {"units": 8, "difference_hidden": (8,), "output_hidden": 8, **_NETWORK},
}


@dataclass(frozen=True)
class Effort:
    """How much an experiment does at a scale."""

    preset: str
    steps: int
    """Updates of each neural model."""
    seeds: int
    """Runs of each neural model, unless the user says otherwise."""
    test_images: int
    """Test images of each kind."""
    validation_images: int = 256
    numbers: tuple[int, ...] = ()
    """Numbers of objects in a test image."""
    train_images: tuple[int, ...] = ()
    """Sizes of the training set; none: images are new in every update."""
    classifier: ClassifierTraining | None = None
    """The training of classifiers, if there are any."""
    thresholds: int = 100
    """Thresholds that ConnComp tries."""
    threshold_images: int = 300
    """Training images that it tries them on."""
    search: SearchMode = "full"
    """The search of our results; the paper has none."""
    searched_images: int = 0
    """Test images of each kind that are searched, where that takes longest; 0: all."""
    tiny: bool = False
    """Whether networks are tiny, so that results mean nothing."""

    def described(self) -> str:
        """The models and their updates in words."""
        networks = ", tiny networks, so the figures mean nothing" if self.tiny else ""
        words = f"preset {self.preset}{networks}, {self.steps:,} updates"
        if self.classifier is not None:
            words += f", at most {self.classifier.steps:,} of each classifier"
        return words


@dataclass(frozen=True)
class Settings:
    """The settings of an experiment, fixed when its folder is created."""

    experiment: str
    scale: Scale
    seeds: int
    data: dict[str, Any] = field(default_factory=dict)
    """Values of `DataConfig` for the digits; none: those that ship with spairkit."""


@dataclass(frozen=True)
class Trial:
    """One training of an experiment."""

    name: str
    """The name of the run's folder: a method, `-seed-` and the seed."""
    config: Config
    measures: Mapping[str, Measure]
    """What is measured on the trained run, by name."""


@dataclass(frozen=True)
class Measured:
    """What was measured on a trial."""

    steps: int
    """Updates; for ConnComp, thresholds."""
    seconds: float | None
    """Duration of the training; None if it was not measured."""
    figures: dict[str, Figures]
    """Figures by the name of the measure."""


@dataclass(frozen=True)
class Conclusion:
    """The result of an experiment."""

    charts: Sequence[Chart]
    """Its tables; the picture shows them too, unless there is another."""
    trends: Sequence[str]
    """What the paper reports, and whether it holds here; a line each."""
    picture: Callable[[str], bytes] | None = None
    """Draws a picture (PNG) with a note below; None: the charts."""


@dataclass(frozen=True)
class Experiment:
    """An experiment of the paper, or one like them."""

    name: str
    about: str
    """A line about it."""
    efforts: Mapping[Scale, Effort]
    trials: Callable[[Settings, Path], list[Trial]]
    """Its trials, in the order of their trainings; may write the images into the folder."""
    conclude: Callable[[Settings, Path, Mapping[str, Measured]], Conclusion]
    """What follows from the measurements of all trials, by name."""
    takes_digits: bool = True
    """Whether the user may choose the digits."""

    def effort(self, settings: Settings) -> Effort:
        """How much it does at the scale of the settings."""
        return self.efforts[settings.scale]


def config_of(
    effort: Effort, kind: str, seed: int, data: Mapping[str, Any], **tables: Mapping[str, Any]
) -> Config:
    """The config of a trial: the effort's preset for a kind of model.

    Args:
        effort: gives preset, updates, search and numbers of images.
        kind: the kind of model.
        seed: of the training.
        data: values of `DataConfig`.
        tables: values of `Config`'s other tables, laid over the preset.
    """
    model: dict[str, Any] = {"kind": kind, **(_TINY.get(kind, {}) if effort.tiny else {})}
    train: dict[str, Any] = {"seed": seed}
    search: dict[str, Any] = {}
    if kind == "conncomp":
        model["images"] = effort.threshold_images
        train["steps"] = effort.thresholds
    elif kind != "watershed":
        train["steps"] = effort.steps
        train["validation_every"] = -(-effort.steps // _VALIDATIONS)
    if effort.tiny:
        train["batch_size"] = 2
    if kind == "spair":
        search["mode"] = effort.search
    images = {
        "validation_images": effort.validation_images,
        "test_images": effort.test_images,
        **data,
    }
    return resolve(
        effort.preset,
        merge({"data": images, "model": model, "search": search, "train": train}, tables),
    )


def figures_on(
    data: DataConfig,
    *,
    search: SearchMode | None = None,
    box_contrast: float | None = None,
    true_masks: Callable[[int], Tensor] | None = None,
) -> Measure:
    """Measures the figures of `evaluation.Figures` on test images.

    Args:
        data: the test images.
        search, box_contrast: see `Detector`; None: those of the run.
        true_masks: the true label image of a test image, which has an object, by its number.

    Returns:
        A measure of `known_figures`; with `true_masks` also of `ari`, the mean `foreground_ari`.
    """

    def measure(
        run: Path, device: torch.device, stop: Callable[[], bool]
    ) -> Generator[Started | Event, None, Figures | None]:
        yield from ()
        detector = load(run, device, search=search, box_contrast=box_contrast)
        batches = evaluation_batches(open_dataset(data, "test", device), _BATCH_SIZE)
        agreement: list[float] = []

        def compare_masks(found: list[Detections]) -> None:
            assert true_masks is not None
            for item in found:
                masks = item[item.scores > _THRESHOLD].masks
                agreement.append(foreground_ari(masks, true_masks(len(agreement))))

        seen = None if true_masks is None else compare_masks
        figures = evaluation.evaluate(
            detector, _until(stop, batches), _THRESHOLD, seen=seen
        ).overall
        if stop():
            return None
        return known_figures(figures) | ({"ari": fmean(agreement)} if agreement else {})

    return measure


def known_figures(found: evaluation.Figures) -> Figures:
    """The figures that model and images have, and `count_wrong`, the paper's 0-1 error.

    That is the share of images that are not counted exactly.
    """
    known = {name: value for name, value in found.to_json().items() if value is not None}
    return known | {"count_wrong": 1 - found.count_accuracy}


def _until(stop: Callable[[], bool], batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches up to the one, at least the first, after which `stop` says so."""
    for batch in batches:
        yield batch
        if stop():
            return


def over_seeds(
    measured: Mapping[str, Measured], method: str, measure: str, figure: str
) -> Interval:
    """The mean of a figure over the trials of a method, and its 95 % interval.

    Args:
        measured: by the name of the trial.
        method: the name of the trials without `-seed-` and the seed.
        measure: the name of the measure.
        figure: the name of the figure.
    """
    return t_interval(
        [
            item.figures[measure][figure]
            for name, item in measured.items()
            if name.rpartition("-seed-")[0] == method
        ]
    )


def trend(claim: str, holds: bool, evidence: str) -> str:
    """A line about a trend: the claim, whether it holds, and the numbers that say so."""
    return f"{claim}: {'holds' if holds else 'does not hold'} ({evidence})"
