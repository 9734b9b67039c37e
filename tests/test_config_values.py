"""Configs: TOML round trips, precedence of layers, and one-line error messages."""

import random
import tomllib
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spairkit import presets
from spairkit.config import (
    AIRConfig,
    Config,
    ConnCompConfig,
    DataConfig,
    PrepareConfig,
    SearchConfig,
    SPAIRConfig,
    TrainConfig,
    WatershedConfig,
)
from spairkit.config_values import (
    assignments,
    differences,
    from_dict,
    from_toml,
    load_toml,
    merge,
    model_kinds,
    nested,
    to_toml,
)
from spairkit.errors import InputError


def refusal(values: Any) -> str:
    with pytest.raises(InputError) as caught:
        from_dict(values)
    message = str(caught.value)
    assert "\n" not in message
    return message


@settings(max_examples=50, derandomize=True, deadline=None)
@given(
    learning_rate=st.floats(1e-9, 1.0),
    steps=st.integers(1, 10**9),
    widths=st.lists(st.integers(1, 4096), min_size=1, max_size=8),
    size_bias=st.floats(-1e3, 1e3),
    path=st.text(st.characters(codec="utf-8"), max_size=40),
)
def test_toml_round_trip_is_exact(
    learning_rate: float, steps: int, widths: list[int], size_bias: float, path: str
) -> None:
    config = Config(
        data=DataConfig(path=path),
        model=SPAIRConfig(backbone_channels=tuple(widths), size_bias=size_bias),
        train=TrainConfig(learning_rate=learning_rate, steps=steps),
    )
    assert from_toml(to_toml(config)) == config


def test_missing_values_take_their_defaults() -> None:
    assert from_dict({}) == Config()
    assert from_dict({"train": {"steps": 7}}) == Config(train=TrainConfig(steps=7))
    assert from_dict({"train": {"learning_rate": 1}}).train.learning_rate == 1.0


def test_all_errors_are_reported_at_once() -> None:
    message = refusal(
        {
            "train": {"learning_rate": -1, "batchsize": 3, "steps": "many"},
            "model": {"position_prior_std": 0},
            "extra": {},
        }
    )
    for part in (
        "train.learning_rate: input should be greater than 0 (got -1)",
        "train.batchsize: unknown key, did you mean batch_size?",
        "train.steps: input should be a valid integer (got 'many')",
        "model.position_prior_std: input should be greater than 0 (got 0)",
        "extra: unknown key",
    ):
        assert part in message


def test_numbers_with_thousands_of_digits_are_refused() -> None:
    digits = "1" * 5000
    assert "train.steps" in refusal(assignments([f"train.steps={digits}"]))
    with pytest.raises(InputError, match="config: not TOML"):
        from_toml(f"train.steps = {digits}")


def test_assignments_read_toml_values_and_bare_words() -> None:
    words = ["train.steps=20", "train.select=ap", "data.path=a=b c", " model.lateral = false"]
    assert assignments(words) == {
        "train": {"steps": 20, "select": "ap"},
        "data": {"path": "a=b c"},
        "model": {"lateral": False},
    }
    short = {"a.b": ".5", "a.c": "-.25e1", "a.d": "5.", "a.e": "1.5.", "a.f": "."}
    read = assignments([f"{key}={text}" for key, text in short.items()])
    assert read == {"a": {"b": 0.5, "c": -2.5, "d": 5.0, "e": "1.5.", "f": "."}}
    assert assignments(["model.encoder_hidden=[64, 32]"])["model"]["encoder_hidden"] == [64, 32]
    for wrong in ("steps", "=3", "train.=3", ".=", ""):
        with pytest.raises(InputError, match="write key=value"):
            assignments([wrong])
    with pytest.raises(InputError, match=r"train\.steps: train is a value, not a table"):
        assignments(["train=3", "train.steps=4"])


def test_later_layers_override_single_keys() -> None:
    below = {"a": {"x": 1, "y": 2}, "b": 3}
    assert merge(below, {"a": {"y": 5}}, {"b": {"z": 6}}) == {"a": {"x": 1, "y": 5}, "b": {"z": 6}}
    assert merge() == {}
    assert below == {"a": {"x": 1, "y": 2}, "b": 3}, "arguments are unchanged"
    assert (
        presets.resolve("paper", {"train": {"steps": 5}}, {"train": {"steps": 6}}).train.steps == 6
    )


def test_kind_selects_the_model() -> None:
    assert isinstance(from_dict({"model": {"cell": 8}}).model, SPAIRConfig), "SPAIR is the default"
    assert {kind: type(from_dict({"model": {"kind": kind}}).model) for kind in model_kinds()} == {
        "spair": SPAIRConfig,
        "air": AIRConfig,
        "dair": AIRConfig,
        "conncomp": ConnCompConfig,
        "watershed": WatershedConfig,
    }
    for kind in model_kinds():
        config = from_dict({"model": {"kind": kind}})
        assert from_toml(to_toml(config)) == config
    wrong: Any
    for wrong in ("airy", 3, None, []):
        message = refusal({"model": {"kind": wrong}})
        assert (
            f"model.kind: must be one of spair, air, dair, conncomp, watershed (got '{wrong}')"
            in message
        )
    message = refusal({"model": {"kind": "air", "whats": 3, "cell": 4}})
    assert "model.whats: unknown key, did you mean what?; model.cell: unknown key" in message
    assert "model: input should be an object (got 3)" in refusal({"model": 3})


def test_another_kind_of_model_is_one_difference() -> None:
    assert differences(Config(), Config(model=AIRConfig(kind="dair"))) == [
        "model.kind: 'spair' -> 'dair'"
    ]


