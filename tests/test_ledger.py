"""What a benchmark has measured is shown and written down once, whole or broken off."""

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


def unprinted(about: dict[str, Any], figures: list[Any]) -> None:
    pytest.fail("printed")


def test_a_whole_benchmark_is_printed_and_added(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    printed: list[tuple[dict[str, Any], list[Any]]] = []
    about, ledger = {"device": "mine"}, tmp_path / "ledger.jsonl"
    ledger.write_text('{"earlier": 1}\n')
    with recorded(about, lambda *shown: printed.append(shown), ledger, json=False) as figures:
        figures.append(Figure(1.5))
        about["found"] = "meanwhile"
    assert printed == [({"device": "mine", "found": "meanwhile"}, [Figure(1.5)])]
    lines = [json.loads(line) for line in ledger.read_text().splitlines()]
    assert lines == [
        {"earlier": 1},
        {"device": "mine", "found": "meanwhile", "figures": [{"ms": 1.5}]},
    ]
    assert capsys.readouterr().err == f"added to {ledger}\n"


@pytest.mark.parametrize("ending", [KeyboardInterrupt, SystemExit, MemoryError])
def test_one_that_is_broken_off_says_so_and_ends_as_it_would(
    ending: type[BaseException], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger = tmp_path / "ledger.jsonl"

    def benchmark() -> None:
        with recorded({}, unprinted, ledger, json=True) as figures:
            figures.append(Figure(1.5))
            raise ending

    with pytest.raises(ending):
        benchmark()
    for document in (capsys.readouterr().out, ledger.read_text()):
        assert json.loads(document) == {"partial": True, "figures": [{"ms": 1.5}]}


def test_without_a_figure_there_is_nothing_to_show(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger = tmp_path / "ledger.jsonl"
    with pytest.raises(KeyboardInterrupt), recorded({}, unprinted, ledger, json=True):
        raise KeyboardInterrupt
    assert not ledger.exists()
    assert capsys.readouterr() == ("", "")


def test_a_ledger_that_cannot_be_written_is_refused_before_the_block(tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match="cannot add to the ledger"),
        recorded({}, unprinted, tmp_path, json=False),
    ):
        pytest.fail("measured")
