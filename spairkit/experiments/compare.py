"""SPAIR, AIR, DAIR and ConnComp under one protocol: Fig. 2 of the paper, at any scale.

FOLDER/settings.json
FOLDER/runs/MODEL-OBJECTS-seed-N/     a run each; its test.json is written when it is measured
FOLDER/results.json, figure.png       when all are

A comparison that is interrupted goes on exactly: runs resume to the bit, and what is measured is
not measured again.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from math import isfinite
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Annotated, Any, Literal

import torch
from filelock import FileLock, Timeout
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked

from spairkit import durable
from spairkit.config import Config, ConnCompConfig, differences, merge, to_dict
from spairkit.data.datasets import described, evaluation_batches, open_dataset, open_splits
from spairkit.errors import InputError
from spairkit.evaluation import evaluate
from spairkit.models import load
from spairkit.presets import resolve
from spairkit.runs import Run
from spairkit.training import fit
from spairkit.validation import Step, Validation

MODELS = {"spair": "SPAIR", "air": "AIR", "dair": "DAIR", "conncomp": "ConnComp"}
"""What can be compared, and how it is written."""

TOLD = ("air", "dair")
"""Those that have to know how many objects there are, and are told it."""

OBJECTS = (1, 3, 5, 7, 9)
"""Digits in every image, as in Fig. 2."""

FIGURES = ("ap", "ap_spair", "count_accuracy", "count_error")
"""What is averaged over the seeds."""

VALIDATIONS = 10
"""Of a run with a budget."""

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}
_PROBE = 12  # updates whose speed is measured
_MAX_FILE_BYTES = 1 << 24
_BATCH_SIZE = 32

Model = Literal["spair", "air", "dair", "conncomp"]
Objects = Annotated[int, Field(ge=0, le=256)]


@checked(config=ConfigDict(extra="forbid", strict=True), frozen=True, kw_only=True)
class Settings:
    """What is compared; the same for as long as a comparison's folder is used."""

    models: Annotated[tuple[Model, ...], Field(min_length=1)]
    objects: tuple[Objects, ...]
    """Of every image, a row of the table each; none for images that are as they are."""
    seeds: Annotated[int, Field(ge=1, le=1000)]
    """Runs of each model and number of objects: their seeds are 0, 1, 2 ..."""
    preset: str
    budget_updates: Annotated[int, Field(ge=1, le=10**9)] | None = None
    """Updates of each run; None leaves them to the preset, or to `budget_seconds`."""
    budget_seconds: Annotated[float, Field(gt=0, le=1e9)] | None = None
    """Training time of each run."""
    data: dict[str, Any]
    """Laid over the preset's `data`."""
    over: dict[str, Any]
    """Laid over it all; under a model's name stands what holds for that model alone."""

    def __post_init__(self) -> None:
        for name in ("models", "objects"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name} must differ from each other, got {list(values)}")
        if self.budget_updates is not None and self.budget_seconds is not None:
            raise ValueError("a budget is in updates or in seconds, not both")

    @property
    def budget(self) -> str:
        """The budget in words."""
        if self.budget_updates is not None:
            return f"{self.budget_updates} updates for each run"
        if self.budget_seconds is not None:
            return f"{self.budget_seconds:g} s of training for each run"
        return f"the updates of the {self.preset} preset"

    def tasks(self) -> "list[Task]":
        """Every run, seed by seed, so that all of the table fills evenly."""
        return [
            Task(model, number, seed)
            for seed in range(self.seeds)
            for number in self.objects or (None,)
            for model in self.models
        ]


@dataclass(frozen=True)
class Task:
    """One run of a comparison."""

    model: str
    objects: int | None
    seed: int

    @property
    def name(self) -> str:
        """That of its folder."""
        number = "" if self.objects is None else f"-{self.objects}"
        return f"{self.model}{number}-seed-{self.seed}"


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
    """The overall ones, by name: see `FIGURES`."""


