"""Settings of a comparison, its folder, and the config of each of its runs."""

import json
import math
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked

from spairkit.config import ClassicalConfig, Config
from spairkit.config_values import merge, model_kinds, to_dict
from spairkit.data.datasets import open_dataset, open_splits
from spairkit.data.folder import ImageFolder
from spairkit.errors import InputError
from spairkit.experiments.shared_runs import note_data, read_json, refuse_other_data
from spairkit.names import is_utf8
from spairkit.presets import DEFAULT, resolve
from spairkit.storage import durable
from spairkit.storage.runs import DATA, LINKS, new_folder
from spairkit.survey import look, preparation

MODELS = {
    "spair": "SPAIR",
    "air": "AIR",
    "dair": "DAIR",
    "conncomp": "ConnComp",
    "watershed": "Watershed",
}
"""Display names of the models."""

WITHOUT_WEIGHTS = ("watershed", "conncomp")
"""Models that are not trained, so that seeds and budgets do not concern them."""

Model = Literal["spair", "air", "dair", "conncomp", "watershed"]

_GIVEN_COUNTS = ("air", "dair")
_VALIDATIONS = 10  # of a run with a budget
_SECONDS = {"s": 1, "m": 60, "h": 3600}


@checked(config=ConfigDict(extra="forbid", strict=True), frozen=True, kw_only=True)
class Settings:
    """Settings of a comparison, fixed when its folder is created."""

    models: tuple[Model, ...] = ("spair", "air", "dair", "conncomp")
    objects: tuple[Annotated[int, Field(ge=0, le=256)], ...] = (1, 3, 5, 7, 9)  # as in Fig. 2
    """Numbers of objects per image, one table row each; empty for a folder of images."""
    seeds: Annotated[int, Field(ge=1, le=1000)] = 3
    """Runs per model and row, with seeds 0, 1, 2 ..."""
    preset: str = DEFAULT
    budget: str | None = None
    """Updates (`2000`) or training time (`90s`, `3m`, `1.5h`) per run; None for the preset's."""
    measured: dict[str, Any] = Field(default_factory=dict)
    """Config values that a look at a folder gave, between the preset and `over`."""
    over: dict[str, Any] = Field(default_factory=dict)
    """Config values laid over the preset; a table named after a model is for that model only."""

    def __post_init__(self) -> None:
        for name in ("models", "objects"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name} must differ from each other, got {list(values)}")
        if not self.models:
            raise ValueError("models must name at least one model")
        parse_budget(self.budget)
        self._check("", {key: value for key, value in self.over.items() if key not in MODELS})
        for model in self.over.keys() & MODELS.keys():
            self._check(f"{model}.", self.over[model])

    def _check(self, scope: str, tables: Any) -> None:
        """Refuses keys that are not settings, and settings that the comparison controls."""
        taken = {"model.kind", "train.seed"}
        if self.objects:
            taken |= {"data.min_objects", "data.max_objects"}
        if (
            self.budget is not None and scope.rstrip(".") not in WITHOUT_WEIGHTS
        ):  # its steps are thresholds
            taken |= {"train.steps", "train.validation_every"}
        for name, table in tables.items() if isinstance(tables, dict) else [("", tables)]:
            if name == "search" and scope != "spair.":
                raise ValueError(f"--set {scope}search: only SPAIR searches; set spair.search.")
            known = ("data", "prepare", "model", "search", "train")
            if name not in known or not isinstance(table, dict):
                raise ValueError(
                    f"--set {scope}{name}: write a key in data., prepare., model. or train."
                )
            if scope and name in ("data", "prepare"):
                raise ValueError(f"--set {scope}{name}: all models use the same images")
            if found := sorted(key for key in table if f"{name}.{key}" in taken):
                raise ValueError(f"--set {scope}{name}.{found[0]}: set by the comparison itself")

    def described_budget(self) -> str:
        """The budget in words."""
        updates, seconds = parse_budget(self.budget)
        if seconds is not None:
            return f"{seconds:g} s of training per neural model"
        if updates is not None:
            return f"{updates} updates per neural model"
        return f"updates of the {self.preset} preset"

    @property
    def is_folder(self) -> bool:
        """Whether the images are those of a folder; models without weights have one run there."""
        return bool(self.over.get("data", {}).get("name") == "folder")

    def tasks(self) -> "list[Task]":
        """All runs, ordered by seed so that every cell of the table fills evenly."""
        return [
            Task(model, objects, seed)
            for seed in range(self.seeds)
            for objects in self.objects or (None,)
            for model in self.models
            if not (seed and self.is_folder and model in WITHOUT_WEIGHTS)
        ]


