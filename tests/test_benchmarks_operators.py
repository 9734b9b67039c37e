"""The benchmark of the operators: checks, clocks, figures, tables and the ledger."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from spairkit.benchmarks import operators, timing
from spairkit.benchmarks.operators import SIDES, WAYS, check, run
from spairkit.benchmarks.plain import presence_kl_by_loop
from spairkit.benchmarks.timing import Figure, device_clock, machine, take_turns
from spairkit.cli import bench
from spairkit.cli.bench import app
from spairkit.errors import InputError
from spairkit.presence import presence_kl
from spairkit.rendering import render

CPU = torch.device("cpu")
SMALL = ("presence_kl", 2, 16)


def quiet(line: str) -> None:
    """Ignores a line of progress."""


@pytest.mark.parametrize("objects", SIDES)
@pytest.mark.parametrize("operator", WAYS)
def test_all_implementations_pass_the_check(operator: str, objects: int) -> None:
    check(operator, objects, CPU)


def test_loop_equals_the_operator_for_relaxed_samples() -> None:
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


@pytest.mark.parametrize("way", ["spairkit", "loop"])
def test_nothing_is_timed_after_a_failed_check(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = WAYS["presence_kl"][way]

    def wrong(logits: Tensor, *rest: Tensor) -> Tensor:
        kl = right(logits, *rest)
        return kl if kl.dtype == torch.float64 else kl * 1.01

    monkeypatch.setitem(WAYS["presence_kl"], way, wrong)
    message = rf"presence_kl of 16: {way} differs from plain torch .*; nothing was timed"
    with pytest.raises(RuntimeError, match=message):
        next(run([SMALL], CPU, 0, quiet))


def test_wrong_gradients_fail_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def detached(rgba: Tensor, boxes: Tensor, *rest: Tensor) -> Tensor:
        return render(rgba, boxes.detach() + 0 * boxes, *rest)

    monkeypatch.setitem(WAYS["render"], "spairkit", detached)
    with pytest.raises(RuntimeError, match="render of 16: spairkit differs"):
        check("render", 16, CPU)


def test_every_number_of_objects_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    right = WAYS["render"]["spairkit"]

    def wrong(rgba: Tensor, *rest: Tensor) -> Tensor:
        image = right(rgba, *rest)
        return image * 1.01 if rgba.shape[1] == 64 else image

    monkeypatch.setitem(WAYS["render"], "spairkit", wrong)
    check("render", 16, CPU)
    with pytest.raises(RuntimeError, match="render of 64: spairkit differs"):
        next(run([("render", 1, 16), ("render", 1, 64)], CPU, 0, quiet))


def test_every_case_is_measured() -> None:
    figures = list(run([(name, 2, 16) for name in WAYS], CPU, 0, quiet))
    names = [(name, way) for name, ways in WAYS.items() for _ in range(2) for way in ways]
    assert [(figure.case.split()[0], figure.way) for figure in figures] == names
    for figure in figures:
        assert 0 < figure.p20_ms <= figure.median_ms <= figure.p80_ms
        assert figure.samples == 3
        assert figure.times == 1 or figure.way != "spairkit"


def test_plain_version_is_skipped_if_memory_is_short(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(timing, "free_bytes", lambda device: 2**20)
    lines: list[str] = []
    figures = list(run([("render", 1, 16)], CPU, 0, lines.append))
    assert [figure.way for figure in figures] == ["spairkit"] * 2
    assert "render 1x16, forward: skipping grid_sample, which needs about 0 GiB" in lines


def test_clocks_take_turns() -> None:
    read: list[str] = []

    def clock(name: str, seconds: float) -> float:
        read.append(name)
        return seconds * len(read)

    taken = take_turns({"a": partial(clock, "a", 1.0), "b": partial(clock, "b", 0.0)}, 0)
    assert read == ["a", "b"] * 3
    assert taken["a"] == {"median_ms": 3e3, "p20_ms": 1e3, "p80_ms": 5e3, "samples": 3}
    assert taken["b"]["median_ms"] == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_calls_are_timed_by_graph_replay_if_possible() -> None:
    device = torch.device("cuda")
    numbers = torch.ones(1 << 20, device=device)
    clock, note = device_clock(lambda: numbers.mul(2), device)
    assert note == ""
    assert 0 < clock() < 1e-3
    waiting, note = device_clock(lambda: numbers.sum().item(), device)
    assert note == "launched eagerly"
    assert 0 < waiting() < 1
    assert float(numbers.sum()) == 1 << 20
    assert 0 < clock() < 1e-3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_bandwidth_is_compared_with_a_copy() -> None:
    figures = list(run([("render", 2, 16)], torch.device("cuda"), 0, quiet))
    assert all(0 < figure.more["% of a copy"] < 200 for figure in figures)


def test_command_prints_a_table_or_json(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.jsonl"
    words = ["--operator", "presence_kl", "--objects", "16", "--batch", "2", "--seconds", "0"]
    words += ["--device", "cpu", "--ledger", str(ledger)]
    table = CliRunner().invoke(app, words)
    assert table.exit_code == 0, table.output
    assert "presence_kl 2x16, forward + backward" in table.stdout
    document = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert len(document["figures"]) == 4
    assert "partial" not in document
    lines = [json.loads(line) for line in ledger.read_text().splitlines()]
    assert len(lines) == 8
    assert {line["benchmark"] for line in lines} == {"operators"}


@pytest.mark.parametrize(("option", "value"), [("objects", "17"), ("operator", "draw")])
def test_unknown_cases_are_refused(option: str, value: str) -> None:
    refused = CliRunner().invoke(app, [f"--{option}", value])
    assert isinstance(refused.exception, InputError)
    assert f"--{option} must be one of" in str(refused.exception)


@pytest.mark.parametrize("ending", [KeyboardInterrupt, RuntimeError])
def test_interrupted_benchmark_keeps_its_figures(
    ending: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figure = next(run([SMALL], CPU, 0, quiet))

    def interrupted(*_: object) -> Iterator[Figure]:
        yield figure
        raise ending

    monkeypatch.setattr(operators, "run", interrupted)
    ledger = tmp_path / "ledger.jsonl"
    found = CliRunner().invoke(app, ["--device", "cpu", "--ledger", str(ledger), "--json"])
    assert found.exit_code != 0
    document = json.loads(found.stdout)
    assert document["partial"] is True
    assert document["figures"][0]["median_ms"] == figure.median_ms
    assert json.loads(ledger.read_text())["median_ms"] == figure.median_ms


def test_additional_figures_are_table_columns(capsys: pytest.CaptureFixture[str]) -> None:
    figure = Figure(
        case="render 1x16, forward", way="spairkit", median_ms=1.5, p20_ms=1.4, p80_ms=1600,
        samples=3, times=1.0, peak_mib=None, note="triton", more={"GB/s": 1234.5},
    )  # fmt: skip
    bench._show([figure])
    shown = capsys.readouterr().out
    assert "GB/s" in shown.splitlines()[0]
    assert "spairkit (triton)  1.50  1.40-1600" in shown
    assert "1234" in shown


def test_machine_record_includes_versions() -> None:
    found = machine(CPU)
    for name in ("spairkit", "torch", "triton", "numba"):
        assert found[name][0].isdigit()