def settings_from(values: Mapping[str, Any], source: str) -> Settings:
    """Checked settings. Raises InputError with all mistakes on one line."""
    try:
        return _ADAPTER.validate_json(json.dumps(values))
    except ValidationError as error:
        mistakes = [
            f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']}".removeprefix(": ")
            for item in error.errors(include_url=False)
        ]
        raise InputError(f"{source}: {'; '.join(mistakes)}") from None


_ADAPTER = TypeAdapter(Settings)


def to_json(settings: Settings) -> dict[str, Any]:
    """Plain values; `settings_from` takes them back."""
    values: dict[str, Any] = _ADAPTER.dump_python(settings, mode="json")
    return values


def parse_budget(text: str) -> dict[str, Any]:
    """The settings that `2000` (updates), `90s`, `3m` or `1.5h` stands for.

    Raises:
        InputError: it is none of these.
    """
    number, unit = (text[:-1], text[-1:]) if text[-1:] in _UNITS else (text, "")
    try:
        value = float(number) * _UNITS[unit] if unit else int(number)
        if not 0 < value < 1e9:
            raise ValueError
    except ValueError:
        raise InputError(
            f"--budget {text}: write updates, as 2000, or time, as 90s, 3m or 1.5h"
        ) from None
    return {"budget_seconds": value} if unit else {"budget_updates": value}


def read_settings(folder: Path) -> Settings | None:
    """Those of the comparison in a folder; None where there is none.

    Raises:
        InputError: its settings cannot be used.
    """
    path = folder / "settings.json"
    return settings_from(_read(path), str(path)) if path.exists() else None


