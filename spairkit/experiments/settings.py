"""What a comparison compares: its settings, and the config of each of its runs."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked

from spairkit.config import Config, ConnCompConfig
from spairkit.config_values import merge, to_dict
from spairkit.errors import InputError
from spairkit.presets import resolve

MODELS = {"spair": "SPAIR", "air": "AIR", "dair": "DAIR", "conncomp": "ConnComp"}
"""What can be compared, and how it is written."""

TOLD = ("air", "dair")
"""Those that are told how many objects there are, unless `model.count` says otherwise."""

OBJECTS = (1, 3, 5, 7, 9)
"""Digits in every image, as in Fig. 2."""

VALIDATIONS = 10
"""Of a run with a budget."""

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}

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