@dataclass(frozen=True)
class Task:
    """One run of a comparison."""

    model: str
    objects: int | None
    """Objects per image; None for a folder of images."""
    seed: int

    @property
    def group(self) -> str:
        """A name that runs share if they differ in the seed only."""
        return self.model if self.objects is None else f"{self.model}-{self.objects}"

    @property
    def name(self) -> str:
        """The name of the run folder."""
        return f"{self.group}-seed-{self.seed}"


def open_comparison(
    out: Path | None,
    asked: Mapping[str, Any],
    on_survey: Callable[[list[str]], None] = lambda lines: None,
) -> tuple[Path, Settings]:
    """The comparison in the folder `out`, or a new one there or in `runs/compare-N`.

    A new one on a folder of images looks at them first. The images of an existing one may have
    moved.

    Args:
        out: an existing comparison or a new folder.
        asked: requested settings; the others take their defaults.
        on_survey: called with what the look found, and with its doubts; a line each.

    Raises:
        InputError: the settings are invalid, differ from those of the existing comparison, or do
            not fit the data; other images than those of the existing comparison are asked for; or
            the folder cannot be used.
    """
    if out is not None and (path := out / "settings.json").exists():
        durable.refuse_links(out, LINKS)
        saved = _parse(read_json(path, "pass another --out"), str(path))
        found = _moved(saved, asked)
        if found != saved:
            refuse_other_data(out, config_of(found, found.tasks()[0]).data)
        before = _plain(found)
        after = _plain(_parse(merge(before, asked), "compare"))
        if changes := [f"{k}: {before[k]} -> {after[k]}" for k in before if before[k] != after[k]]:
            raise InputError(
                f"{out}: the settings of a comparison are fixed, and these differ: "
                f"{'; '.join(changes)}; omit them, or pass another --out"
            )
        if found != saved:
            _write(out, found)
        return out, found
    settings = _parse(asked, "compare")
    if settings.over.get("data", {}).get("name") == "folder":
        if "objects" in asked:
            raise InputError("--objects: a folder of images has a fixed number of objects; omit it")
        fixed = {"models": ["spair", "watershed", "conncomp"], "objects": [], **asked}
        settings = _parse(fixed, "compare")
        # a preparation may need the contrast that is measured
        config = resolve(settings.preset, {"data": settings.over["data"]})
        dataset = open_dataset(config.data, "test")
        assert isinstance(dataset, ImageFolder)
        chosen = preparation(settings.over)
        survey = look([path for path, _ in dataset.files()], chosen=chosen)
        bare = replace(settings, over={k: v for k, v in settings.over.items() if k != "prepare"})
        first = "spair" if "spair" in settings.models else settings.models[0]
        model = config_of(bare, Task(first, None, 0)).model
        measured = survey.settings(model, settings.over)
        settings = _parse({**fixed, "measured": measured}, "compare")
        prepare = config_of(settings, Task(first, None, 0)).prepare
        on_survey(survey.lines(prepare, chosen) + survey.doubts())
    for objects in settings.objects or (None,):
        configs = [config_of(settings, Task(model, objects, 0)) for model in settings.models]
        open_dataset(configs[0].data, "test")
        for config in configs if settings.is_folder else ():
            open_splits(config)
    folder = new_folder(out, "compare", {DATA})
    note_data(folder, config_of(settings, settings.tasks()[0]).data)
    _write(folder, settings)
    return folder, settings


