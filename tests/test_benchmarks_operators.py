"""The benchmark: rivals compute the same, figures are complete, and none comes out when wrong."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from spairkit.benchmarks import operators as benchmarks
from spairkit.benchmarks.operators import Case, Figure, cases, check, run
from spairkit.benchmarks.plain import presence_kl_by_loop
from spairkit.benchmarks.timing import append_to_ledger, machine
from spairkit.cli import bench
from spairkit.cli.bench import app
from spairkit.errors import InputError
from spairkit.presence import presence_kl

CPU = torch.device("cpu")


@pytest.mark.parametrize("objects", benchmarks.SIDES)
@pytest.mark.parametrize("operator", get_args(benchmarks.Operator))
def test_operators_and_rivals_pass_their_checks(
    operator: benchmarks.Operator, objects: int
) -> None:
    check(operator, objects, CPU)


def test_the_relaxed_rival_is_the_operator_in_float64() -> None:
    random = torch.Generator().manual_seed(3)
    logits, samples = torch.rand(2, 2, 9, generator=random, dtype=torch.double)
    success = torch.tensor(0.7, dtype=torch.double)
    leaves = [logits.requires_grad_(), samples.requires_grad_()]
    ours = presence_kl(logits, samples, success, relaxed=True)
    loop = presence_kl_by_loop(logits, samples, success, relaxed=True)
    torch.testing.assert_close(loop, ours, rtol=1e-10, atol=1e-12)
    weights = torch.rand(2, 9, generator=random, dtype=torch.double)
    for found, wanted in zip(
        torch.autograd.grad(loop, leaves, weights),
        torch.autograd.grad(ours, leaves, weights),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-10)


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
    with pytest.raises(RuntimeError, match=r"presence_kl of 16: .* is off by .*, so nothing is"):
        next(figures)


@pytest.mark.parametrize(("operator", "factor"), [("render", 1.0001), ("presence_kl", 1.00001)])
def test_the_operator_is_held_to_the_bars_of_its_tests(
    operator: benchmarks.Operator, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = benchmarks._OURS[operator]

    def off(first: Tensor, *rest: Tensor) -> Tensor:
        value = right(first, *rest)
        return value if value.dtype == torch.float64 else value * factor

    monkeypatch.setitem(benchmarks._OURS, operator, off)
    with pytest.raises(RuntimeError, match="spairkit is off by"):
        check(operator, 16, CPU)


def test_an_operator_that_is_off_at_one_number_of_objects_only_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = benchmarks._OURS["render"]

    def off(rgba: Tensor, *rest: Tensor) -> Tensor:
        image = right(rgba, *rest)
        return image * 1.01 if rgba.shape[1] == 64 and rgba.dtype == torch.float32 else image

    monkeypatch.setitem(benchmarks._OURS, "render", off)
    check("render", 16, CPU)
    with pytest.raises(RuntimeError, match="render of 64: spairkit is off by"):
        next(run(cases(["render"], [1], [16, 64]), CPU, compiled=False, seconds=0))


def test_every_case_gets_all_its_figures() -> None:
    chosen = cases(["render", "presence_kl", "presence_kl_relaxed"], [2], [16])
    assert [case.share_on for case in chosen] == [0.1, 0.1, 0.9, 0.1, 0.9]
    figures = list(run(chosen, CPU, compiled=False, seconds=0))
    assert [figure.way for figure in figures[:4]] == ["spairkit", "grid_sample"] * 2
    assert [figure.way for figure in figures[4:]] == ["spairkit", "loop"] * 8
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


def test_every_compiled_case_is_compiled_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    compilations = 0

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        nonlocal compilations
        compilations += 1
        return graph.forward

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **words: compile_(f, backend=backend, **words))
    chosen = cases(["render"], [1, 2], [16])
    chosen.append(Case(operator="presence_kl_relaxed", batch=1, objects=16))
    with torch._dynamo.config.patch(recompile_limit=1):
        figures = list(run(chosen, CPU, compiled=True, seconds=0))
    compiled = [figure for figure in figures if figure.way.startswith("compiled ")]
    assert len(compiled) == 2 * len(chosen)
    assert all(figure.median_ms is not None and figure.note == "" for figure in compiled)
    assert compilations == len(compiled)


def test_a_rival_that_does_not_compile_whole_gets_a_note_and_no_figure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = benchmarks._RIVALS["presence_kl"]

    def broken(*arguments: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return right(*arguments)

    monkeypatch.setitem(benchmarks._RIVALS, "presence_kl", broken)
    chosen = [Case(operator="presence_kl", batch=2, objects=16)]
    figures = list(run(chosen, CPU, compiled=True, seconds=0))
    assert [figure.way for figure in figures] == ["spairkit", "loop", "compiled loop"] * 2
    for figure in figures:
        left_out = figure.way == "compiled loop"
        assert (figure.median_ms is None) == left_out
        assert ("not compiled: " in figure.note) == left_out


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
    found = json.loads(document.stdout)
    assert len(found["figures"]) == 8
    assert "partial" not in found
    assert len(ledger.read_text().splitlines()) == 2
    refused = CliRunner().invoke(app, [*words, "--objects", "17"])
    assert isinstance(refused.exception, InputError)


def test_a_ledger_that_cannot_be_written_is_refused_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmarks, "run", lambda *_, **__: pytest.fail("it ran"))
    for ledger in (tmp_path, tmp_path / "no" / "ledger.jsonl"):
        refused = CliRunner().invoke(app, ["--device", "cpu", "--ledger", str(ledger)])
        assert isinstance(refused.exception, InputError)
        assert "cannot add to the ledger" in str(refused.exception)
        assert refused.stdout == ""
    assert not list(tmp_path.iterdir())


FIGURE = Figure(
    operator="presence_kl_relaxed",
    batch=1,
    objects=16,
    share_on=0.1,
    backward=True,
    way="spairkit",
    median_ms=1.5,
    p20_ms=1.4,
    p80_ms=1.6,
    note="triton",
)


@pytest.mark.parametrize("ending", [KeyboardInterrupt, RuntimeError])
def test_a_run_that_is_broken_off_keeps_what_was_measured(
    ending: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(*_: object, **__: object) -> Iterator[Figure]:
        yield FIGURE
        raise ending

    monkeypatch.setattr(benchmarks, "run", short)
    ledger = tmp_path / "ledger.jsonl"
    found = CliRunner().invoke(app, ["--device", "cpu", "--ledger", str(ledger), "--json"])
    assert found.exit_code != 0
    for document in (json.loads(found.stdout), json.loads(ledger.read_text())):
        assert document["partial"] is True
        assert [figure["median_ms"] for figure in document["figures"]] == [1.5]


def test_bytes_a_second_stand_beside_those_of_a_copy(capsys: pytest.CaptureFixture[str]) -> None:
    figure = replace(FIGURE, bytes_per_second=1.2e12, copy_bytes_per_second=4.0e12, bandwidth=0.3)
    bench._print_table({}, [figure])
    shown = capsys.readouterr().out
    assert "1200.0 GB/s" in shown
    assert "30% of a copy's 4000.0" in shown


def test_the_machine_names_the_versions_of_what_runs() -> None:
    found = machine(CPU)
    for name in ("spairkit", "torch", "triton", "numba"):
        assert found[name][0].isdigit()
    assert found.get("cuda") == torch.version.cuda
