"""Carries out an experiment: claims, trains, calibrates and measures its runs, then concludes.

An interrupted experiment resumes bit-identically, and measures nothing twice.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

import torch

from spairkit.config import DataConfig
from spairkit.data.datasets import data_settings, open_dataset
from spairkit.errors import InputError
from spairkit.experiments import fidelity, fig2, fig3, fig4, fig6, fig7, objects, table1
from spairkit.experiments.experiment import (
    Conclusion,
    Experiment,
    Figures,
    Measured,
    Scale,
    Settings,
    Trial,
)
from spairkit.experiments.shared_runs import (
    Ended,
    Started,
    note_data,
    read_json,
    refuse_other_data,
    trained,
    work_through,
)
from spairkit.storage import durable
from spairkit.storage.checkpoints import environment
from spairkit.storage.runs import LINKS, new_folder
from spairkit.training.loop import Event, Step

EXPERIMENTS = {
    module.EXPERIMENT.name: module.EXPERIMENT
    for module in (fig2, fig3, fig4, fig6, fig7, table1, objects, fidelity)
}
"""All experiments by name."""

DEFAULT: Scale = "cpu"
"""The scale of an experiment, unless the user says otherwise."""

_SETTINGS, _MEASURED = "settings.json", "measured.json"
_MOST_SEEDS = 1000
_SHOWN = ("ap", "ap_spair", "count_accuracy", "accuracy")  # when a trial ends
_REMEDY = "delete it to measure again"


def open_experiment(
    name: str,
    out: Path | None = None,
    *,
    scale: str | None = None,
    seeds: int | None = None,
    data: str | None = None,
) -> tuple[Experiment, Settings, Path, list[Trial]]:
    """The experiment in the folder `out`, or a new one there or in `runs/NAME-N`.

    The file of digits of an existing one may have moved.

    Args:
        name: one of `EXPERIMENTS`.
        out: an existing experiment or a new folder.
        scale: one of `Scale`.
        seeds: runs of each neural model.
        data: an MNIST or EMNIST file, or the name of a dataset of digits.

    Raises:
        InputError: there is no such experiment; what is asked for differs from the settings of the
            existing one; the data cannot be read; an extra is missing; or the folder cannot be
            used.
    """
    if name not in EXPERIMENTS:
        raise InputError(f"unknown experiment {name!r}; choose from: {', '.join(EXPERIMENTS)}")
    experiment = EXPERIMENTS[name]
    asked: dict[str, Any] = {"experiment": name}
    if scale is not None:
        asked["scale"] = scale
    if seeds is not None:
        asked["seeds"] = seeds
    if data is not None:
        if not experiment.takes_digits:
            raise InputError(f"--data {data}: {name} makes its own images; omit it")
        asked["data"] = data_settings(data)["data"]
        if asked["data"]["name"] == "folder":
            raise InputError(f"--data {data}: {name} scatters digits; give an MNIST file")
    if out is not None and (out / _SETTINGS).exists():
        durable.refuse_links(out, LINKS)
        settings = _checked(read_json(out / _SETTINGS, "pass another --out"), str(out / _SETTINGS))
        if moved := _moved(settings, asked):
            refuse_other_data(out, DataConfig(**moved.data))
            settings = moved
        saved = asdict(settings)
        if changes := [f"{k}: {saved[k]} -> {v}" for k, v in asked.items() if saved[k] != v]:
            raise InputError(
                f"{out}: the settings of an experiment are fixed, and these differ: "
                f"{'; '.join(changes)}; omit them, or pass another --out"
            )
        if moved:
            _write_settings(out, settings)
        return experiment, settings, out, experiment.trials(settings, out)
    chosen = {"scale": DEFAULT, **asked}
    settings = _checked({"seeds": experiment.efforts[chosen["scale"]].seeds, **chosen}, name)
    is_new = out is None or not out.exists()
    folder = new_folder(out, name)
    try:
        trials = experiment.trials(settings, folder)
        open_dataset(trials[0].config.data, "test")
        if experiment.takes_digits:
            note_data(folder, trials[0].config.data)
        _write_settings(folder, settings)
    except BaseException:  # Ctrl-C too: nothing could resume it
        if is_new:
            durable.remove_folder(folder)
        raise
    return experiment, settings, folder, trials


def carry_out(
    trials: Sequence[Trial],
    folder: Path,
    device: torch.device,
    stop: Callable[[], bool] = lambda: False,
    busy: Callable[[], bool] = lambda: False,
) -> Iterator[Started | Event | Ended]:
    """Trains and measures all trials that no other process has finished or claimed.

    Args:
        trials, folder: from `open_experiment`.
        device: to train and measure on.
        stop, busy: see `Sweep.work`.

    Yields:
        The same events as `Sweep.work`.

    Raises:
        InputError: as `fit`, or a run was made with other settings.
    """
    runs = folder / "runs"

    def is_done(trial: Trial) -> bool:
        return is_measured(trial, folder)

    def do(
        trial: Trial, device: torch.device, stop: Callable[[], bool]
    ) -> Iterator[Started | Event]:
        return _train_and_measure(trial, runs / trial.name, device, stop)

    def shown(trial: Trial) -> Figures:
        figures = next(iter(read_measured(runs / trial.name).figures.values()))
        return {name: figures[name] for name in _SHOWN if name in figures}

    yield from work_through(trials, runs, device, is_done, do, shown, stop, busy)


def is_measured(trial: Trial, folder: Path) -> bool:
    """Whether a trial of the experiment in `folder` is trained, and all is measured on it."""
    run = folder / "runs" / trial.name
    return (run / _MEASURED).exists() and not trial.measures.keys() - read_measured(run).figures


def read_measured(run: Path) -> Measured:
    """What has been measured on a run so far.

    Raises:
        InputError: its measured.json cannot be used.
    """
    path = run / _MEASURED
    values = read_json(path, _REMEDY)
    try:
        seconds = values.get("seconds")
        return Measured(
            steps=int(values["steps"]),
            seconds=None if seconds is None else _finite(seconds),
            figures={
                str(measure): {str(name): _finite(value) for name, value in figures.items()}
                for measure, figures in values["figures"].items()
            },
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        raise InputError(f"{path}: not the figures of a run; {_REMEDY}") from None


def concluded(
    experiment: Experiment, settings: Settings, folder: Path, trials: Sequence[Trial]
) -> tuple[Conclusion, str, dict[str, Any]]:
    """The result of an experiment whose trials are all measured.

    Returns:
        The conclusion, a heading that names the scale, and the content of results.json.

    Raises:
        InputError: the figures of a run cannot be read.
    """
    measured = {trial.name: read_measured(folder / "runs" / trial.name) for trial in trials}
    try:
        conclusion = experiment.conclude(settings, folder, measured)
    except KeyError as error:
        raise InputError(
            f"{folder}: a figure {error} is missing in a {_MEASURED}; {_REMEDY}"
        ) from None
    effort = experiment.effort(settings)
    seeds = (
        "one seed" if settings.seeds == 1 else f"{settings.seeds} seeds, means and 95 % t-intervals"
    )
    glyphs = f", digits of {_digits(settings)}" if experiment.takes_digits else ""
    heading = (
        f"{experiment.name}: {experiment.about}\n"
        f"scale {settings.scale}: {effort.described()}, {seeds}; {effort.test_images:,} test "
        f"images each{glyphs}"
    )
    values = {
        "experiment": str(folder),
        "settings": asdict(settings),
        "heading": heading,
        "charts": {chart.title: chart.values() for chart in conclusion.charts},
        "trends": list(conclusion.trends),
        "runs": {name: asdict(item) for name, item in measured.items()},
        "interval": "95 % by Student's t over the seeds",
        "environment": environment(),
    }
    return conclusion, heading, values


def _digits(settings: Settings) -> str:
    path = settings.data.get("path", "")
    return Path(path).name if path else "UCI"


def _train_and_measure(
    trial: Trial, path: Path, device: torch.device, stop: Callable[[], bool]
) -> Iterator[Started | Event]:
    """Trains and measures a claimed run, unless it is stopped."""
    if not (path / _MEASURED).exists():
        cost = yield from trained(path, trial.config, device, stop)
        if cost is None:
            return
        _write_measured(path, {**cost, "figures": {}})
    yield Started(trial.name, len(trial.measures), "measures")
    measured, began = read_measured(path), time.perf_counter()
    values: dict[str, Any] = {k: v for k, v in asdict(measured).items() if v is not None}
    for number, (name, measure) in enumerate(trial.measures.items(), start=1):
        if stop():
            return
        if name not in measured.figures:
            figures = yield from measure(path, device, stop)
            if figures is None:
                return
            values["figures"][name] = figures
            _write_measured(path, values)
        yield Step(number, len(trial.measures), None, time.perf_counter() - began)


def _write_measured(run: Path, values: Mapping[str, Any]) -> None:
    durable.write_text(run / _MEASURED, f"{json.dumps(values, indent=1, allow_nan=False)}\n")


def _moved(settings: Settings, asked: Mapping[str, Any]) -> Settings | None:
    """The settings with another place of the file of digits, if one is asked for."""
    before, after = settings.data, asked.get("data", {})
    if "path" not in after or after == before or after["name"] != before.get("name"):
        return None
    return replace(settings, data=after)


def _write_settings(folder: Path, settings: Settings) -> None:
    durable.write_text(folder / _SETTINGS, f"{json.dumps(asdict(settings), indent=2)}\n")


def _checked(values: Any, source: str) -> Settings:
    """Settings from untrusted values."""
    try:
        settings = Settings(**values)
    except TypeError:
        raise InputError(f"{source}: not the settings of an experiment") from None
    if (
        settings.experiment not in EXPERIMENTS
        or settings.scale not in get_args(Scale)
        or type(settings.seeds) is not int
        or not 1 <= settings.seeds <= _MOST_SEEDS
        or not isinstance(settings.data, dict)
    ):
        raise InputError(
            f"{source}: not the settings of an experiment: scales are "
            f"{', '.join(get_args(Scale))}, and seeds are from 1 to {_MOST_SEEDS}"
        )
    return settings


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError("numbers must be finite")
    return number
