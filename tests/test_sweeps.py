"""Sweeps of real, tiny runs: results, resumption after stops and kills, and error messages."""

import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spairkit.cli.main import main
from spairkit.config import Config
from spairkit.config_values import differences, from_dict
from spairkit.errors import DivergedError, InputError
from spairkit.experiments.shared_runs import Ended, Started, claimed
from spairkit.images import write_png
from spairkit.storage.checkpoints import load_checkpoint
from spairkit.storage.runs import Run
from spairkit.sweeps import sweep as sweeps
from spairkit.sweeps.search_space import parse
from spairkit.sweeps.sweep import Sweep
from spairkit.training.loop import fit

CPU = torch.device("cpu")
TINY = """\
[data]
image_height = 24
image_width = 28
max_objects = 2
validation_images = 4

[model]
backbone_channels = [4]
features = 8
hidden = 8
passthrough = 4
what = 4
encoder_hidden = [8]
decoder_hidden = [8]

[train]
batch_size = 2
steps = 6
validation_every = 3
threads = 1
"""


@dataclass(frozen=True)
class Result:
    """Exit status and output of a command."""

    status: Any
    out: str
    err: str


Runner = Callable[..., Result]


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Runner:
    """Runs a command in this process, in a folder that contains only tiny.toml."""
    monkeypatch.chdir(tmp_path)
    Path("tiny.toml").write_text(TINY)

    def run_command(*arguments: object) -> Result:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(["sweep", *(str(argument) for argument in arguments)])
        captured = capsys.readouterr()
        return Result(ended.value.code, captured.out, captured.err)

    return run_command


def create(path: Path, **train: Any) -> Sweep:
    values = tomllib.loads(TINY)
    values["train"] |= train
    config = from_dict(values)
    varied = {"model": {"beta": [0.5, 1.0, 2.0], "position_prior_std": [0.5, 1.0]}}
    return Sweep.create(path, config, parse(varied, config, ""), 5)


def work(sweep: Sweep, trials: int, stop: Callable[[], bool] = lambda: False) -> list[Any]:
    return [e for e in sweep.work(trials, CPU, stop) if isinstance(e, Started | Ended)]


def reopened(sweep: Sweep) -> Sweep:
    found = Sweep.open(sweep.path)
    assert found is not None
    return found


def states(sweep: Sweep) -> list[tuple[int, str]]:
    return sorted((trial.number, trial.state) for trial in sweep.trials())


def weights(run: Path) -> bytes:
    return (run / "last" / "model.safetensors").read_bytes()


def figures(run: Path) -> list[float]:
    return [r["elbo"] for r in Run.open(run).metrics() if r["kind"] == "validation"]


