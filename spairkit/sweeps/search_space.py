"""What a sweep tries: for each setting of a config its choices or its range, and draws from them.

A draw is a function of the seed and its number, so that a sweep on many machines draws what one
machine would, and a trial that is lost can be repeated.
"""

import json
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from spairkit.config import Config
from spairkit.config_values import from_dict, load_toml, merge, to_dict
from spairkit.errors import InputError

_MAX_CHOICES = 1000  # of a setting
_MAX_GRID = 100_000  # combinations that are drawn without repeating one
_DIGITS = 6  # significant ones of a number from a range


@dataclass(frozen=True)
class Choices:
    """One of these; numbers, words, true, false or lists."""

    values: tuple[Any, ...]


@dataclass(frozen=True)
class Range:
    """A number from `low` to `high`, both included."""

    low: float
    high: float
    log: bool
    """Even over the logarithm."""
    whole: bool
    """Whole numbers only."""


@dataclass(frozen=True)
class Space:
    """Dotted config keys and what each may be."""

    settings: Mapping[str, Choices | Range]

    def draw(self, seed: int, number: int) -> dict[str, Any]:
        """The settings of trial `number`, from 0.

        Where there are only choices, none of their combinations comes again before all have
        come; the order is that of the seed. Otherwise every setting is drawn on its own.
        """
        choices = {k: s.values for k, s in self.settings.items() if isinstance(s, Choices)}
        grid = math.prod(len(values) for values in choices.values())
        if len(choices) == len(self.settings) and grid <= _MAX_GRID:
            order = list(range(grid))
            random.Random(f"{seed} {number // grid}").shuffle(order)
            place, found = order[number % grid], {}
            for key, values in choices.items():
                place, index = divmod(place, len(values))
                found[key] = values[index]
            return found
        return {
            key: _drawn(setting, random.Random(f"{seed} {number} {key}").random())
            for key, setting in self.settings.items()
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain values by dotted key; `parse` takes them back."""
        return {
            key: list(setting.values)
            if isinstance(setting, Choices)
            else {"low": setting.low, "high": setting.high, "log": setting.log}
            for key, setting in self.settings.items()
        }


def default_space(config: Config) -> Space:
    """The priors on where things are and how large: the supplement's random search.

    Mean sizes are the logits of .05, .1, .2 and .4, for SPAIR of the anchor, for AIR and DAIR of
    the image.

    Raises:
        InputError: there is none for this kind of model.

    Source: docs/model.md 7, the grid of AIR, and its analogs.
    """
    kind = config.model.kind
    if kind not in _DEFAULTS:
        raise InputError(f"a model of kind {kind!r} has no search space of its own; give --space")
    return parse(_DEFAULTS[kind], config, f"the search space of {kind}")


def load_space(path: Path, config: Config) -> Space:
    """The space in a TOML file: `key = [choices]` or `key = {low = a, high = b, log = true}`.

    Keys are dotted, or stand in tables, as in a config.

    Raises:
        InputError: every mistake at once.
    """
    if not path.is_file():
        raise InputError(f"--space {path}: no such file")
    return parse(load_toml(path), config, str(path))


def parse(tables: Mapping[str, Any], config: Config, source: str) -> Space:
    """The space that nested `tables` describe, every value tried on `config`.

    Raises:
        InputError: every mistake at once.
    """
    settings: dict[str, Choices | Range] = {}
    mistakes = []
    for key, value in _flat(tables):
        try:
            settings[key] = _setting(key, value, config)
        except InputError as error:
            mistakes.append(str(error))
    if mistakes:
        raise InputError(f"{source}: {'; '.join(mistakes)}")
    if not settings:
        raise InputError(f"{source}: empty; write for example model.beta = [1.0, 2.0]")
    return Space(settings)


def laid_over(config: Config, values: Mapping[str, Any]) -> Config:
    """The config with dotted `values` set.

    Raises:
        InputError: they do not go together.
    """
    layers = []
    for key, value in values.items():
        for part in reversed(key.split(".")):
            value = {part: value}
        layers.append(value)
    return from_dict(merge(to_dict(config), *layers))


def as_word(key: str, value: Any) -> str:
    """`key=value`, as `--set` takes it."""
    return f"{key}={value if isinstance(value, str) else json.dumps(value)}"


# docs/model.md 7: mu_s, sigma_s and sigma_sh
_SIZE_MEANS = [round(math.log(share / (1 - share)), 4) for share in (0.05, 0.1, 0.2, 0.4)]
_SIZE_STDS = [0.25, 0.5, 0.75, 1.0]
_POSITION_STDS = [0.5, 1.0, 2.0]
_AIR = {
    "model.scale_prior_mean": _SIZE_MEANS,
    "model.scale_prior_std": _SIZE_STDS,
    "model.shift_prior_std": _POSITION_STDS,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "spair": {
        "model.size_prior_mean": _SIZE_MEANS,
        "model.size_prior_std": _SIZE_STDS,
        "model.position_prior_std": _POSITION_STDS,
    },
    "air": _AIR,
    "dair": _AIR,
}


def _flat(tables: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tables.items():
        if isinstance(value, dict) and not value.keys() & {"low", "high"}:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _setting(key: str, value: Any, config: Config) -> Choices | Range:
    if key in ("train.select", "model.kind") or not key.startswith(("model.", "train.")):
        raise InputError(f"{key}: not a setting of model or train whose trials could be compared")
    if isinstance(value, list):
        if not 1 <= len(value) <= _MAX_CHOICES or any(value.count(v) > 1 for v in value):
            raise InputError(f"{key}: must be 1 to {_MAX_CHOICES} different choices")
        _try_on(config, key, value)
        return Choices(tuple(value))
    if not isinstance(value, dict):
        raise InputError(f"{key}: must be a list of choices or {{low = ..., high = ...}}")
    unknown = value.keys() - {"low", "high", "log"}
    low, high, log = value.get("low"), value.get("high"), value.get("log", False)
    if unknown or not _is_number(low) or not _is_number(high) or not isinstance(log, bool):
        raise InputError(f"{key}: must be {{low = number, high = number, log = true or false}}")
    if not low < high or (log and low <= 0):
        raise InputError(
            f"{key}: low must be less than high{' and above 0' if log else ''} "
            f"(got {low} and {high})"
        )
    _try_on(config, key, [low, high])
    now: Any = config
    for part in key.split("."):
        now = getattr(now, part)
    return Range(low, high, log, whole=isinstance(now, int))


def _try_on(config: Config, key: str, values: list[Any]) -> None:
    mistakes = []
    for value in values:
        try:
            laid_over(config, {key: value})
        except InputError as error:
            mistakes.append(str(error).removeprefix("config: "))
    if mistakes:
        raise InputError("; ".join(dict.fromkeys(mistakes)))


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _drawn(setting: Choices | Range, share: float) -> Any:
    """The value at `share`, in [0, 1), of the way through the setting."""
    if isinstance(setting, Choices):
        return setting.values[int(share * len(setting.values))]
    # a whole number stands for the stretch from half below to half above it
    margin = 0.5 if setting.whole else 0.0
    low, high = setting.low - margin, setting.high + margin
    if setting.log:
        value = math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
    else:
        value = low + share * (high - low)
    value = round(value) if setting.whole else float(f"{value:.{_DIGITS}g}")
    return min(max(value, setting.low), setting.high)