def begin(folder: Path, settings: Settings) -> None:
    """Makes the folder of a comparison, or finds that it is of the same one.

    Raises:
        InputError: it holds something else, or a comparison with other settings; the settings do
            not fit the data; or the system refuses.
    """
    before = read_settings(folder)
    if before is not None:
        other = [
            f"{field.name}: {getattr(before, field.name)!r} -> {getattr(settings, field.name)!r}"
            for field in fields(Settings)
            if getattr(before, field.name) != getattr(settings, field.name)
        ]
        if other:
            raise InputError(
                f"{folder}: a comparison keeps its settings, and these differ: {'; '.join(other)}; "
                "leave them out, or name another --out"
            )
        return
    for number in settings.objects or (None,):
        configs = [config_of(settings, Task(model, number, 0)) for model in settings.models]
        data = configs[0].data
        if not open_dataset(data, "test").has_truth:
            raise InputError(
                f"{data.path}: nothing to compare with: no annotations.json (COCO) in it"
            )
        for config in configs if data.name == "folder" else ():
            open_splits(config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise InputError(f"{folder}: not empty; name another folder with --out")
    except OSError as error:
        raise InputError(f"cannot make the folder {folder}: {error.strerror}") from error
    durable.write_text(folder / "settings.json", f"{json.dumps(to_json(settings), indent=2)}\n")


def config_of(settings: Settings, task: Task, steps: int | None = None) -> Config:
    """The config of a run: the preset's recipe for its model, on the same images as the others.

    AIR and DAIR are told the true counts, as in the paper. With `steps`, the learning rate of what
    learns falls over so many updates; where they are fewer than the recipe's, the prior on counts
    and the training wheels are hastened by the same factor, and where they are more, those stay
    as they are. ConnComp needs no budget.

    Raises:
        InputError: the settings do not fit each other.
    """
    common = {name: value for name, value in settings.over.items() if name not in MODELS}
    over = merge(common, settings.over.get(task.model, {}))
    number = {} if task.objects is None else {"min_objects": task.objects}
    number |= {} if task.objects is None else {"max_objects": task.objects}
    images = merge(settings.data, over.get("data", {}), number)
    model = {"kind": task.model, **({"count": "given"} if task.model in TOLD else {})}
    layers = [
        # that of SPAIR's recipe for every model
        {"data": to_dict(resolve(settings.preset, {"data": images}))["data"]},
        {"model": model, "train": {"seed": task.seed}},
        {name: value for name, value in over.items() if name != "data"},
    ]
    config = resolve(settings.preset, *layers)
    if steps is None or isinstance(config.model, ConnCompConfig):
        return config
    share = min(steps / config.train.steps, 1.0)
    train = {
        "steps": steps,
        "training_wheels": round(share * config.train.training_wheels),
        "validation_every": -(-steps // VALIDATIONS),
    }
    decay = {"odds_decay": max(share * config.model.odds_decay, 1.0)}
    return resolve(settings.preset, *layers, {"train": train, "model": decay})


def compare(
    settings: Settings,
    folder: Path,
    device: torch.device,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[Started | Step | Validation | Finished]:
    """Trains and measures, one run after another, what nobody has done or is doing.

    Several processes can do this in one folder: what another one has locked is passed over.

    Args:
        settings: the folder's, after `begin`.
        folder: of the comparison.
        device: where models and scenes live.
        stop: asked after every update; when it says yes the run that is going on is saved, and
            what follows is left to another call.

    Yields:
        `Started`, then what `spairkit.training.fit` yields, then `Finished`; the last alone for
        what was done before.

    Raises:
        InputError: as `spairkit.training.fit`, or a run is not as the settings say.
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


def is_finished(settings: Settings, folder: Path) -> bool:
    """Whether every run is measured."""
    return all((folder / "runs" / task.name / "test.json").exists() for task in settings.tasks())


def _work(
    settings: Settings, runs: Path, task: Task, device: torch.device, stop: Callable[[], bool]
) -> Iterator[Started | Step | Validation]:
    """Trains and measures one run, if nobody stops it."""
    with FileLock(runs / ".begin.lock"):
        run, measured = _open_run(settings, runs, task, device)
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


def _open_run(settings: Settings, runs: Path, task: Task, device: torch.device) -> tuple[Run, bool]:
    """The run of a task, new or begun, and whether its speed was measured for it."""
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
        return run, False
    if path.exists():  # a kill came before the config
        durable.remove_folder(path)
    steps, measured = settings.budget_updates, False
    if settings.budget_seconds is not None and task.model != "conncomp":
        siblings = [runs / replace(task, seed=seed).name for seed in range(settings.seeds)]
        begun = [sibling for sibling in siblings if (sibling / "config.toml").exists()]
        if begun:
            steps = Run.open(begun[0]).config.train.steps
        else:
            config = config_of(settings, task, _PROBE)
            steps, measured = _affordable(config, settings.budget_seconds, device), True
    return Run.create(path, config_of(settings, task, steps)), measured


def _affordable(config: Config, seconds: float, device: torch.device) -> int:
    """Updates that a run can make in a time, its validations counted, by the speed of a few."""
    train = replace(
        config.train, steps=_PROBE, validation_every=_PROBE // 2, training_wheels=0, patience=0
    )
    config = replace(config, train=train)
    moments = []  # after the first update and validation, which compile, and of what follows
    with TemporaryDirectory() as folder:
        run = Run.create(Path(folder) / "speed", config)
        with run.lock():
            for event in fit(config, run, device):
                moments.append((event, perf_counter()))
    steps = [moment for event, moment in moments if isinstance(event, Step)][_PROBE // 2 :]
    update = (steps[-1] - steps[0]) / (len(steps) - 1)
    validation = moments[-1][1] - steps[-1]
    return max(int((seconds - VALIDATIONS * validation) / update), VALIDATIONS)


def measured_figures(run: Path) -> dict[str, float]:
    """The figures of a run by name, its `steps`, and its `seconds` where they were taken."""
    path = run / "test.json"
    values = _read(path)
    try:
        figures = {name: float(values["overall"][name]) for name in FIGURES}
        figures["steps"] = int(values["steps"])
        if "seconds" in values:
            figures["seconds"] = float(values["seconds"])
    except (KeyError, TypeError, ValueError):
        figures = {}
    if not figures or not all(map(isfinite, figures.values())):
        raise InputError(f"{path}: not the figures of a run; remove it to measure again")
    return figures


def _read(path: Path) -> Any:
    """A JSON document of a comparison."""
    try:
        if not path.is_file() or path.stat().st_size > _MAX_FILE_BYTES:
            raise InputError(f"{path}: not a file of a comparison; remove it")
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not JSON; remove it") from None
