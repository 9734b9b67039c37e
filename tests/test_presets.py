"""Presets resolve, and layers override them in the given order."""

from dataclasses import replace
from typing import Any

import pytest

from spairkit.config import AIRConfig, Config, ConnCompConfig
from spairkit.config_values import from_dict, from_toml, to_dict, to_toml
from spairkit.errors import InputError
from spairkit.presets import DEFAULT, names, resolve

KINDS = ("spair", "air", "dair", "conncomp")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("laptop", "spair"),
        ("quick", "watershed"),
        *((name, kind) for name in ("quick", "paper") for kind in KINDS),
    ],
)
def test_presets_round_trip_and_use_one_thread(name: str, kind: str) -> None:
    config = resolve(name, {"model": {"kind": kind}})
    assert config.preset == name
    assert config.model.kind == kind
    assert from_toml(to_toml(config)) == config
    assert config.train.threads == 1, "two threads spin on a busy machine"


def test_paper_preset_is_the_defaults_on_one_thread() -> None:
    paper = resolve("paper")
    assert replace(paper, train=replace(paper.train, threads=0)) == Config()


def test_quick_is_the_default() -> None:
    assert names()[0] == DEFAULT == "quick"


def test_unsupported_kind_is_reported_with_supported_ones() -> None:
    with pytest.raises(
        InputError, match="preset 'laptop' has no recipe for air; it supports: spair"
    ):
        resolve("laptop", {"model": {"kind": "air"}})


def test_components_of_folders_have_a_least_area_and_those_of_scenes_do_not() -> None:
    def least(**layers: Any) -> int:
        model = resolve("quick", {"model": {"kind": "conncomp"}}, layers).model
        assert isinstance(model, ConnCompConfig)
        return model.min_area

    folder = {"name": "folder", "path": "images"}
    assert least() == 1
    assert least(data=folder) == 12
    assert least(data=folder, model={"min_area": 3}) == 3


def test_later_layers_override_earlier_ones() -> None:
    config = resolve("quick", {"train": {"steps": 7, "seed": 1}}, {"train": {"steps": 9}})
    assert (config.train.steps, config.train.seed) == (9, 1)
    assert config.model == resolve("quick").model


def test_last_layer_with_a_kind_selects_the_recipe() -> None:
    config = resolve("quick", {"model": {"kind": "air"}}, {"train": {"steps": 7}})
    assert config.model.kind == "air"
    assert resolve("quick", to_dict(config)) == config, "a copied config resolves to itself"
    assert resolve("quick", {"model": {"kind": "air"}}, {"model": {"kind": "spair"}}) == resolve(
        "quick"
    )


def test_paper_preset_of_air_is_its_defaults() -> None:
    for kind in ("air", "dair"):
        model = resolve("paper", {"model": {"kind": kind}}).model
        assert model == from_dict({"model": {"kind": kind, "max_objects": 9}}).model


@pytest.mark.parametrize(
    ("kind", "objects", "prior"),
    [
        ("air", 1, (-2.944, 0.25, 2.0)),
        ("air", 3, (-1.386, 0.75, 0.5)),
        ("dair", 9, (-0.405, 0.25, 2.0)),
        ("air", 2, (-2.944, 0.75, 0.5)),
    ],
)
def test_paper_priors_depend_on_the_fixed_count(
    kind: str, objects: int, prior: tuple[float, float, float]
) -> None:
    data = {"min_objects": objects, "max_objects": objects}
    model = resolve("paper", {"model": {"kind": kind}, "data": data}).model
    assert isinstance(model, AIRConfig)
    assert (model.scale_prior_mean, model.scale_prior_std, model.shift_prior_std) == prior
    over = {"kind": kind, "scale_prior_std": 0.5}
    model = resolve("paper", {"model": over, "data": data}).model
    assert isinstance(model, AIRConfig)
    assert model.scale_prior_std == 0.5, "the user's value takes precedence"


def test_quick_expects_smaller_boxes_for_several_objects() -> None:
    def prior(**data: int) -> float:
        model = resolve("quick", {"model": {"kind": "air", "count": "given"}, "data": data}).model
        assert isinstance(model, AIRConfig)
        return model.scale_prior_mean

    assert prior(min_objects=1, max_objects=1) == -0.7
    assert prior(min_objects=3, max_objects=3) == -1.7
    inferred = resolve("quick", {"model": {"kind": "air"}, "data": {"max_objects": 5}}).model
    assert isinstance(inferred, AIRConfig)
    assert (inferred.scale_prior_mean, inferred.max_objects) == (-0.7, 5)


def test_unknown_kind_is_reported_with_the_known_ones() -> None:
    with pytest.raises(
        InputError,
        match=r"model\.kind: must be one of spair, air, dair, conncomp, watershed \(got 'yolo'\)",
    ):
        resolve("quick", {"model": {"kind": "yolo"}})


def test_unknown_preset_is_reported_with_the_known_ones() -> None:
    with pytest.raises(
        InputError, match="unknown preset 'fast'; choose from: quick, laptop, paper"
    ):
        resolve("fast")