def _moved(settings: Settings, asked: Mapping[str, Any]) -> Settings:
    """The settings with the place of the images that is asked for, which may change."""
    before, after = (over.get("data", {}) for over in (settings.over, asked.get("over", {})))
    if "path" not in after or after.get("name", before.get("name")) != before.get("name"):
        return settings
    return replace(settings, over=merge(settings.over, {"data": {"path": after["path"]}}))


def _write(folder: Path, settings: Settings) -> None:
    durable.write_text(folder / "settings.json", f"{json.dumps(_plain(settings), indent=2)}\n")


def config_of(settings: Settings, task: Task, steps: int | None = None) -> Config:
    """The config of a run: the preset's recipe for its model, on the same images for all models.

    A setting of the models applies to those that have it. AIR and DAIR are given the true counts,
    as in the paper. `steps` replaces the recipe's number of updates, except for models without
    weights. Fewer steps shorten the count prior's schedule and the training wheels by the same
    factor.

    Raises:
        InputError: the settings are invalid together.
    """
    common = {key: value for key, value in settings.over.items() if key not in MODELS}
    kinds = model_kinds()
    known: dict[str, set[str]] = {
        name: {field.name for field in fields(kinds[name])} for name in settings.models
    }
    if "model" in common:
        # a setting that no model has is kept, and refused when the config is resolved
        unknown = common["model"].keys() - set().union(*known.values())
        common["model"] = _only(common["model"], known[task.model] | unknown)
    measured = _only(
        settings.measured, {"prepare", *(("model", "search") if task.model == "spair" else ())}
    )
    over = merge(common, settings.over.get(task.model, {}))
    bounds = ("min_objects", "max_objects")
    count = {} if task.objects is None else dict.fromkeys(bounds, task.objects)
    images = {"data": merge(over.pop("data", {}), count)}
    model = {"kind": task.model, **({"count": "given"} if task.model in _GIVEN_COUNTS else {})}
    layers = [
        {"data": to_dict(resolve(settings.preset, images))["data"]},  # of SPAIR's recipe, for all
        measured,
        {"model": model, "train": {"seed": task.seed}},
        over,
    ]
    config = resolve(settings.preset, *layers)
    if steps is None or isinstance(config.model, ClassicalConfig):
        return config
    share = min(steps / config.train.steps, 1.0)
    train = {
        "steps": steps,
        "training_wheels": round(share * config.train.training_wheels),
        "validation_every": -(-steps // _VALIDATIONS),
    }
    decay = {"odds_decay": max(share * config.model.odds_decay, 1.0)}
    return resolve(settings.preset, *layers, {"train": train, "model": decay})


def _only(values: Mapping[str, Any], names: Set[str]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key in names}


_ADAPTER = TypeAdapter(Settings)


def _plain(settings: Settings) -> dict[str, Any]:
    values: dict[str, Any] = _ADAPTER.dump_python(settings, mode="json")
    return values


def _parse(values: Any, source: str) -> Settings:
    if not is_utf8(json.dumps(values, ensure_ascii=False)):
        raise InputError(f"{source}: a setting is not UTF-8; choose another name")
    try:
        return _ADAPTER.validate_json(json.dumps(values))
    except ValidationError as error:
        mistakes = []
        for item in error.errors(include_url=False):
            place = ".".join(str(part) for part in item["loc"])
            got = f" (got {item['input']!r})" if isinstance(item["input"], int | str) else ""
            text = item["msg"].removeprefix("Value error, ")
            mistakes.append(f"{place}: {text}{got}" if place else text)
        raise InputError(f"{source}: {'; '.join(mistakes)}") from None


def parse_budget(budget: str | None) -> tuple[int | None, float | None]:
    """A budget as updates or as seconds; both None for the preset's updates.

    Raises:
        ValueError: it is neither.
    """
    if budget is None:
        return None, None
    seconds = _SECONDS.get(budget[-1:])
    try:
        number = int(budget) if seconds is None else float(budget[:-1]) * seconds
    except ValueError:
        number = math.nan
    if not 0 < number < 1e9:
        raise ValueError(f"--budget {budget}: write updates, as 2000, or time, as 90s, 3m or 1.5h")
    return (int(number), None) if seconds is None else (None, number)
