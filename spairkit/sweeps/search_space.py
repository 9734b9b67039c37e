"""Search spaces: the settings that a sweep varies, each with its Optuna distribution."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, GridSampler, RandomSampler

from spairkit.config import Config
from spairkit.config_values import from_dict, load_toml, merge, to_dict
from spairkit.errors import InputError

Distribution = CategoricalDistribution | FloatDistribution | IntDistribution
Space = Mapping[str, Distribution]
"""A distribution for each dotted config key."""

_MAX_CHOICES = 1000  # per setting
_MAX_GRID = 100_000  # combinations that are drawn without replacement


def default_space(config: Config) -> Space:
    """The priors on position and size that the SPAIR paper's supplement searches.

    The size means are the logits of 0.05, 0.1, 0.2 and 0.4: shares of the anchor for SPAIR, of
    the image for AIR and DAIR.

    Raises:
        InputError: this kind of model has no default space.

    Source: docs/model.md 7, the grid for AIR and its counterpart for SPAIR.
    """
    kind = config.model.kind
    if kind not in _DEFAULTS:
        raise InputError(f"a model of kind {kind!r} has no default search space; pass --space")
    return parse(_DEFAULTS[kind], config, f"the search space of {kind}")


def load_space(path: Path, config: Config) -> Space:
    """The space in a TOML file: `key = [choices]` or `key = {low = a, high = b, log = true}`.

    Keys are dotted or nested in tables, as in a config file.

    Raises:
        InputError: the file cannot be used; the message lists every mistake.
    """
    if not path.is_file():
        raise InputError(f"--space {path}: no such file")
    return parse(load_toml(path), config, str(path))


def parse(tables: Mapping[str, Any], config: Config, source: str) -> Space:
    """The space that nested `tables` describe. Every value is validated against `config`.

    Raises:
        InputError: the tables are not a space; the message lists every mistake.
    """
    space: dict[str, Distribution] = {}
    mistakes = []
    for key, value in _flat(tables):
        try:
            space[key] = _distribution(key, value, config)
        except InputError as error:
            mistakes.append(str(error))
    if mistakes:
        raise InputError(f"{source}: {'; '.join(mistakes)}")
    if not space:
        raise InputError(f"{source}: empty; write for example model.beta = [1.0, 2.0]")
    return space


def plain(space: Space) -> dict[str, Any]:
    """The space as plain values by dotted key; `parse` reads them back."""
    return {
        key: list(map(decoded, setting.choices))
        if isinstance(setting, CategoricalDistribution)
        else {"low": setting.low, "high": setting.high, "log": setting.log}
        for key, setting in space.items()
    }


def grid_size(space: Space) -> int | None:
    """The number of combinations; None if it exceeds 100,000 or a setting has a range."""
    sizes = [len(s.choices) for s in space.values() if isinstance(s, CategoricalDistribution)]
    size = math.prod(sizes)
    return size if len(sizes) == len(space) and size <= _MAX_GRID else None


def sampler(space: Space, seed: int, number: int) -> BaseSampler:
    """The sampler for trial `number`: its draw depends on the seed and the number alone.

    So a sweep draws the same settings in one process or many, interrupted or not. If all settings
    are lists of choices, combinations come in random order without replacement.
    """
    is_grid = grid_size(space) is not None
    state = int(np.random.SeedSequence([seed, 0 if is_grid else number]).generate_state(1)[0])
    if not is_grid:
        return RandomSampler(state)
    choices = (s.choices for s in space.values() if isinstance(s, CategoricalDistribution))
    return GridSampler(dict(zip(space, choices, strict=True)), state)


def decoded(value: Any) -> Any:
    """The config value for an Optuna parameter: Optuna stores lists as JSON text."""
    return json.loads(value) if isinstance(value, str) and value.startswith("[") else value


def overridden(config: Config, values: Mapping[str, Any]) -> Config:
    """The config with the dotted keys of `values` set.

    Raises:
        InputError: the combination is invalid.
    """
    layers = []
    for key, value in values.items():
        for part in reversed(key.split(".")):
            value = {part: value}
        layers.append(value)
    return from_dict(merge(to_dict(config), *layers))


def as_word(key: str, value: Any) -> str:
    """`key=value`, in the form that `--set` reads."""
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


def _distribution(key: str, value: Any, config: Config) -> Distribution:
    if key in ("train.select", "model.kind") or not key.startswith(("model.", "train.")):
        raise InputError(f"{key}: not a model or train setting that leaves trials comparable")
    if isinstance(value, list):
        if not 1 <= len(value) <= _MAX_CHOICES or any(value.count(v) > 1 for v in value):
            raise InputError(f"{key}: must be 1 to {_MAX_CHOICES} different choices")
        _validate(config, key, value)
        return CategoricalDistribution([json.dumps(v) if isinstance(v, list) else v for v in value])
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
    _validate(config, key, [low, high])
    current: Any = config
    for part in key.split("."):
        current = getattr(current, part)
    if isinstance(current, int):
        return IntDistribution(int(low), int(high), log=log)
    return FloatDistribution(low, high, log=log)


def _validate(config: Config, key: str, values: list[Any]) -> None:
    mistakes = []
    for value in values:
        try:
            overridden(config, {key: value})
        except InputError as error:
            mistakes.append(str(error).removeprefix("config: "))
    if mistakes:
        raise InputError("; ".join(dict.fromkeys(mistakes)))


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
