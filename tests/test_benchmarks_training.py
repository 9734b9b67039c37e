"""The benchmarks of training: the plain step is the same step, and figures are complete."""

import json
import re
import signal
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from torch import Tensor
from typer.testing import CliRunner

from spairkit.benchmarks import plain, steps, targets
from spairkit.benchmarks.steps import PARTS, Case, check, run
from spairkit.benchmarks.targets import (
    PAPER_AP,
    Reached,
    attempts,
    paper_target,
    success_rate,
)
from spairkit.cli.bench import app
from spairkit.cli.main import main
from spairkit.config import Config, DataConfig
from spairkit.config_values import from_dict, merge
from spairkit.errors import InputError
from spairkit.images import write_png
from spairkit.models import densities
from spairkit.presets import resolve
from spairkit.training.loop import Validation, fit

CPU = torch.device("cpu")
TINY: dict[str, Any] = {
    "data": {"image_height": 24, "image_width": 24, "max_objects": 1, "validation_images": 4},
    "model": {
        "backbone_channels": [4],
        "features": 8,
        "hidden": 8,
        "passthrough": 4,
        "what": 4,
        "encoder_hidden": [8],
        "decoder_hidden": [8],
    },
    "train": {"batch_size": 2, "steps": 6, "validation_every": 2, "threads": 1},
}


def case(**model: Any) -> Case:
    return Case(config=from_dict(merge(TINY, {"model": model})), batch=2, cells=2)


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"activation": "celu", "importance_floor": 0.2, "background": "solid", "beta": 2.0},
        {"lateral": False, "importance_floor": 0.0, "stride_order": "descending"},
    ],
)
def test_the_plain_step_has_our_losses_and_gradients(model: dict[str, Any]) -> None:
    check(case(**model), CPU)


@pytest.mark.parametrize("preset", ["quick", "paper"])
def test_so_it_has_at_the_size_that_is_timed(preset: str) -> None:
    check(Case(config=resolve(preset), batch=32, cells=4), CPU)


def test_the_plain_step_is_fused_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: Any) -> Tensor:
        raise AssertionError("a kernel was asked for")

    ours = steps._model(case().sized(), CPU)
    images = torch.rand(2, 3, 24, 24)
    monkeypatch.setattr(densities, "fused", refused)
    steps._losses_and_gradients(steps._plain(ours), images)
    with pytest.raises(AssertionError, match="a kernel was asked for"):
        steps._losses_and_gradients(ours, images)


@pytest.mark.parametrize(
    "wrong", ["render_by_grid_sample", "presence_kl_by_loop", "cross_entropy_of_images"]
)
def test_nothing_is_timed_when_the_plain_step_is_another(
    wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = getattr(plain, wrong)

    def off(*arguments: Any) -> Tensor:
        value: Tensor = 1.01 * right(*arguments)
        return value

    monkeypatch.setattr(plain, wrong, off)
    figures = run([case()], CPU, seconds=0)
    with pytest.raises(RuntimeError, match=r"the plain step is off by .* in .*, so nothing is"):
        next(figures)


def test_the_importance_floor_is_in_the_plain_step(monkeypatch: pytest.MonkeyPatch) -> None:
    right: Any = plain.render_by_grid_sample
    monkeypatch.setattr(plain, "render_by_grid_sample", lambda *a: right(*a[:-1], 0.0))
    with pytest.raises(RuntimeError, match="is off by"):
        check(case(importance_floor=0.3), CPU)


def test_two_updates_of_both_ways_give_the_same_weights() -> None:
    config = case().sized()
    trainers = [steps._trainer(config, CPU) for _ in range(2)]
    steps._make_plain(trainers[1])
    for trainer in trainers:
        trainer.update()
        trainer.update()
    ours, theirs = (trainer.model.state_dict() for trainer in trainers)
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-3, atol=1e-5)


