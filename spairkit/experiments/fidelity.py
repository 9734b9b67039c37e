"""What the differences between paper and released code do to AP (docs/model.md 13).

A SPAIR is trained for each difference that is a setting, on three digits in 48 x 48 pixels, and
measured as in the paper. One is a matter of detection: the authors sampled all latents, spairkit
takes their means. ConnComp's threshold is fitted by AP on some training images, as by default, by
the authors' AP, and by this on all training images.
"""

from collections.abc import Callable, Generator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from spairkit.backends import computing_in
from spairkit.config import DataConfig
from spairkit.data.datasets import evaluation_batches, open_dataset
from spairkit.detections import Detections, Truth
from spairkit.detector import load
from spairkit.evaluation import report_on
from spairkit.experiments.experiment import (
    Conclusion,
    Effort,
    Experiment,
    Figures,
    Measure,
    Measured,
    Scale,
    Settings,
    Trial,
    config_of,
    figures_on,
    known_figures,
    over_seeds,
)
from spairkit.experiments.picture import Chart, Line, draw_methods
from spairkit.experiments.published import FIGURE_2
from spairkit.experiments.shared_runs import Started
from spairkit.models.spair import SPAIR
from spairkit.training.loop import Event

_DIGITS = 3
_BATCH_SIZE = 32
_FIGURES = {"ap_spair": "AP paper", "ap": "AP", "count_wrong": "count wrong"}
_EFFORTS: dict[Scale, Effort] = {
    "smoke": Effort(
        "quick",
        2,
        1,
        4,
        4,
        train_images=(8,),
        thresholds=3,
        threshold_images=4,
        search="off",
        tiny=True,
    ),
    "cpu": Effort("quick", 800, 1, 300, 64, train_images=(2000,), thresholds=50, search="off"),
    "full": Effort(
        "paper",
        200_000,
        6,
        1000,
        1000,
        train_images=(64_000,),
        threshold_images=1000,
        search="off",
    ),
}
_BASELINE = "baseline", "preset"  # a run, and its name in the table
_NOISE = {
    "quick": ("with gradient noise (code)", 0.001),
    "paper": ("no gradient noise (paper)", 0.0),
}
_CONNCOMP: dict[str, tuple[str, str, bool]] = {
    "conncomp": ("ConnComp, by AP", "ap", False),
    "conncomp-authors": ("ConnComp, by AP paper (code)", "ap_spair", False),
    "conncomp-all": ("ConnComp, the same on all images (paper)", "ap_spair", True),
}
"""Name in the table, criterion, and whether all training images are used, by run."""
DIFFERENCES: dict[str, str | tuple[str, ...]] = {
    "order of the latents": "spairkit has that of the code only",
    "depth": "spairkit has the paper's sign and, between cells, the code's scale",
    "importance floor": ("floor",),
    "border of an object": "spairkit has that of the code only",
    "training wheels, gradient noise, logit scales": ("wheels", "noise", "logits"),
    "standard deviations": "the paper has none, so spairkit has the code's",
    "digits": "they are those of your file, --data",
    "detection": ("sampled",),
    "validation ELBO": "spairkit takes one relaxed sample, as in training",
    "colour difference of ConnComp": "digits are white, so the sum is three times the difference",
    "selection of its threshold": ("conncomp-authors", "conncomp-all"),
    "background `mode`": "these scenes are black",
    "best checkpoint": ("select",),
    "fractions of the chain": "spairkit computes them exactly in float64",
}
"""The runs or measures that show each difference of docs/model.md 13, or why none does."""


def _variants(preset: str) -> dict[str, tuple[str, dict[str, dict[str, Any]]]]:
    """Name in the table and values of `Config`'s tables by run, where they differ from a preset."""
    noise, deviation = _NOISE[preset]
    return {
        _BASELINE[0]: (_BASELINE[1], {}),
        "floor": ("no importance floor (paper)", {"model": {"importance_floor": 0.0}}),
        "wheels": ("no training wheels (paper)", {"train": {"training_wheels": 0}}),
        "noise": (noise, {"train": {"gradient_noise": deviation}}),
        "logits": (
            "plain logits of colour and alpha (paper)",
            {"model": {"colour_scale": 1.0, "alpha_scale": 1.0, "alpha_bias": 0.0}},
        ),
        "select": ("checkpoint by validation AP (code)", {"train": {"select": "ap"}}),
    }