def spairkit(*words: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "spairkit", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_for(process: subprocess.Popen[str], done: Callable[[], object]) -> None:
    while not done():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def trainer_of(run: Path) -> int:
    """The process that trains in a run; 0 if there is none yet."""
    owner = run / ".owner"
    return int(owner.read_text().split()[1]) if owner.is_file() else 0


def test_sweep_writes_table_chart_and_options_of_the_best_trial(run: Runner) -> None:
    ended = run("--config", "tiny.toml", "--trials", 3, "--device", "cpu")
    assert ended.status == 0, ended.err
    folder = Path("runs/sweep-1")
    assert "starting runs/sweep-1 on cpu: 3 trials, ranked by validation elbo" in ended.err
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((folder / "sweep.json").read_text())
    assert set(results) == {"sweep", "figure", "seed", "space", "chart", "trials", "best"}
    assert [trial["state"] for trial in results["trials"]] == ["complete"] * 3
    found = [trial["figure"] for trial in results["trials"]]
    assert found == sorted(found, reverse=True)
    base = None
    for trial in results["trials"]:
        path = Path(trial["run"])
        assert path == folder / f"trial-{trial['number']:04d}"
        assert trial["figure"] == max(figures(path))
        assert trial["steps"] == 6 == load_checkpoint(path / "last").step
        config = Run.open(path).config
        base = base or config
        for key, value in trial["values"].items():
            assert getattr(config.model, key.removeprefix("model.")) == value
        for line in differences(base, config):
            assert line.split(":")[0] in results["space"]
        assert f"{path.name}: elbo {trial['figure']:.3f}" in ended.err
    best = results["best"]
    assert best["trial"] == results["trials"][0]["number"]
    words, path_line = ended.out.splitlines()[-2:]
    assert words == "best: " + " ".join(f"--set {word}" for word in best["set"])
    assert path_line == f"run: {best['run']}"

    before = {path: weights(path) for path in folder.glob("trial-*")}
    again = run("--out", folder, "--trials", 4, "--json")
    assert again.status == 0
    assert "resuming runs/sweep-1" in again.err
    assert len(json.loads(again.out)["trials"]) == 4
    assert {path: weights(path) for path in before} == before


def test_folder_is_looked_at_once(run: Runner, tmp_path: Path) -> None:
    y, x = np.mgrid[:120, :120]
    disc = (y % 40 - 20) ** 2 + (x % 40 - 20) ** 2 < 100
    folder = tmp_path / "cells"
    folder.mkdir()
    write_png(folder / "0.png", torch.from_numpy(0.8 - 0.5 * disc).float().expand(3, -1, -1))
    words = ["--config", "tiny.toml", "--data", folder, "--out", "looked", "--trials", 1]
    ended = run(*words)
    assert ended.status == 0
    assert "darker than the background" in ended.err
    config = Run.open(Path("looked/trial-0000")).config
    assert config.prepare.scale == pytest.approx(12 / 20, rel=0.1)
    assert config.prepare.contrast == "direction"
    again = run(*words)
    assert again.status == 0
    assert "darker than the background" not in again.err


def test_sweep_reports_trials_that_other_processes_run(run: Runner) -> None:
    sweep = create(Path("sweep"))
    work(sweep, 1)
    sweep._study.ask(dict(sweep.space))
    with claimed(sweep.run_path(1)):
        ended = run("--out", "sweep", "--trials", 2)
    assert ended.status == 0
    assert "1 of 2 trials are finished, and other processes are running the rest" in ended.err
    assert "running" in ended.out


def test_seed_determines_settings_and_figures(run: Runner) -> None:
    common = ("--config", "tiny.toml", "--trials", 2, "--json", "--quiet")
    one, other, third = (
        json.loads(run(*common, "--seed", seed).out)["trials"] for seed in (1, 1, 2)
    )
    kept = ("number", "values", "figure", "steps")
    assert [[t[k] for k in kept] for t in one] == [[t[k] for k in kept] for t in other]
    assert [t["values"] for t in one] != [t["values"] for t in third]


def test_sweep_ends_when_all_combinations_are_tried(run: Runner) -> None:
    Path("space.toml").write_text("model.beta = [1.0, 2.0]\n")
    ended = run("--config", "tiny.toml", "--space", "space.toml", "--trials", 9, "--json")
    assert ended.status == 0
    assert "2 trials, ranked by validation elbo; the search space has only 2" in ended.err
    tried = [trial["values"]["model.beta"] for trial in json.loads(ended.out)["trials"]]
    assert sorted(tried) == [1.0, 2.0]


def test_stopped_trial_resumes_bit_identically(tmp_path: Path) -> None:
    whole = create(tmp_path / "whole")
    work(whole, 2)
    sweep = create(tmp_path / "stopped")
    calls = iter(range(100))
    assert work(sweep, 2, stop=lambda: next(calls) >= 4)[-1] == Ended("trial-0000")
    assert states(sweep) == [(0, "running")]
    assert load_checkpoint(sweep.run_path(0) / "last").step < 6
    again = reopened(sweep)
    started = [event.name for event in work(again, 2) if isinstance(event, Started)]
    assert started == ["trial-0000", "trial-0001"]
    assert [(t.number, t.figure) for t in again.trials()] == [
        (t.number, t.figure) for t in whole.trials()
    ]
    for number in (0, 1):
        assert weights(again.run_path(number)) == weights(whole.run_path(number))


def test_ctrl_c_saves_and_prints_resume_command(
    run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted_fit(*arguments: Any) -> Iterator[Any]:
        for event in fit(*arguments):
            signal.raise_signal(signal.SIGINT)
            yield event

    monkeypatch.setattr(sweeps, "fit", interrupted_fit)
    ended = run("--config", "tiny.toml", "--trials", 2)
    assert ended.status == 130
    assert "trial-0000: stopped and saved" in ended.err
    assert "to resume: spairkit sweep --out runs/sweep-1 --trials 2" in ended.err
    assert load_checkpoint(Path("runs/sweep-1/trial-0000/last")).step == 1


@pytest.mark.slow
def test_trial_of_a_killed_worker_is_resumed_by_another_process(run: Runner) -> None:
    out = Path("sweep").resolve()
    # long enough for a worker to start before the others have done all trials
    sets = ("--set", "train.steps=420", "--set", "train.validation_every=70")
    words = ("--config", "tiny.toml", *sets, "--out", out, "--trials", 5, "--workers", 2)
    with spairkit("sweep", *words, "--device", "cpu", "--json") as process:

        def trainer_of_worker() -> tuple[Path, int]:
            for path in out.glob("trial-*"):
                if trainer_of(path) not in (0, process.pid) and (path / "last").exists():
                    return path, trainer_of(path)
            return out, 0

        wait_for(process, lambda: trainer_of_worker()[1])
        killed, pid = trainer_of_worker()
        os.kill(pid, signal.SIGKILL)
        printed, said = process.communicate(timeout=200)
    assert process.returncode == 0, said
    assert f"worker process {pid} ended with status -9" in said
    trials = json.loads(printed)["trials"]
    assert sorted(trial["number"] for trial in trials) == list(range(5))
    assert {(trial["state"], trial["steps"]) for trial in trials} == {("complete", 420)}
    assert len(figures(killed)) == 6


@pytest.mark.slow
def test_workers_of_a_killed_parent_save_and_end(run: Runner) -> None:
    out = Path("sweep").resolve()
    words = ("--config", "tiny.toml", "--set", "train.steps=5000", "--out", out, "--workers", 2)
    with spairkit("sweep", *words) as process:
        wait_for(process, lambda: len(list(out.glob("trial-*/last"))) == 2)
        process.kill()
    runs = sorted(out.glob("trial-*"))
    deadline = time.monotonic() + 60
    for path in runs:
        while True:
            with claimed(path) as mine:
                if mine:
                    break
            assert time.monotonic() < deadline
            time.sleep(0.1)
    sweep = Sweep.open(out)
    assert sweep is not None
    assert states(sweep) == [(0, "running"), (1, "running")]
    steps = sweep.trials()[0].steps
    calls = iter(range(100))
    assert work(sweep, 2, stop=lambda: next(calls) > 0)[0].name == "trial-0000"
    assert steps is not None
    assert sweep.trials()[0].steps == steps + 1


def test_abandoned_trials_are_resumed_and_claimed_ones_skipped(tmp_path: Path) -> None:
    sweep = create(tmp_path / "sweep")
    study = sweep._study
    study.ask(dict(sweep.space))  # killed before its run was complete
    sweep.run_path(0).mkdir()
    work(sweep, 1)
    assert states(sweep) == [(0, "complete")]
    study.ask()  # killed before its settings were complete
    study.ask(dict(sweep.space))
    with claimed(sweep.run_path(2)):
        assert not [e for e in work(sweep, 2) if isinstance(e, Started)]
        assert states(sweep) == [(0, "complete"), (2, "running")]
    work(reopened(sweep), 3)
    assert states(sweep) == [(0, "complete"), (2, "complete"), (3, "complete")]


def test_diverged_trial_counts_and_is_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverging_fit(config: Config, run: Run, *rest: Any) -> Iterator[Any]:
        if run.path.name == "trial-0001":
            raise DivergedError("the losses were not finite")
        yield from fit(config, run, *rest)

    monkeypatch.setattr(sweeps, "fit", diverging_fit)
    sweep = create(tmp_path / "sweep")
    assert Ended("trial-0001", {}, "the losses were not finite") in work(sweep, 3)
    last = sweep.trials()[-1]
    assert (last.number, last.state, last.error) == (1, "failed", "the losses were not finite")
    assert states(sweep) == [(0, "complete"), (1, "failed"), (2, "complete")]
    assert not [e for e in work(reopened(sweep), 3) if isinstance(e, Started)]


def test_error_that_affects_all_trials_ends_the_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing_fit(*_: Any) -> Iterator[Any]:
        raise InputError("the disk is full")

    monkeypatch.setattr(sweeps, "fit", failing_fit)
    sweep = create(tmp_path / "sweep")
    with pytest.raises(InputError, match="the disk is full"):
        work(sweep, 3)
    monkeypatch.undo()
    work(sweep, 1)
    assert states(sweep) == [(0, "complete")]


def test_sweep_refuses_other_settings_and_other_folders(run: Runner) -> None:
    create(Path("sweep"))
    ended = run("--out", "sweep", "--set", "train.steps=7", "--seed", 6)
    assert ended.status == 2
    assert "these differ: train.steps: 6 -> 7; --seed: 5 -> 6; omit them" in ended.err
    Path("space.toml").write_text("model.beta = [9.0]\n")
    assert "model of this sweep is spair, not air" in run("--out", "sweep", "--model", "air").err
    assert "these differ: the search space" in run("--out", "sweep", "--space", "space.toml").err
    Path("taken").mkdir()
    Path("taken/file").touch()
    assert "taken: not empty" in run("--config", "tiny.toml", "--out", "taken").err
    assert [path.name for path in Path("taken").iterdir()] == ["file"]
    Path("space.toml").write_text("model.bta = [9.0]\n")
    ended = run("--config", "tiny.toml", "--out", "new", "--space", "space.toml")
    assert (ended.status, Path("new").exists()) == (2, False)
    assert "bta: unknown key, did you mean beta?" in ended.err


def test_partial_last_line_of_the_journal_is_dropped(tmp_path: Path) -> None:
    sweep = create(tmp_path / "sweep")
    work(sweep, 1)
    with open(sweep.path / "journal.log", "a") as journal:
        journal.write('{"op_code":6,"wor')
    again = reopened(sweep)
    assert states(again) == [(0, "complete")]
    work(again, 2)
    assert states(reopened(sweep)) == [(0, "complete"), (1, "complete")]


def test_damaged_journal_gives_a_one_line_error(run: Runner) -> None:
    create(Path("sweep"))
    journal = Path("sweep/journal.log")
    text = journal.read_text()
    for damaged in ("{broken\n" + text, "[]\n", '{"op_code": 99}\n'):
        journal.write_text(damaged)
        ended = run("--out", "sweep", "--config", "tiny.toml")
        assert ended.status == 2, damaged
        assert "journal.log" in ended.err
        assert ended.err.count("\n") == 1


def test_missing_optuna_gives_a_one_line_error(
    run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    for name in [name for name in sys.modules if name.startswith("spairkit.sweeps")]:
        monkeypatch.delitem(sys.modules, name)
    ended = run("--config", "tiny.toml")
    assert ended.status == 2
    assert ended.err == (
        "spairkit: a sweep needs Optuna, which is not installed: run pip install '.[search]' in "
        "spairkit's folder\n"
    )
    assert not Path("runs").exists()
