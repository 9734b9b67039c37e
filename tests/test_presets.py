"""Presets resolve, and layers lie over them in the order they are given."""

import pytest

from spairkit.config import Config, from_toml, to_toml
from spairkit.errors import InputError
from spairkit.presets import DEFAULT, names, resolve


@pytest.mark.parametrize("name", names())
def test_every_preset_is_a_config_that_survives_toml(name: str) -> None:
    config = resolve(name)
    assert config.preset == name
    assert from_toml(to_toml(config)) == config


def test_the_paper_preset_is_the_defaults() -> None:
    assert resolve("paper") == Config()


def test_quick_is_the_default() -> None:
    assert names()[0] == DEFAULT == "quick"


def test_later_layers_win_and_leave_the_rest() -> None:
    config = resolve("quick", {"train": {"steps": 7, "seed": 1}}, {"train": {"steps": 9}})
    assert (config.train.steps, config.train.seed) == (9, 1)
    assert config.model == resolve("quick").model


def test_an_unknown_preset_names_those_there_are() -> None:
    with pytest.raises(InputError, match="no preset 'fast'; there are: quick, paper"):
        resolve("fast")
