"""Configs: bounds of every value, and constraints between values."""

from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import pytest

from spairkit.config import AIRConfig, Config, SPAIRConfig
from spairkit.config_values import from_dict
from spairkit.errors import InputError


def refusal(values: Any) -> str:
    with pytest.raises(InputError) as caught:
        from_dict(values)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("batch_size", True),
        ("batch_size", 1.5),
        ("batch_size", "32"),
        ("batch_size", 10**26),
        ("batch_size", None),
        ("batch_size", [32]),
        ("learning_rate", float("nan")),
        ("learning_rate", float("inf")),
        ("learning_rate", True),
        ("select", "luck"),
        ("seed", -1),
        ("threads", {}),
    ],
)
def test_wrong_types_are_refused_not_converted(key: str, value: Any) -> None:
    assert f"train.{key}: " in refusal({"train": {key: value}})


def test_every_number_has_bounds() -> None:
    def numbers(config: Any, path: tuple[str, ...]) -> list[tuple[tuple[str, ...], Any]]:
        found: list[tuple[tuple[str, ...], Any]] = []
        for field in fields(config):
            value = getattr(config, field.name)
            if is_dataclass(value):
                found += numbers(value, (*path, field.name))
            elif isinstance(value, int | float) and not isinstance(value, bool):
                found.append(((*path, field.name), value))
        return found

    everything = numbers(Config(), ()) + numbers(AIRConfig(), ("model",))
    assert len(everything) > 60
    for path, value in everything:
        air = path[0] == "model" and hasattr(AIRConfig(), path[1])
        for extreme in (10**30, -(10**30)):
            nested: Any = float(extreme) if isinstance(value, float) else extreme
            for name in reversed(path):
                nested = {name: nested}
            if air:
                nested["model"]["kind"] = "air"
            assert ".".join(path) in refusal(nested)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"min_objects": 5, "max_objects": 4}, "min_objects (5) must not exceed max_objects (4)"),
        ({"image_height": 10}, "a glyph of 14 px does not fit an image of 10x48 px"),
        ({"glyph_size": 8, "glyph_jitter": 8}, "glyph_jitter (8) must be less than glyph_size (8)"),
        ({"name": "folder"}, "name = 'folder' needs path, the folder of images"),
    ],
)
def test_contradictory_values_are_refused(data: dict[str, Any], message: str) -> None:
    assert f"data: {message}" in refusal({"data": data})


def test_black_must_be_less_than_white() -> None:
    message = refusal({"prepare": {"black": 0.5, "white": 0.5}})
    assert "prepare: black (0.5) must be less than white (0.5)" in message


@pytest.mark.parametrize(
    ("name", "largest", "beyond"),
    [("prepare.white", 1.0, 1.1), ("model.box_contrast", 0.99, 1.0)],
)
def test_fractions_stay_within_their_bounds(name: str, largest: float, beyond: float) -> None:
    part, key = name.split(".")
    assert getattr(getattr(from_dict({part: {key: largest}}), part), key) == largest
    for value in (beyond, -0.01):
        assert name in refusal({part: {key: value}})


@pytest.mark.parametrize("name", ["odds_start", "odds_end"])
def test_count_prior_is_never_certain(name: str) -> None:
    for extreme in (1e-6, 1e9):
        odds = getattr(from_dict({"model": {name: extreme}}).model, name)
        assert 0 < float(np.float32(1 / (1 + odds))) < 1
    for beyond in (1e-7, 1e10):
        assert f"model.{name}" in refusal({"model": {name: beyond}})


def test_strides_are_the_prime_factors_of_the_cell() -> None:
    assert SPAIRConfig(cell=12).strides == (2, 2, 3)
    for cell in range(2, 65):
        strides = SPAIRConfig(cell=cell).strides
        product = 1
        for stride in strides:
            assert all(stride % divisor for divisor in range(2, stride)), "prime"
            product *= stride
        assert product == cell
        assert list(strides) == sorted(strides)
