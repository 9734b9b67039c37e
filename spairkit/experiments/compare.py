"""Comparison of models on the same images: Fig. 2 of the paper, or a folder of images.

    FOLDER/settings.json
    FOLDER/runs/MODEL-OBJECTS-seed-N/     a run; its test.json is written after evaluation
    FOLDER/runs/MODEL-seed-N/             the same on a folder of images, which adds found.json
    FOLDER/results.json, table.txt, figure.png

An interrupted comparison resumes bit-identically, and evaluates no run twice.
"""

import json
import math
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import torch
from filelock import FileLock

from spairkit.data.datasets import described, evaluation_batches, open_dataset
from spairkit.data.folder import ImageFolder
from spairkit.detector import load
from spairkit.errors import InputError
from spairkit.evaluation import evaluate
from spairkit.experiments.found import FOUND, read_found, save_found
from spairkit.experiments.settings import (
    WITHOUT_WEIGHTS,
    Settings,
    Task,
    config_of,
    parse_budget,
)
from spairkit.experiments.shared_runs import (
    Ended,
    Started,
    read_json,
    trained,
    work_through,
)
from spairkit.storage import durable
from spairkit.storage.runs import Run
from spairkit.training.loop import Event, fit

FIGURES = ("ap", "ap_spair", "count_accuracy", "count_error")
"""Test figures that are averaged over the seeds."""

_WARM_UP, _TIMED = 6, 6  # updates; the first ones include compilation
_BATCH_SIZE = 32
_REMEDY = "delete it to measure again"


def compare(
    settings: Settings,
    folder: Path,
    device: torch.device,
    stop: Callable[[], bool] = lambda: False,
    busy: Callable[[], bool] = lambda: False,
) -> Iterator[Started | Event | Ended]:
    """Trains and evaluates all runs that no other process has finished or claimed.

    Args:
        settings: those of `folder`, from `open_comparison`.
        folder: folder of the comparison.
        device: device to train and evaluate on.
        stop: see `Sweep.work`.
        busy: see `Sweep.work`.

    Yields:
        The same events as `Sweep.work`.

    Raises:
        InputError: as `fit`, or a run was made with other settings.
    """
    runs = folder / "runs"

    def is_done(task: Task) -> bool:
        return is_evaluated(settings, runs / task.name)

    def do(task: Task, device: torch.device, stop: Callable[[], bool]) -> Iterator[Started | Event]:
        return _run(settings, runs / task.name, task, device, stop)

    def shown(task: Task) -> dict[str, float]:
        return _shown(settings, runs / task.name)

    yield from work_through(settings.tasks(), runs, device, is_done, do, shown, stop, busy)


def is_evaluated(settings: Settings, run: Path) -> bool:
    """Whether a run is trained and evaluated."""
    return (run / (FOUND if settings.is_folder else "test.json")).exists()


def read_figures(run: Path) -> dict[str, float]:
    """The test figures of a run; also its `steps` and, if they were measured, `seconds`.

    Raises:
        InputError: its test.json cannot be used.
    """
    path = run / "test.json"
    values = read_json(path, _REMEDY)
    try:
        figures = {name: values["overall"][name] for name in FIGURES} | {"steps": values["steps"]}
        figures |= {name: values[name] for name in ("seconds",) if name in values}
        if all(math.isfinite(number) for number in figures.values()):
            return {name: float(number) for name, number in figures.items()}
    except (KeyError, TypeError):
        pass
    raise InputError(f"{path}: not the figures of a run; {_REMEDY}")


def _run(
    settings: Settings, path: Path, task: Task, device: torch.device, stop: Callable[[], bool]
) -> Iterator[Started | Event]:
    """Trains and evaluates a claimed run, unless it is stopped."""
    steps, seconds = parse_budget(settings.budget)
    if seconds is not None and task.model not in WITHOUT_WEIGHTS:
        timing = path.with_name(f"{task.group}.json")  # for all seeds
        with FileLock(path.with_name(".timing.lock")):
            if not timing.exists():
                yield Started(f"timing {task.group}", _WARM_UP + _TIMED)
                duration = yield from _seconds_per_update(settings, task, device, stop)
                if stop():
                    return
                durable.write_text(timing, f"{max(int(seconds / duration), 1)}\n")
        steps = read_json(timing, _REMEDY)
        if type(steps) is not int or steps < 1:
            raise InputError(f"{timing}: not a number of updates; {_REMEDY}")
    cost = yield from trained(path, config_of(settings, task, steps), device, stop)
    if cost is None:
        return
    run = Run.open(path)
    dataset = open_dataset(run.config.data, "test", device)
    if isinstance(dataset, ImageFolder):
        save_found(run, load(run.path, device), dataset, cost)
        return
    report = evaluate(
        load(run.path, device),
        evaluation_batches(dataset, _BATCH_SIZE),
        measured_on=described(run.config.data, "test"),
    )
    values = {**report.to_json(), **cost}
    durable.write_text(run.path / "test.json", f"{json.dumps(values, indent=2)}\n")


def _shown(settings: Settings, run: Path) -> dict[str, float]:
    """The figures that progress shows of an evaluated run."""
    if settings.is_folder:
        return {"objects": sum(map(len, read_found(run).boxes))}
    figures = read_figures(run)
    return {name: figures[name] for name in FIGURES}


def _seconds_per_update(
    settings: Settings, task: Task, device: torch.device, stop: Callable[[], bool]
) -> Generator[Event, None, float]:
    """The duration of an update, from a few that are not saved; without meaning if stopped."""
    moments = [time.perf_counter()]
    for event in fit(config_of(settings, task, _WARM_UP + _TIMED), None, device, stop):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        moments.append(time.perf_counter())
        yield event
    return (moments[-1] - moments[-1 - _TIMED]) / _TIMED if len(moments) > _TIMED else 1.0