def test_figures_are_complete_and_parts_make_up_the_step() -> None:
    figures = list(run([case(), replace(case(), cells=3)], CPU, seconds=0))
    assert [(figure.way, figure.cells) for figure in figures] == [
        ("spairkit", 4),
        ("plain", 4),
        ("spairkit", 9),
        ("plain", 9),
    ]
    for figure in figures:
        assert figure.step_ms is not None
        assert figure.p20_ms is not None
        assert figure.p80_ms is not None
        assert 0 < figure.p20_ms <= figure.step_ms <= figure.p80_ms
        assert figure.repeats == 3
        assert figure.images_per_second == pytest.approx(2e3 / figure.step_ms)
        assert figure.cell_us == pytest.approx(1e3 * figure.step_ms / (2 * figure.cells))
        assert (figure.ratio == 1) == (figure.way == "spairkit")
        assert list(figure.parts_ms) == list(PARTS)
        assert all(time > 0 for time in figure.parts_ms.values())


def test_progress_is_told_of_every_check_and_of_every_part_of_every_case() -> None:
    told: list[steps.Progress] = []
    list(run([case(), replace(case(), cells=3)], CPU, 0.5, told.append))
    begun = dict.fromkeys((progress.case.cells, progress.doing) for progress in told)
    assert list(begun) == [
        (2, "checking"),
        (3, "checking"),
        *(
            (cells, doing)
            for cells in (2, 3)
            for doing in (
                "warming up",
                "timing for at least 0.5 s",
                "timing the parts of spairkit",
                "timing the parts of plain",
            )
        ),
    ]
    for cells, doing in list(begun)[3:6]:
        done = [p.done for p in told if (p.case.cells, p.doing) == (cells, doing)]
        (total,) = {p.total for p in told if (p.case.cells, p.doing) == (cells, doing)}
        assert total is not None
        assert done == sorted(done)
        assert done[0] >= 0
        assert done[-1] <= total


def test_inner_parts_are_not_counted_twice() -> None:
    watch = steps._Stopwatch(CPU)
    with watch.part("outer"):
        with watch.part("inner"):
            pass
        with watch.part("inner"):
            pass
    assert set(watch.seconds) == {"outer", "inner"}

    class Owner:
        def method(self) -> int:
            return 3

    owner = Owner()
    with watch.watching(owner, "method", "method"):
        assert owner.method() == 3
    assert vars(owner) == {}
    assert "method" in watch.seconds


def test_a_plain_step_that_does_not_fit_is_left_out_with_its_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(steps, "free_bytes", lambda device: 2**10)
    figures = list(run([case()], CPU, seconds=0))
    assert [(f.way, f.step_ms is None, f.note[:11]) for f in figures] == [
        ("spairkit", False, ""),
        ("plain", True, "needs about"),
    ]


def test_only_spair_is_timed() -> None:
    with pytest.raises(InputError, match="only the updates of spair are timed, not of air"):
        Case(config=from_dict({"model": {"kind": "air"}}), batch=2, cells=2)


