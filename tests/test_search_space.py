"""Search spaces: the distribution of draws, and the validation of --space files."""

import math
from pathlib import Path
from statistics import median
from typing import Any

import optuna
import pytest

from spairkit.config import AIRConfig, Config
from spairkit.config_values import assignments, to_dict
from spairkit.errors import InputError
from spairkit.presets import resolve
from spairkit.sweeps import search_space
from spairkit.sweeps.search_space import (
    Space,
    as_word,
    decoded,
    default_space,
    grid_size,
    load_space,
    overridden,
    parse,
    plain,
    sampler,
)

QUICK = resolve("quick")


def space_of(**settings: Any) -> Space:
    return parse({"model": settings}, QUICK, "here")


def draw(space: Space, seed: int, numbers: range) -> list[dict[str, Any]]:
    """The settings of these trials, drawn as a sweep draws them."""
    study = optuna.create_study()
    found = []
    for number in range(numbers.stop):
        study.sampler = sampler(space, seed, number)
        params = study.ask(dict(space)).params
        if number in numbers:
            found.append({key: decoded(value) for key, value in params.items()})
    return found


def test_grid_is_sampled_without_replacement() -> None:
    space = space_of(what=[4, 8, 16], activation=["relu", "celu"], lateral=[True, False])
    assert grid_size(space) == 12
    draws = draw(space, 3, range(12))
    assert len({tuple(values.items()) for values in draws}) == 12
    assert draws == draw(space, 3, range(12))
    assert draws != draw(space, 4, range(12))


def test_ranges_are_sampled_uniformly() -> None:
    space = space_of(
        beta={"low": 0.1, "high": 10.0, "log": True},
        colour_scale={"low": 1, "high": 3},
        what={"low": 2, "high": 4},
        background=["black", "mode"],
    )
    assert grid_size(space) is None
    draws = draw(space, 0, range(400))
    for key, low, high, middle in (("beta", 0.1, 10, 1), ("colour_scale", 1, 3, 2)):
        values = [draw[f"model.{key}"] for draw in draws]
        assert low <= min(values) < max(values) <= high
        assert median(values) == pytest.approx(middle, rel=0.25)
        assert len(set(values)) > 390
    whole = [draw["model.what"] for draw in draws]
    for value in (2, 3, 4):
        assert whole.count(value) == pytest.approx(400 / 3, rel=0.3)
    assert {draw["model.background"] for draw in draws} == {"black", "mode"}
    assert draws[7] != draws[8]
    assert draws[7] == draw(space, 0, range(7, 8))[0]
    assert draws[7] != draw(space, 1, range(7, 8))[0]


@pytest.mark.parametrize(
    ("config", "size", "position"),
    [(Config(), "size", "position"), (Config(model=AIRConfig(kind="dair")), "scale", "shift")],
)
def test_default_space_is_the_grid_of_the_supplement(
    config: Config, size: str, position: str
) -> None:
    settings = plain(default_space(config))
    shares = [1 / (1 + math.exp(-mean)) for mean in settings[f"model.{size}_prior_mean"]]
    assert shares == pytest.approx([0.05, 0.1, 0.2, 0.4], rel=1e-4)
    assert settings[f"model.{size}_prior_std"] == [0.25, 0.5, 0.75, 1.0]
    assert settings[f"model.{position}_prior_std"] == [0.5, 1.0, 2.0]


def test_unknown_model_kind_has_no_default_space(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(search_space._DEFAULTS, "spair")
    with pytest.raises(InputError, match="kind 'spair' has no default search space"):
        default_space(Config())


def test_drawn_values_survive_set_options_and_config() -> None:
    space = space_of(
        encoder_hidden=[[8], [16, 8]], activation=["relu"], beta={"low": 1e-6, "high": 2e-6}
    )
    [values] = draw(space, 0, range(1, 2))
    words = assignments(as_word(key, value) for key, value in values.items())
    assert words["model"] == {key.partition(".")[2]: value for key, value in values.items()}
    changed = to_dict(overridden(QUICK, values))
    assert {key: changed["model"][key] for key in words["model"]} == words["model"]
    assert parse(plain(space), QUICK, "again") == space


def test_space_file_accepts_tables_and_dotted_keys(tmp_path: Path) -> None:
    file = tmp_path / "space.toml"
    file.write_text(
        'model.beta = [1.0, 2.0]\n"model.what" = {low = 2, high = 9}\n[train]\nseed = [0, 1]\n'
    )
    assert set(load_space(file, QUICK)) == {"model.beta", "model.what", "train.seed"}


def test_all_errors_are_reported_at_once(tmp_path: Path) -> None:
    file = tmp_path / "space.toml"
    file.write_text(
        "[data]\nmax_objects = [1, 2]\n"
        "[train]\nselect = ['ap']\nsteps = []\nseed = [1, 1]\nlearning_rate = [-1.0, 1e-3]\n"
        "[model]\nkind = ['air']\nwhta = [1]\nbeta = 3\nwhat = {low = 5, high = 2}\n"
        "hidden = {low = 1}\n"
        "anchor = {low = 0, high = 9, log = true}\nfeatures = {low = 0.5, high = 9}\n"
    )
    with pytest.raises(InputError) as caught:
        load_space(file, QUICK)
    message = str(caught.value)
    for part in (
        "data.max_objects: not a model or train setting",
        "train.select: not a model or train setting",
        "model.kind: not a model or train setting",
        "train.steps: must be 1 to 1000 different choices",
        "train.seed: must be 1 to 1000 different choices",
        "train.learning_rate: input should be greater than 0 (got -1.0)",
        "whta: unknown key, did you mean what?",
        "model.beta: must be a list of choices or {low = ..., high = ...}",
        "model.what: low must be less than high (got 5 and 2)",
        "model.hidden: must be {low = number, high = number",
        "model.anchor: low must be less than high and above 0 (got 0 and 9)",
        "model.features: ",
    ):
        assert part in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "empty; write for example"), ("= 3", "not TOML"), (None, "no such file")],
)
def test_unusable_space_file_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "space.toml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(InputError, match=message):
        load_space(file, QUICK)


def test_deep_keys_are_refused_unparsed(tmp_path: Path) -> None:
    path = tmp_path / "space.toml"
    path.write_text(".".join("a" * 100_000) + " = [1, 2]\n")
    with pytest.raises(InputError, match="nested more than 16 deep"):
        load_space(path, Config())
