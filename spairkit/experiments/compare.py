"""SPAIR, AIR, DAIR and ConnComp under one protocol: Fig. 2 of the paper, at any scale.

FOLDER/settings.json
FOLDER/runs/MODEL-OBJECTS-seed-N/     a run each; its test.json is written when it is measured
FOLDER/results.json, figure.png       when all are

A comparison that is interrupted goes on exactly: runs resume to the bit, and what is measured is
not measured again.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import torch
from filelock import FileLock, Timeout

from spairkit.config_values import differences
from spairkit.data.datasets import described, evaluation_batches, open_dataset
from spairkit.detector import load
from spairkit.errors import InputError
from spairkit.evaluation import evaluate
from spairkit.experiments.folder import measured_figures
from spairkit.experiments.settings import VALIDATIONS, Settings, Task, config_of
from spairkit.storage import durable
from spairkit.storage.runs import Run
from spairkit.training.loop import fit
from spairkit.training.validation import Step, Validation

_PROBE = 12  # updates whose speed is measured
_BATCH_SIZE = 32


@dataclass(frozen=True)
class Probing:
    """The speed of a run is measured, to turn its budget into updates."""

    task: Task


@dataclass(frozen=True)
class Started:
    """A run begins, or goes on."""

    task: Task
    steps: int
    """Its updates in all; for ConnComp, thresholds."""
    measured: bool
    """Whether their number was chosen now, from the speed of a few."""


@dataclass(frozen=True)
class Finished:
    """A run is trained and measured, now or before."""

    task: Task
    figures: dict[str, float]
    """The overall ones, by name: see `folder.FIGURES`."""


def compare(
    settings: Settings,
    folder: Path,
    device: torch.device,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[Probing | Started | Step | Validation | Finished]:
    """Trains and measures, one run after another, what nobody has done or is doing.

    Several processes can do this in one folder: what another one has locked is passed over.

    Args:
        settings: the folder's, after `begin`.
        folder: of the comparison.
        device: where models and scenes live.
        stop: asked after every update; when it says yes the run that is going on is saved, and
            what follows is left to another call.

    Yields:
        `Probing` where a budget is in seconds, `Started`, then what `spairkit.training.loop.fit`
        yields, then `Finished`; the last alone for what was done before.

    Raises:
        InputError: as `spairkit.training.loop.fit`, or a run is not as the settings say.
    """
    runs = folder / "runs"
    runs.mkdir(exist_ok=True)
    for task in settings.tasks():
        if stop():
            return
        with suppress(Timeout), FileLock(runs / f".{task.name}.lock", timeout=0):
            if not (runs / task.name / "test.json").exists():
                yield from _work(settings, runs, task, device, stop)
        if (runs / task.name / "test.json").exists():
            yield Finished(task, measured_figures(runs / task.name))


def _work(
    settings: Settings, runs: Path, task: Task, device: torch.device, stop: Callable[[], bool]
) -> Iterator[Probing | Started | Step | Validation]:
    """Trains and measures one run, if nobody stops it."""
    with FileLock(runs / ".begin.lock"):
        measured = _needs_probe(settings, runs, task)
        steps = settings.budget_updates
        if measured:
            yield Probing(task)
            steps = _affordable(settings, task, device, stop)
            if stop():
                return
        run = _open_run(settings, runs, task, steps)
    yield Started(task, run.config.train.steps, measured)
    first, last = None, None
    with run.lock():
        for event in fit(run.config, run, device, stop):
            if isinstance(event, Step):
                first, last = first or event, event
            yield event
    if stop():
        return
    dataset = open_dataset(run.config.data, "test", device)
    report = evaluate(
        load(run.path, device),
        evaluation_batches(dataset, _BATCH_SIZE),
        measured_on=described(run.config.data, "test"),
    )
    values = {**report.to_json(), "steps": run.config.train.steps}
    if first is not None and last is not None:
        # of a run that was interrupted, as if all of it had been at this speed
        values["seconds"] = last.seconds * last.step / (last.step - first.step + 1)
    durable.write_text(run.path / "test.json", f"{json.dumps(values, indent=2)}\n")


def _needs_probe(settings: Settings, runs: Path, task: Task) -> bool:
    """Whether a run is the first of its kind, and its budget is in seconds."""
    return (
        settings.budget_seconds is not None
        and task.model != "conncomp"
        and not _begun(settings, runs, task)
    )


def _begun(settings: Settings, runs: Path, task: Task) -> list[Path]:
    """The runs that there are of a model and number of objects, whatever their seeds."""
    paths = [runs / replace(task, seed=seed).name for seed in range(settings.seeds)]
    return [path for path in paths if (path / "config.toml").exists()]


def _open_run(settings: Settings, runs: Path, task: Task, steps: int | None) -> Run:
    """The run of a task, begun or new; of a budget in seconds its siblings know the steps."""
    path = runs / task.name
    if (path / "config.toml").exists():
        run = Run.open(path)
        has_budget = settings.budget_updates or settings.budget_seconds
        expected = config_of(settings, task, run.config.train.steps if has_budget else None)
        other = differences(expected, run.config)
        if other:
            raise InputError(
                f"{path}: not the run that this spairkit would make: {'; '.join(other)}; name "
                "another --out"
            )
        return run
    if path.exists():  # a kill came before the config
        durable.remove_folder(path)
    begun = _begun(settings, runs, task)
    if steps is None and settings.budget_seconds is not None and begun:
        steps = Run.open(begun[0]).config.train.steps
    return Run.create(path, config_of(settings, task, steps))


def _affordable(
    settings: Settings, task: Task, device: torch.device, stop: Callable[[], bool]
) -> int:
    """Updates that a run can make in its time, validations counted, by the speed of a few.

    Where it is stopped, any number.
    """
    config = config_of(settings, task, _PROBE)
    train = replace(
        config.train, steps=_PROBE, validation_every=_PROBE // 2, training_wheels=0, patience=0
    )
    config = replace(config, train=train)
    moments = []  # after the first update and validation, which compile, and of what follows
    with TemporaryDirectory() as folder:
        run = Run.create(Path(folder) / "speed", config)
        with run.lock():
            for event in fit(config, run, device, stop):
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                moments.append((event, perf_counter()))
    if stop():
        return VALIDATIONS
    assert settings.budget_seconds is not None
    steps = [moment for event, moment in moments if isinstance(event, Step)][_PROBE // 2 :]
    update = (steps[-1] - steps[0]) / (len(steps) - 1)
    validation = moments[-1][1] - steps[-1]
    affordable = (settings.budget_seconds - VALIDATIONS * validation) / update
    return max(int(affordable), VALIDATIONS)
