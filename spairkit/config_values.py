"""Reads a `Config` from nested values, TOML and `key=value` words, and writes it as TOML.

Precedence, ascending: defaults, preset, TOML file, words (see `presets.resolve`).
"""

import json
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import tomli_w
from pydantic import TypeAdapter, ValidationError

from spairkit.config import (
    Config,
    DataConfig,
    ModelConfig,
    PrepareConfig,
    SearchConfig,
    SPAIRConfig,
    TrainConfig,
)
from spairkit.errors import InputError

_SHORT_NUMBER = re.compile(r"[+-]?(\d+\.|\.\d+)([eE][+-]?\d+)?")  # not in TOML: .5 and 5.
_MAX_FILE_BYTES = 1 << 18  # more could take seconds
_MAX_DEPTH = 16  # parts of a key, and tables or lists inside each other
# strings, also such as never end, and comments of TOML; three quotes may be five at the end
_UNSTRUCTURED = re.compile(
    r'''"""(?:\\.|[^\\])*?(?:"{3,5}|\Z)|"(?:\\.|[^"\\\n])*+"?|#[^\n]*+'''
    r"""|'''.*?(?:'{3,5}|\Z)|'[^'\n]*+'?""",
    re.DOTALL,
)
_MAX_MISTAKES = 10  # that a message lists
_MAX_SHOWN = 80  # characters of a wrong key or value

_ADAPTER = TypeAdapter(Config)


def model_kinds() -> dict[str, Any]:
    """The values of `model.kind`, and the class of each."""
    return {
        word: model
        for model in get_args(ModelConfig)
        for word in get_args(get_type_hints(model)["kind"])
    }


def model_kind(values: Mapping[str, Any]) -> str | None:
    """`model.kind` in nested values; None if it is absent."""
    model = values.get("model")
    return str(model["kind"]) if isinstance(model, Mapping) and "kind" in model else None


def from_dict(values: Mapping[str, Any], source: str = "config") -> Config:
    """The `Config` of nested `values`; absent ones take their defaults.

    Raises:
        InputError: all mistakes at once: dotted key, allowed values, the value given.
    """
    values = merge({"model": {"kind": SPAIRConfig.kind}}, values)
    try:
        text = json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        near = error.object[max(error.start - 20, 0) : error.end]
        raise InputError(f"{source}: a value is not UTF-8 ({near}); choose another name") from None
    except (TypeError, RecursionError):
        raise InputError(
            f"{source}: only tables of numbers, strings and lists are allowed"
        ) from None
    try:
        return _ADAPTER.validate_json(text)
    except ValidationError as error:
        raise InputError(f"{source}: {_explain(error)}") from None


def to_dict(config: Config) -> dict[str, Any]:
    """Nested plain values; `from_dict` takes them back."""
    values: dict[str, Any] = _ADAPTER.dump_python(config, mode="json")
    return values


def to_toml(config: Config) -> str:
    """The config as TOML, with every key."""
    return tomli_w.dumps(to_dict(config))


def from_toml(text: str, source: str = "config") -> Config:
    """Reads the output of `to_toml`, or any part of it. Raises InputError."""
    return from_dict(_parse_toml(text, source), source)