def _trials(settings: Settings, folder: Path) -> list[Trial]:
    effort = EXPERIMENT.effort(settings)
    data = {
        **settings.data,
        "image_height": 48,
        "image_width": 48,
        "min_objects": _DIGITS,
        "max_objects": _DIGITS,
        "train_images": effort.train_images[0],
    }
    trials = []
    for seed in range(settings.seeds):
        for name, (_, tables) in _variants(effort.preset).items():
            config = config_of(effort, "spair", seed, data, **tables)
            measures = {"paper": figures_on(config.data, box_contrast=0.0)}
            if name == _BASELINE[0]:
                measures["sampled"] = _sampled(config.data, seed)
            trials.append(Trial(f"{name}-seed-{seed}", config, measures))
    for name, (_, criterion, takes_all) in _CONNCOMP.items():
        model: dict[str, Any] = {"criterion": criterion}
        if takes_all:
            model["images"] = effort.train_images[0]
        config = config_of(effort, "conncomp", 0, data, model=model)
        trials.append(Trial(f"{name}-seed-0", config, {"paper": figures_on(config.data)}))
    return trials


def _sampled(data: DataConfig, seed: int) -> Measure:
    """Measures a SPAIR whose latents are sampled, as the authors detected."""

    def measure(
        run: Path, device: torch.device, stop: Callable[[], bool]
    ) -> Generator[Started | Event, None, Figures | None]:
        yield from ()
        network = load(run, device).network
        assert isinstance(network, SPAIR)
        found: list[Detections] = []
        truth: list[Truth] = []
        with torch.random.fork_rng(), computing_in("float32", device):
            torch.manual_seed(seed)
            for batch in evaluation_batches(open_dataset(data, "test", device), _BATCH_SIZE):
                found += network.detect(batch.images, box_contrast=0.0, sample=True)
                truth += batch.truth()
                if stop():
                    return None
        return known_figures(report_on(found, truth, whole_pixels=False).overall)

    return measure


def _conclude(settings: Settings, folder: Path, measured: Mapping[str, Measured]) -> Conclusion:
    effort = EXPERIMENT.effort(settings)
    places = {name: (title, name, "paper") for name, (title, _) in _variants(effort.preset).items()}
    places["sampled"] = "latents sampled (code)", _BASELINE[0], "sampled"
    places |= {name: (title, name, "paper") for name, (title, _, _) in _CONNCOMP.items()}
    published = {
        _BASELINE[1]: FIGURE_2["spair"][_DIGITS],
        _CONNCOMP["conncomp-all"][0]: FIGURE_2["conncomp"][_DIGITS],
    }
    lines = [
        Line(
            title,
            {
                row: over_seeds(measured, method, measure, figure)
                for row, method, measure in places.values()
            },
            published if figure == "ap_spair" else {},
        )
        for figure, title in _FIGURES.items()
    ]
    ap = lines[0].ours
    notes = []
    for matter, shown in DIFFERENCES.items():
        if isinstance(shown, str):
            notes.append(f"{matter}: not a setting; {shown}")
            continue
        for name in shown:
            row = places[name][0]
            base = _CONNCOMP["conncomp"][0] if name in _CONNCOMP else _BASELINE[1]
            change = ap[row].mean - ap[base].mean
            notes.append(f"{matter}: {row}, AP paper {change:+.3f} against {base!r}")
    return Conclusion(
        [Chart(f"Differences, {_DIGITS} digits", "variant", lines)],
        notes,
        partial(draw_methods, ap, published, "AP paper"),
    )


EXPERIMENT = Experiment(
    "fidelity",
    "what the differences between paper and code do to AP",
    _EFFORTS,
    _trials,
    _conclude,
)
