"""The ledger: figures are written as they are measured and printed once, complete or partial."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from spairkit.cli.ledger import recorded
from spairkit.errors import InputError


@dataclass
class Figure:
    """A figure of some benchmark."""

    ms: float


def unused(figures: list[Any]) -> None:
    pytest.fail("printed as a table")


def test_figures_are_written_at_once_and_printed_at_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    printed: list[list[Any]] = []
    ledger = tmp_path / "ledger.jsonl"
    ledger.write_text('{"earlier": 1}\n')
    with recorded({"device": "mine"}, printed.append, ledger, as_json=False) as record:
        record(Figure(1.5))
        assert json.loads(ledger.read_text().splitlines()[1]) == {"device": "mine", "ms": 1.5}
        assert not printed
        record(Figure(2.5))
    assert printed == [[Figure(1.5), Figure(2.5)]]
    assert len(ledger.read_text().splitlines()) == 3
    shown = capsys.readouterr()
    assert shown.out == "device mine\n"
    assert shown.err == f"added to {ledger}\n"


@pytest.mark.parametrize("ending", [KeyboardInterrupt, SystemExit, MemoryError])
def test_interrupted_benchmark_is_printed_as_partial(
    ending: type[BaseException], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger = tmp_path / "ledger.jsonl"

    def benchmark() -> None:
        with recorded({}, unused, ledger, as_json=True) as record:
            record(Figure(1.5))
            raise ending

    with pytest.raises(ending):
        benchmark()
    assert json.loads(capsys.readouterr().out) == {"partial": True, "figures": [{"ms": 1.5}]}
    assert json.loads(ledger.read_text()) == {"ms": 1.5}


def test_nothing_is_printed_without_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger = tmp_path / "ledger.jsonl"
    with pytest.raises(KeyboardInterrupt), recorded({}, unused, ledger, as_json=True):
        raise KeyboardInterrupt
    assert ledger.read_text() == ""
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["", "missing/ledger.jsonl"])
def test_unwritable_ledger_is_refused_before_the_benchmark(name: str, tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match=r"cannot append to the ledger \(.*\); choose another file"),
        recorded({}, unused, tmp_path / name, as_json=False),
    ):
        pytest.fail("the benchmark ran")
    assert not list(tmp_path.iterdir())
