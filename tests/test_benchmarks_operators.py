"""The benchmark: rivals compute the same, figures are complete, and none comes out when wrong."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from spairkit.benchmarks import operators as benchmarks
from spairkit.benchmarks.operators import Case, Figure, cases, check, run
from spairkit.benchmarks.timing import append_to_ledger
from spairkit.cli.bench import app
from spairkit.errors import InputError

CPU = torch.device("cpu")


@pytest.mark.parametrize("operator", ["render", "presence_kl"])
def test_operators_and_rivals_pass_their_checks(operator: benchmarks.Operator) -> None:
    check(operator, CPU)


@pytest.mark.parametrize("wrong", ["_OURS", "_RIVALS"])
def test_nothing_is_timed_when_a_check_fails(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(benchmarks, wrong)["presence_kl"]

    def off(logits: Tensor, *rest: Tensor) -> Tensor:
        # right in float64, so that only the one under test is wrong
        kl: Tensor = right(logits, *rest)
        return kl if kl.dtype == torch.float64 else kl * 1.01

    monkeypatch.setitem(getattr(benchmarks, wrong), "presence_kl", off)
    figures = run(
        [Case(operator="presence_kl", batch=2, objects=16)], CPU, compiled=False, seconds=0
    )
    with pytest.raises(RuntimeError, match=r"presence_kl: .* is off by .*, so nothing is timed"):
        next(figures)


def test_every_case_gets_all_its_figures() -> None:
    chosen = cases(["render", "presence_kl"], [2], [16])
    assert [case.share_on for case in chosen] == [0.1, 0.1, 0.9]
    figures = list(run(chosen, CPU, compiled=False, seconds=0))
    assert [figure.way for figure in figures[:4]] == ["spairkit", "grid_sample"] * 2
    assert [figure.way for figure in figures[4:]] == ["spairkit", "loop"] * 4
    for figure in figures:
        assert figure.median_ms is not None
        assert figure.p20_ms is not None
        assert figure.p80_ms is not None
        assert 0 < figure.p20_ms <= figure.median_ms <= figure.p80_ms
        assert figure.repeats == 3
        assert figure.ratio == 1 or figure.way != "spairkit"


def test_a_rival_that_does_not_fit_is_left_out_with_its_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(benchmarks, "free_bytes", lambda device: 2**20)
    chosen = [Case(operator="render", batch=1, objects=16)]
    figures = list(run(chosen, CPU, compiled=False, seconds=0))
    left_out = [figure for figure in figures if figure.way == "grid_sample"]
    assert all(figure.median_ms is None for figure in left_out)
    assert all("needs about" in figure.note for figure in left_out)


def test_the_ledger_grows_by_a_line(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.jsonl"
    figure = Figure(
        operator="render", batch=1, objects=16, share_on=0.1, backward=True, way="spairkit",
        median_ms=1.5,
    )  # fmt: skip
    for threads in (1, 2):
        append_to_ledger(ledger, {"threads": threads}, [figure])
    lines = [json.loads(line) for line in ledger.read_text().splitlines()]
    assert [line["threads"] for line in lines] == [1, 2]
    assert lines[0]["figures"][0]["median_ms"] == 1.5
    with pytest.raises(InputError, match="cannot add to the ledger"):
        append_to_ledger(tmp_path / "no" / "ledger.jsonl", {}, [])


def test_the_command_prints_a_table_or_json(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.jsonl"
    words = ["--operator", "presence_kl", "--objects", "16", "--batch", "2", "--seconds", "0"]
    words += ["--device", "cpu", "--ledger", str(ledger)]
    table = CliRunner().invoke(app, words)
    assert table.exit_code == 0, table.output
    assert "presence_kl 2x16, 10% on, forward + backward" in table.stdout
    document = CliRunner().invoke(app, [*words, "--json"])
    assert len(json.loads(document.stdout)["figures"]) == 8
    assert len(ledger.read_text().splitlines()) == 2
    refused = CliRunner().invoke(app, [*words, "--objects", "17"])
    assert isinstance(refused.exception, InputError)