def test_differences_list_keys_with_both_values() -> None:
    first = Config()
    assert differences(first, Config()) == []
    second = Config(preset="mine", train=TrainConfig(steps=5))
    assert differences(first, second) == ["preset: 'paper' -> 'mine'", "train.steps: 300000 -> 5"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"steps = \na = 1", r"not TOML: .*line 1"),
        (b"a = 1\na = 2\n", r"not TOML: .*line 2"),
        (b"a = " + b"[" * 5000, "nested more than 16 deep"),
        ("name = 'né'".encode("latin-1"), "not UTF-8 text"),
        (b"#" * ((1 << 18) + 1), "larger than 256 KB"),
        (b"\x00", "not TOML"),
    ],
    ids=["incomplete", "duplicate key", "nested", "Latin-1", "large", "NUL"],
)
def test_invalid_config_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "config.toml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        load_toml(path)
    assert str(path) in str(caught.value)
    with pytest.raises(InputError, match="no such config file"):
        load_toml(tmp_path)


def test_deep_keys_and_values_are_refused_unparsed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parser takes time and memory that grow with the square of a key's parts."""
    monkeypatch.setattr(tomllib, "loads", lambda _: pytest.fail("parsed"))
    many = 100_000
    key = ".".join("a" * many)
    for text in (
        f"{key} = 1",
        f"x = {{{key} = 1}}",
        f"[{key}]",
        f"[[{key}]]",
        ".".join(['"="'] * many) + " = 1",
        ".".join(["'['"] * many) + " = 1",
        "x = " + "[" * many,
        "x = " + "{a=" * many,
        "x = " + '[["]]", ' * many,
        "x = " + "[[']]', " * many,
        'x = ["""y"""", ' + "[" * many + ', "z"]',
        "x = ['''y'''', " + "[" * many + ", 'z']",
        "x = [ # ]\n" * many,
        'x = "a\\"]", ' + "[" * many,
    ):
        with pytest.raises(InputError, match="config: keys or values are nested more than 16 deep"):
            from_toml(text)
    for word in (f"{key}=1", f'"{key}"=1', f"x={'[' * many}", f"x={{{key}=1}}", f"x=1\n{key}=2"):
        with pytest.raises(InputError, match="--set: keys or values are nested more than 16 deep"):
            assignments([word])


@pytest.mark.parametrize(
    "text",
    [
        'x = "' + '\\"' * 60_000,
        "x = " + "'" * 200_001,
        "x = " + '"""\\' * 50_000,
        "x = " + "\"\"\"'''" * 30_000,
        "#" * 200_000,
    ],
)
def test_unparsed_look_takes_linear_time(text: str) -> None:
    """The square of these lengths would take hours, and the suite would stop the test."""
    with suppress(InputError):
        from_toml(text)


def test_dots_and_brackets_in_strings_are_not_depth() -> None:
    path = "/data/" + "a.b." * 40 + "[" * 40
    assert from_toml(f"data.path = '{path}'").data.path == path
    assert from_toml(f'data.path = """{path}"""\n# {path}').data.path == path
    assert assignments([f"data.path={'a.b.' * 40}"]) == {"data": {"path": "a.b." * 40}}


def test_long_lists_of_mistakes_are_cut() -> None:
    message = refusal({f"key{n}": 1 for n in range(20_000)})
    assert message.endswith("key9: unknown key; and 19990 more mistakes")
    assert len(refusal({"preset": ["x" * 10_000]})) < 300


def test_byte_order_mark_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_bytes(b"\xef\xbb\xbf[train]\nsteps = 3\n")
    assert load_toml(path) == {"train": {"steps": 3}}


def test_mutated_files_load_or_are_refused(tmp_path: Path) -> None:
    """Each of 500 mutations of a valid file loads or gives a one-line error."""
    whole, rng = to_toml(presets.resolve("quick")).encode(), random.Random(0)
    path = tmp_path / "config.toml"
    messages: list[str] = []
    for _ in range(500):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 5)):
            at = rng.randrange(len(data))
            way = rng.randrange(3)
            if way == 0:
                data[at] = rng.randrange(256)
            elif way == 1:
                del data[at : at + rng.randint(1, 30)]
            else:
                data[at:at] = rng.choice(
                    [b"-", b"e99", b"nan", b"[", b"]", b'"', b"\n", b"true", b"="]
                )
        path.write_bytes(data)
        try:
            config = from_dict(load_toml(path), "config.toml")
        except InputError as error:
            messages.append(str(error))
        else:
            assert from_toml(to_toml(config)) == config
    assert 100 < len(messages) < 500
    assert not any("\n" in message or "\r" in message for message in messages)


def test_toml_contains_every_field() -> None:
    tables = tomllib.loads(to_toml(Config()))
    assert tables.keys() == {"preset", "data", "prepare", "model", "search", "train"}
    air = tomllib.loads(to_toml(Config(model=AIRConfig())))["model"]
    assert air.keys() == {field.name for field in fields(AIRConfig)}
    for name, kind in (
        ("data", DataConfig),
        ("prepare", PrepareConfig),
        ("model", SPAIRConfig),
        ("search", SearchConfig),
        ("train", TrainConfig),
    ):
        assert tables[name].keys() == {field.name for field in fields(kind)}


def test_dotted_keys_and_tables_are_merged() -> None:
    tables = {"train": {"seed": 1}}
    assert nested({"train.steps": 2, **tables}) == {"train": {"steps": 2, "seed": 1}}
    assert nested({**tables, "train.steps": 2}) == {"train": {"steps": 2, "seed": 1}}
    assert tables == {"train": {"seed": 1}}, "unchanged"
