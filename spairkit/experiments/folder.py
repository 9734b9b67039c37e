"""The result of a comparison on a folder of images, and advice on the model to use.

Without annotations nothing is known of accuracy; how far the models agree is.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

from spairkit.data.datasets import described
from spairkit.errors import InputError
from spairkit.experiments.found import FIGURES, Found, read_found
from spairkit.experiments.intervals import Interval, t_interval
from spairkit.experiments.settings import MODELS, WITHOUT_WEIGHTS, Settings, config_of
from spairkit.metrics import PROTOCOLS, agreement
from spairkit.storage.checkpoints import environment

DISAGREES = 0.75
"""F1 between SPAIR and the watershed below which one of them has failed; .67 if it finds half."""

UNSURE = 0.7
"""F1 between seeds of SPAIR below which training depends on chance."""

SAME = 0.9
"""F1 above which two models find the same objects."""


@dataclass(frozen=True)
class Method:
    """The result of one model."""

    found: Interval
    """Number of objects in all images."""
    figures: dict[str, Interval]
    """Means over the seeds by name of `found.FIGURES`; empty without annotations."""
    steps: int
    """Updates per run; for ConnComp, thresholds."""
    seconds: float | None
    """Mean training time per run; None if it was not measured."""
    search: str
    """The mode of its search; see `config.SearchConfig`."""


@dataclass(frozen=True)
class Comparison:
    """The results of all models on the images of a folder."""

    measured_on: str
    """A description of the images."""
    images: int
    annotated: int
    """Images whose objects are known."""
    objects: int
    """Known objects."""
    methods: dict[str, Method]
    """Results by model."""
    agreement: dict[str, dict[str, float]]
    """F1 at IoU .5 of one model's boxes against another's, a mean over the pairs of their runs. A
    model agrees with itself over the pairs of its seeds; this is missing if it has one run."""


def runs_of(settings: Settings, folder: Path) -> dict[str, list[Found]]:
    """The objects that every run of an evaluated comparison found, by model and seed.

    Raises:
        InputError: a file cannot be read, or runs saw different images.
    """
    runs: dict[str, list[Found]] = {model: [] for model in settings.models}
    for task in settings.tasks():
        runs[task.model].append(read_found(folder / "runs" / task.name))
    every = [run for model in runs.values() for run in model]
    if any((run.files, run.true) != (every[0].files, every[0].true) for run in every):
        raise InputError(f"{folder}: the images have changed between the runs; start again")
    return runs


def tabulate_folder(settings: Settings, runs: dict[str, list[Found]]) -> Comparison:
    """The table of a comparison, from the objects that `runs_of` gives."""
    configs = {task.model: config_of(settings, task) for task in settings.tasks()}
    methods = {}
    for model, found in runs.items():
        seconds = [run.seconds for run in found if run.seconds is not None]
        methods[model] = Method(
            found=t_interval([sum(map(len, run.boxes)) for run in found]),
            figures={
                name: t_interval([run.figures[name] for run in found])
                for name in FIGURES
                if all(name in run.figures for run in found)
            },
            steps=found[0].steps,
            seconds=fmean(seconds) if seconds else None,
            search=configs[model].search.mode,
        )
    first = next(iter(runs.values()))[0]
    known = [number for number in first.true if number is not None]
    return Comparison(
        measured_on=described(next(iter(configs.values())).data, "test"),
        images=len(first.files),
        annotated=len(known),
        objects=sum(known),
        methods=methods,
        agreement={
            one: {
                two: value
                for two in runs
                if (value := _agreement(runs[one], runs[two], same=one == two)) is not None
            }
            for one in runs
        },
    )


def recommended(result: Comparison) -> tuple[str, str]:
    """The model to use, and why.

    With annotations the highest AP wins; among models whose 95 % interval overlaps the winner's,
    one without weights, or else the fastest to train. Without annotations SPAIR is chosen if it
    agrees with the watershed on most objects and its seeds with each other, unless all models find
    the same; otherwise the watershed, or the first model.
    """
    methods = result.methods
    if result.annotated:
        ap = {model: method.figures["ap"] for model, method in methods.items()}
        best = max(ap.values(), key=lambda interval: interval.mean)
        equals = [model for model in methods if ap[model].high >= best.low]
        chosen = min(
            equals,
            key=lambda m: (
                m not in WITHOUT_WEIGHTS,
                -ap[m].mean if m in WITHOUT_WEIGHTS else methods[m].seconds or math.inf,
            ),
        )
        return chosen, f"AP {ap[chosen]}"
    rest = next((model for model in WITHOUT_WEIGHTS if model in methods), None)
    if "spair" not in methods or rest is None:
        chosen = rest or next(iter(methods))
        return chosen, "there is nothing to weigh it against"
    if not methods["spair"].found.mean + methods[rest].found.mean:
        return rest, "neither it nor SPAIR finds an object; are there any in these images?"
    agrees = result.agreement["spair"]
    seeds, floor = agrees.get("spair", 1.0), agrees[rest]
    counts = f"{_count(methods['spair'])} objects against {_count(methods[rest])}"
    if floor < DISAGREES:
        return rest, (
            f"SPAIR disagrees with it (F1 {floor:.2f}; {counts}), so one of them fails on these "
            "images, and a watershed fails less often"
        )
    if seeds < UNSURE:
        return rest, f"the seeds of SPAIR disagree with each other (F1 {seeds:.2f})"
    others = [agrees[model] for model in methods if model != "spair"]
    if min(others) >= SAME:
        return rest, f"all find the same objects (F1 at least {min(others):.2f}), and it is quick"
    return "spair", (
        f"it agrees with {MODELS[rest]} on most objects (F1 {floor:.2f}; {counts}) and explains "
        "the pixels of those that touch"
    )


def folder_advice(result: Comparison) -> list[str]:
    """The model to use, why, and the limits of this choice."""
    chosen, reason = recommended(result)
    lines = [f"use {MODELS[chosen]}: {reason}"]
    if result.annotated:
        lines.append(
            "rule: the highest mean AP wins; among models whose 95 % interval overlaps the "
            "winner's, one that needs no training, or else the fastest to train"
        )
        lines.append("the test images include the training images")
        if "conncomp" in result.methods:
            lines.append("ConnComp's threshold was fitted to their boxes, which favours it")
    else:
        lines.append(
            "no annotations: agreement is not accuracy. Look at figure.png; a few annotated images "
            "(annotations.json, COCO) would decide"
        )
    if any(len(m.found.values) == 1 for k, m in result.methods.items() if k not in WITHOUT_WEIGHTS):
        lines.append("one seed gives no intervals: small differences may be chance")
    return lines


def folder_summary(settings: Settings, result: Comparison) -> dict[str, Any]:
    """The content of results.json."""
    names = [name for name in FIGURES if name in PROTOCOLS]
    return {
        "settings": asdict(settings),
        "budget": settings.described_budget(),
        **asdict(result),
        "recommended": recommended(result)[0],
        "advice": folder_advice(result),
        "interval": "95 % by Student's t over the seeds",
        "protocols": {name: PROTOCOLS[name] for name in names}
        | {"f1": "at IoU .5, with as many pairs as possible", "agreement": "F1 between two models"},
        "environment": environment(),
    }


def _count(method: Method) -> str:
    return f"{method.found.mean:,.0f}"


def _agreement(ones: Sequence[Found], twos: Sequence[Found], *, same: bool) -> float | None:
    pairs = combinations(ones, 2) if same else ((one, two) for one in ones for two in twos)
    values = [agreement(one.detections(), two.detections()).f1 for one, two in pairs]
    return fmean(values) if values else None