def load_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file of at most 256 KB, nested at most 16 deep.

    Raises:
        InputError: it cannot be read, or is not TOML (the message has line and column).
    """
    try:
        if not path.is_file():
            raise InputError(
                f"{path}: no such config file; create one with `spairkit config copy FILE`"
            )
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise InputError(f"{path}: larger than 256 KB; this is not a config file")
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text; save the config as UTF-8") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    return _parse_toml(text, str(path))


def assignments(words: Iterable[str]) -> dict[str, Any]:
    """Nested values from `key=value` words: dotted keys, values as in TOML, `.5`, or bare strings.

    Raises:
        InputError: a word without `=`, or a key that is empty or set twice over a table.
    """
    values: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not all(key.strip().split(".")):
            raise InputError(f"--set {word[:200]}: write key=value, for example train.steps=2000")
        if key.count(".") >= _MAX_DEPTH:
            raise _too_deep("--set")
        values[key.strip()] = _value(text.strip())
    return nested(values)


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """`{"a.b": 1}` as `{"a": {"b": 1}}`.

    Raises:
        InputError: a key is a value and a table.
    """
    tables: dict[str, Any] = {}
    for key, value in values.items():
        *path, last = key.split(".")
        table = tables
        for part in path:
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                raise InputError(f"{_cut(key)}: {_cut(part)} is a value, not a table")
        table[last] = merge(table.get(last, {}), value) if isinstance(value, Mapping) else value
    return tables


def merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Nested tables merged key by key; a later one wins."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            under = merged.get(key)
            if isinstance(under, dict) and isinstance(value, Mapping):
                merged[key] = merge(under, value)
            else:
                merged[key] = value
    return merged


def differences(first: Config, second: Config) -> list[str]:
    """The dotted keys whose values differ, each as `key: a -> b`."""
    found: list[str] = []

    def walk(a: Any, b: Any, path: str) -> None:
        for field in fields(a):
            one, other = getattr(a, field.name), getattr(b, field.name)
            name = f"{path}{field.name}"
            if is_dataclass(one) and is_dataclass(other):
                kinds = [vars(value).get("kind") for value in (one, other)]
                if type(one) is type(other):
                    walk(one, other, f"{name}.")
                else:
                    found.append(f"{name}.kind: {kinds[0]!r} -> {kinds[1]!r}")
            elif one != other:
                found.append(f"{name}: {one!r} -> {other!r}")

    walk(first, second, "")
    return found


def _parse_toml(text: str, source: str) -> dict[str, Any]:
    _refuse_depth(text, source)
    try:
        return tomllib.loads(text)
    # a number with thousands of digits raises ValueError, too
    except (ValueError, RecursionError) as error:
        raise InputError(f"{source}: not TOML: {error}") from None


def _refuse_depth(text: str, source: str) -> None:
    """Refuses deep keys and nesting unparsed: time and memory grow with the square of the depth."""
    bare = _UNSTRUCTURED.sub('""', text)
    parts = 1 + max(piece.count(".") for piece in re.split(r"[=,\[\]{}\n]", bare))
    depth = deepest = 0
    for bracket in re.findall(r"[\[\]{}]", bare):
        depth = depth + 1 if bracket in "[{" else max(depth - 1, 0)
        deepest = max(deepest, depth)
    if max(parts, deepest) > _MAX_DEPTH:
        raise _too_deep(source)


def _too_deep(source: str) -> InputError:
    return InputError(f"{source}: keys or values are nested more than {_MAX_DEPTH} deep")


def _value(text: str) -> Any:
    if _SHORT_NUMBER.fullmatch(text):
        return float(text)
    line = f"value = {text}"
    if {"[", "{", "\n"} & set(text):
        _refuse_depth(line, "--set")
    try:
        return tomllib.loads(line)["value"]
    except (ValueError, RecursionError):
        return text


def _explain(error: ValidationError) -> str:
    """The mistakes on one line."""
    lines = []
    mistakes = error.errors(include_url=False)
    for item in mistakes[:_MAX_MISTAKES]:
        location = [str(part) for part in item["loc"]]
        if item["type"] == "union_tag_invalid":
            came = item["ctx"]["tag"]
            known = ", ".join(model_kinds())
            lines.append(f"model.kind: must be one of {known} (got {_cut(repr(came))})")
            continue
        kind = ""
        if location[:1] == ["model"] and len(location) > 1:
            kind = location.pop(1)  # pydantic's word for the member of the union
        key = _cut(".".join(location))
        if item["type"] == "unexpected_keyword_argument":
            lines.append(f"{key}: unknown key{_suggest(location, kind)}")
            continue
        reason = item["msg"].removeprefix("Value error, ")
        came = "" if isinstance(item["input"], dict) else f" (got {_cut(repr(item['input']))})"
        lines.append(f"{key and f'{key}: '}{reason[:1].lower()}{reason[1:]}{came}")
    more = len(mistakes) - _MAX_MISTAKES
    return "; ".join([*lines, *([f"and {more} more mistakes"] if more > 0 else [])])


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def _suggest(location: list[str], kind: str) -> str:
    """A hint at the key that was probably meant; `kind` is that of the model."""
    from difflib import get_close_matches

    tables: dict[str, Any] = {"": Config, "data": DataConfig, "train": TrainConfig}
    tables |= {"prepare": PrepareConfig, "search": SearchConfig}
    table = tables.get(".".join(location[:-1]), model_kinds().get(kind))
    names = [field.name for field in fields(table)] if table else []
    if len(location) == 1:  # a key of a table, without the table
        for name, other in [*tables.items(), ("model", model_kinds().get(kind or "spair"))]:
            if name and location[0] in (field.name for field in fields(other)):
                return f", did you mean {name}.{location[0]}?"
    close = get_close_matches(location[-1], names, n=1)
    return f", did you mean {close[0]}?" if close else ""
