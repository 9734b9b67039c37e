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
"""Those that are told how many objects there are, unless `model.count` says otherwise."""

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

    models: tuple[Model, ...]
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
        if not self.models:
            raise ValueError("models must name at least one")
        if self.budget_updates is not None and self.budget_seconds is not None:
            raise ValueError("a budget is in updates or in seconds, not both")
        common = {name: value for name, value in self.over.items() if name not in MODELS}
        self._check_over("", common)
        for model in self.over.keys() - common.keys():
            self._check_over(f"{model}.", self.over[model])

    def _check_over(self, scope: str, tables: Any) -> None:
        """Refuses what is no setting, and what the comparison sets itself."""
        taken = {"model.kind", "train.seed"}
        if self.objects:
            taken |= {"data.min_objects", "data.max_objects"}
        if self.budget_updates is not None or self.budget_seconds is not None:
            # not of connected components, whose steps are thresholds
            taken |= set() if scope == "conncomp." else {"train.steps", "train.validation_every"}
        for name, table in tables.items() if isinstance(tables, dict) else [("", tables)]:
            if name not in ("data", "model", "train") or not isinstance(table, dict):
                raise ValueError(f"--set {scope}{name}: write data., model. or train. and a key")
            if scope and name == "data":
                raise ValueError(f"--set {scope}data: all models see the same images")
            for key in table:
                if f"{name}.{key}" in taken:
                    raise ValueError(f"--set {scope}{name}.{key}: the comparison sets it itself")

    @property
    def budget(self) -> str:
        """The budget in words."""
        if self.budget_updates is not None:
            return f"{self.budget_updates} updates for each run that learns"
        if self.budget_seconds is not None:
            return f"{self.budget_seconds:g} s of training for each run that learns"
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
    """The overall ones, by name: see `FIGURES`."""


def settings_from(values: Mapping[str, Any], source: str) -> Settings:
    """Checked settings. Raises InputError with all mistakes on one line."""
    try:
        return _ADAPTER.validate_json(json.dumps(values))
    except ValidationError as error:
        mistakes = []
        for item in error.errors(include_url=False):
            place = ".".join(str(part) for part in item["loc"])
            came = f" (got {item['input']!r})" if isinstance(item["input"], int | str) else ""
            words = item["msg"].removeprefix("Value error, ")
            mistakes.append(f"{place}: {words}{came}" if place else words)
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
    remedy = "name another --out"
    return settings_from(_read(path, remedy), str(path)) if path.exists() else None


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
    bounds = ("min_objects", "max_objects")
    number = {} if task.objects is None else dict.fromkeys(bounds, task.objects)
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
        `Probing` where a budget is in seconds, `Started`, then what `spairkit.training.fit` yields,
        then `Finished`; the last alone for what was done before.

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
                moments.append((event, perf_counter()))
    if stop():
        return VALIDATIONS
    assert settings.budget_seconds is not None
    steps = [moment for event, moment in moments if isinstance(event, Step)][_PROBE // 2 :]
    update = (steps[-1] - steps[0]) / (len(steps) - 1)
    validation = moments[-1][1] - steps[-1]
    affordable = (settings.budget_seconds - VALIDATIONS * validation) / update
    return max(int(affordable), VALIDATIONS)


def measured_figures(run: Path) -> dict[str, float]:
    """The figures of a run by name, its `steps`, and its `seconds` where they were taken."""
    path = run / "test.json"
    remedy = "remove it to measure again"
    values = _read(path, remedy)
    try:
        numbers = {name: values["overall"][name] for name in FIGURES} | {"steps": values["steps"]}
        numbers |= {"seconds": values["seconds"]} if "seconds" in values else {}
    except (KeyError, TypeError):
        numbers = {}
    shares = ("ap", "ap_spair", "count_accuracy")
    fine = all(
        type(number) in (int, float) and 0 <= number <= (1 if name in shares else 1e12)
        for name, number in numbers.items()
    )
    if not numbers or not fine:
        raise InputError(f"{path}: not the figures of a run; {remedy}")
    return {name: float(number) for name, number in numbers.items()}


def _read(path: Path, remedy: str) -> Any:
    """A JSON document of a comparison; `remedy` says what to do where it is none."""
    try:
        if not path.is_file() or path.stat().st_size > _MAX_FILE_BYTES:
            raise InputError(f"{path}: not a file of a comparison; {remedy}")
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not JSON; {remedy}") from None