def test_bench_train_prints_tables_or_json(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.jsonl"
    words = ["train", "--preset", "quick", "--batch", "1", "--cells", "2", "--seconds", "0"]
    words += ["--device", "cpu", "--ledger", str(ledger), "--set", "model.hidden=8"]
    table = CliRunner().invoke(app, words)
    assert table.exit_code == 0, table.output
    said = [line.partition(": ")[2][:25] for line in table.stderr.splitlines()]
    assert said[1:5] == [
        *("checking", "warming up", "timing for at least 0 s", "timing the parts of spair")
    ]
    assert "share of parts, %" in table.stdout
    assert "times as long as the backbone's own forward and backward" in table.stdout
    assert "times as long as the plain version's backbone" in table.stdout
    quiet = CliRunner().invoke(app, [*words, "--json", "--quiet"])
    assert quiet.stderr == f"added to {ledger}\n"
    document = json.loads(quiet.stdout)
    assert document["benchmark"] == "train"
    assert [figure["way"] for figure in document["figures"]] == ["spairkit", "plain"]
    assert set(document["figures"][0]) == set(asdict(next(run([case()], CPU, 0))))
    assert len(ledger.read_text().splitlines()) == 2
    refused = CliRunner().invoke(app, [*words, "--preset", "none"])
    assert isinstance(refused.exception, InputError)


def test_targets_are_timed_when_they_are_first_reached() -> None:
    config: Config = from_dict(TINY)
    told: list[tuple[int, int, bool]] = []
    easy, hard = attempts(
        config,
        {"ap_spair": 0.0, "count_accuracy": 0.0},
        [4, 5],
        CPU,
        lambda seed, step, event: told.append((seed, step, isinstance(event, Validation))),
    )
    for seed, attempt in ((4, easy), (5, hard)):
        assert attempt.seed == seed
        assert attempt.all is not None
        assert attempt.steps == attempt.all.step == 2
        assert set(attempt.first) == {"ap_spair", "count_accuracy"}
        assert 0 < attempt.all.minutes <= attempt.minutes
    assert told[:3] == [(4, 1, False), (4, 2, False), (4, 2, True)]
    (never,) = attempts(config, {"ap_spair": 0.0, "count_accuracy": 1.1}, [4], CPU)
    assert never.all is None
    assert never.steps == 6
    assert never.first["count_accuracy"] is None
    first = never.first["ap_spair"]
    assert first is not None
    assert first.step == 2


def test_a_seed_that_is_stopped_is_neither_a_success_nor_a_failure() -> None:
    steps_made: list[int] = []
    never, broken_off = attempts(
        from_dict(TINY),
        {"count_accuracy": 1.1},
        [4, 5, 6],
        CPU,
        lambda seed, step, _: steps_made.append(step),
        lambda: len(steps_made) >= 12,  # 6 updates and 3 validations, then 3 more
    )
    assert (never.seed, never.steps, never.broken_off) == (4, 6, False)
    assert (broken_off.seed, broken_off.steps, broken_off.broken_off) == (5, 2, True)
    assert broken_off.all is None
    assert broken_off.minutes > 0
    assert success_rate([never, broken_off]) == 0.0
    reached = replace(never, all=Reached(step=2, minutes=1.0, cpu_minutes=1.0))
    assert success_rate([reached, never, broken_off]) == 0.5
    assert success_rate([broken_off]) is None


def test_a_stop_at_the_end_of_training_breaks_nothing_off() -> None:
    made: list[int] = []
    (attempt,) = attempts(
        from_dict(TINY),
        {"count_accuracy": 1.1},
        [4, 5],
        CPU,
        lambda seed, step, _: made.append(step),
        lambda: len(made) > 0 and made[-1] == 6,
    )
    assert (attempt.steps, attempt.broken_off) == (6, False)


def test_targets_are_the_papers_for_the_number_of_digits() -> None:
    assert PAPER_AP == {1: 0.789, 3: 0.696, 5: 0.673, 7: 0.659, 9: 0.624}
    assert paper_target(resolve("quick").data) == 0.696
    with pytest.raises(InputError, match="no AP for 4 objects, but for 1, 3, 5, 7, 9; give --ap"):
        paper_target(DataConfig(max_objects=4))


def test_time_to_ap_prints_a_table_or_json(tmp_path: Path) -> None:
    ledger, file = tmp_path / "ledger.jsonl", tmp_path / "tiny.toml"
    file.write_text(tomli_w.dumps(TINY))
    words = ["time-to-ap", "--config", str(file), "--ap", "0", "--seeds", "2", "--every", "3"]
    words += ["--device", "cpu", "--ledger", str(ledger), "--quiet"]
    table = CliRunner().invoke(app, words)
    assert table.exit_code == 0, table.output
    assert "until validation first reaches AP paper 0:" in table.stdout
    assert re.search(r"^ seed +reached +step +CPU min +best AP paper *$", table.stdout, re.M)
    assert "AP paper: the rule of the SPAIR authors' code." in table.stdout
    assert "reached by 2 of 2 seeds, in " in table.stdout
    document = json.loads(
        CliRunner().invoke(app, [*words, "--json", "--count-accuracy", "1"]).stdout
    )
    assert document["validation_every"] == 3
    assert document["success_rate"] in (0.0, 0.5, 1.0)
    assert set(document["figures"][0]) == {
        *("seed", "targets", "first", "all", "broken_off", "best"),
        *("steps", "minutes", "cpu_minutes"),
    }
    assert len(ledger.read_text().splitlines()) == 2


def test_time_to_ap_that_no_seed_reaches_ends_with_a_line_and_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger, file = tmp_path / "ledger.jsonl", tmp_path / "tiny.toml"
    file.write_text(tomli_w.dumps(TINY))
    words = ["bench", "time-to-ap", "--config", str(file), "--ap", "1", "--seeds", "2", "--quiet"]
    with pytest.raises(SystemExit) as ended:
        main([*words, "--device", "cpu", "--ledger", str(ledger)])
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert "reached by 0 of 2 seeds\n" in printed.out
    last = printed.err.splitlines()[-1]
    assert re.fullmatch(
        r"spairkit: no seed reached AP paper 1 \(the best: AP paper \d\.\d{3}\); .*--ap.*", last
    )
    assert json.loads(ledger.read_text())["success_rate"] == 0.0
    # help says so
    with pytest.raises(SystemExit):
        main(["bench", "time-to-ap", "--help"])
    assert "0 if a seed succeeded, 2 if none" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_keeps_the_seed_under_way(
    number: signal.Signals,
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def signalled(config: Config, *arguments: Any, **keywords: Any) -> Iterator[Any]:
        for event in fit(config, *arguments, **keywords):
            if config.train.seed == 1 and event.step == 3:
                signal.raise_signal(number)
            yield event

    monkeypatch.setattr(targets, "fit", signalled)
    ledger, file = tmp_path / "ledger.jsonl", tmp_path / "tiny.toml"
    file.write_text(tomli_w.dumps(TINY))
    words = ["bench", "time-to-ap", "--config", str(file), "--ap", "1", "--seeds", "3", "--quiet"]
    with pytest.raises(SystemExit) as ended:
        main([*words, "--device", "cpu", "--ledger", str(ledger)])
    assert ended.value.code == status
    printed = capsys.readouterr()
    assert re.search(r"^ 1 +broken off, \d+\.\d min +3 ", printed.out, re.MULTILINE)
    assert "reached by 0 of 1 seeds; one was broken off and does not count" in printed.out
    document = json.loads(ledger.read_text())
    assert document["partial"] is True
    assert document["success_rate"] == 0.0
    assert [figure["broken_off"] for figure in document["figures"]] == [False, True]
    assert document["figures"][1]["steps"] == 3


def test_a_batch_is_given_in_one_place(tmp_path: Path) -> None:
    words = ["train", "--device", "cpu", "--ledger", str(tmp_path / "ledger.jsonl")]
    refused = CliRunner().invoke(app, [*words, "--set", "train.batch_size=4"])
    assert isinstance(refused.exception, InputError)
    assert "the batch is given by --batch" in str(refused.exception)


def test_models_other_than_spair_are_refused_before_any_is_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["bench", "train", "--device", "cpu", "--ledger", str(tmp_path / "ledger.jsonl")]
    with pytest.raises(SystemExit) as ended:
        main([*words, "--preset", "quick", "--set", "model.kind=air"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines() == [
        "spairkit: only the updates of spair are timed, not of air",
    ]


def test_time_to_ap_of_images_without_boxes_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_png(tmp_path / "image.png", torch.zeros(3, 48, 48))
    with pytest.raises(SystemExit) as ended:
        main(["bench", "time-to-ap", "--data", str(tmp_path), "--device", "cpu"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        f"spairkit: {tmp_path}: AP needs known boxes, and there is no annotations.json (COCO)\n"
    )


@pytest.mark.parametrize("command", ["train", "time-to-ap"])
def test_a_ledger_that_cannot_be_written_is_refused_first(command: str, tmp_path: Path) -> None:
    words = [command, "--device", "cpu", "--ledger", str(tmp_path)]
    refused = CliRunner().invoke(app, words)
    assert isinstance(refused.exception, InputError)
    assert "cannot add to the ledger" in str(refused.exception)


def test_what_was_timed_before_ctrl_c_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = next(run([case()], CPU, 0))

    def broken_off(*_: Any) -> Iterator[steps.Figure]:
        yield timed
        raise KeyboardInterrupt

    monkeypatch.setattr(steps, "run", broken_off)
    ledger = tmp_path / "ledger.jsonl"
    found = CliRunner().invoke(app, ["train", "--device", "cpu", "--ledger", str(ledger), "--json"])
    for document in (json.loads(found.stdout), json.loads(ledger.read_text())):
        assert document["partial"] is True
        assert len(document["figures"]) == 1
