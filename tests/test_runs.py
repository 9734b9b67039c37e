"""Runs: locks, the checkpoints that are kept, and kills while saving."""

import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from spairkit.config import Config, TrainConfig
from spairkit.config_values import load_toml
from spairkit.errors import InputError
from spairkit.storage.checkpoints import environment, load_checkpoint
from spairkit.storage.runs import Run, newest_run, pretrained

CONFIG = Config(preset="quick", train=TrainConfig(steps=500))


def new_run(tmp_path: Path) -> Run:
    return Run.create(tmp_path / "run", CONFIG)


def save(run: Run, step: int, *, is_best: bool = False) -> Path:
    return run.save(
        step=step,
        model={"w": torch.full((1000,), float(step))},
        optimiser={"m": torch.full((1000,), -float(step))},
        metrics={"ap": 0.25},
        environment=environment(),
        is_best=is_best,
    )


def steps(run: Run) -> list[int]:
    return [step for step, _ in run.checkpoints]


def damage(path: Path) -> None:
    data = bytearray((path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "model.safetensors").write_bytes(data)


def test_config_of_a_run_is_saved(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    assert Run.open(run.path).config == CONFIG
    run.adopt(replace(CONFIG, train=TrainConfig(steps=900)))
    assert load_toml(run.path / "config.toml")["train"]["steps"] == 900
    assert Run.open(run.path).config.train == TrainConfig(steps=900)


def test_default_folders_are_numbered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert newest_run() is None
    first, second = Run.create(None, CONFIG), Run.create(None, CONFIG)
    assert [first.path, second.path] == [Path("runs/digits-quick-1"), Path("runs/digits-quick-2")]
    (tmp_path / "runs" / "digits-quick-10").mkdir()
    assert Run.create(None, CONFIG).path == Path("runs/digits-quick-11")
    odd = Run.create(None, Config(preset="../../away"))
    assert odd.path == Path("runs/digits--away-1")


def test_newest_run_is_the_one_that_saved_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first, second, _empty = (Run.create(None, CONFIG) for _ in range(3))
    save(second, 1)
    save(first, 1)
    os.utime(first.path / "checkpoints" / "step-1", ns=(10, 10))
    os.utime(second.path / "checkpoints" / "step-1", ns=(5, 5))
    assert newest_run() == first.path
    save(second, 2)
    assert newest_run() == second.path


def test_occupied_folders_are_refused(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    with pytest.raises(InputError, match="already holds a run; resume it"):
        Run.create(run.path, CONFIG)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(InputError, match="not empty; name another folder"):
        Run.create(tmp_path / "mine", CONFIG)
    with pytest.raises(InputError, match="File exists; name another"):
        Run.create(tmp_path / "mine" / "thesis.tex", CONFIG)
    with pytest.raises(InputError, match="Not a directory; name another"):
        Run.create(tmp_path / "mine" / "thesis.tex" / "run", CONFIG)
    with pytest.raises(InputError, match=r"not a run \(no config\.toml in it"):
        Run.open(tmp_path / "mine")


def test_last_two_and_best_checkpoints_are_kept(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    assert run.latest() is None
    for step in (100, 200, 300, 400):
        save(run, step, is_best=step == 100)
    assert steps(run) == [400, 300, 100]
    assert os.readlink(run.path / "last") == "checkpoints/step-400"
    assert os.readlink(run.path / "best") == "checkpoints/step-100"
    save(run, 500, is_best=True)
    assert steps(run) == [500, 400]
    assert load_checkpoint(run.path / "best").step == 500
    moved = run.path.rename(tmp_path / "moved")
    assert load_checkpoint(moved).step == 500, "the links are relative"


def test_latest_skips_damaged_checkpoints(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    for step in (100, 200):
        save(run, step)
    latest = run.latest()
    assert latest is not None
    assert latest.step == 200
    assert latest.optimiser is not None
    assert torch.equal(latest.optimiser["m"], torch.full((1000,), -200.0))
    damage(run.path / "last")
    with pytest.warns(UserWarning, match="step-200.*damaged.*resuming from step 100"):
        latest = run.latest()
    assert latest is not None
    assert latest.step == 100
    # training resumes from there; the damaged checkpoint must not displace a good one
    save(run, 150)
    assert steps(run) == [150, 100]
    damage(run.path / "checkpoints" / "step-100")
    damage(run.path / "checkpoints" / "step-150")
    with pytest.raises(InputError, match=r"every checkpoint is damaged; the newest: .*step-150"):
        run.latest()


def test_latest_does_not_depend_on_the_link_last(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    save(run, 100)
    save(run, 200)
    (run.path / "last").unlink()
    (run.path / "last").symlink_to("checkpoints/step-100")
    latest = run.latest()
    assert latest is not None
    assert latest.step == 200


def test_metrics_are_lines_and_can_be_truncated(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    assert run.metrics() == []
    for step in range(5):
        run.log({"step": step, "loss": 1 / 3 + step, "ap": float("nan")})
    lines = (run.path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[2]) == {"step": 2, "loss": 1 / 3 + 2, "ap": None}
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # as a crash leaves it
    assert [record["step"] for record in run.metrics()] == [0, 1, 2, 3, 4]
    run.truncate_metrics(2)
    assert (run.path / "metrics.jsonl").read_text().splitlines() == lines[:3]


def test_second_trainer_is_refused_naming_the_first(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    (run.path / ".spairkit-tmp-0").mkdir()
    with run.lock():
        assert not (run.path / ".spairkit-tmp-0").exists(), "leftovers are swept"
        with (
            pytest.raises(InputError, match=rf"process {os.getpid()} on .+ is training here"),
            Run.open(run.path).lock(),
        ):
            pytest.fail("locked twice")
    with Run.open(run.path).lock():
        pass


TRAINER = """
import sys, torch
from pathlib import Path
from spairkit.storage.checkpoints import environment
from spairkit.storage.runs import Run

run = Run.open(Path(sys.argv[1]))
with run.lock():
    latest = run.latest()
    step = latest.step if latest else 0
    run.truncate_metrics(step)
    print(step, flush=True)
    while True:
        step += 1
        run.log({"step": step})
        tensors = {"w": torch.full((1000,), float(step))}
        run.save(step=step, model=tensors, optimiser=tensors, metrics={},
                 environment=environment(), is_best=step % 7 == 0)
"""


@pytest.mark.timeout(20)
def test_a_pipe_in_the_place_of_a_lock_is_not_waited_for(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    (run.path / ".lock").unlink()
    os.mkfifo(run.path / ".lock")
    assert not run.is_training


@pytest.mark.slow
def test_kill_9_loses_no_checkpoint_and_frees_the_lock(tmp_path: Path) -> None:
    """Kills come at random moments of continuous saving; forks share one import of torch."""
    run = new_run(tmp_path)
    code = f"""
import os, random, signal, sys, time
rng = random.Random(0)
import torch, spairkit.storage.runs
for _ in range(20):
    child = os.fork()
    if child == 0:
        exec(compile({TRAINER!r}, "trainer", "exec"))
    time.sleep(rng.uniform(0.05, 0.4))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(run.path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "neither an error nor a warning of damage"
    starts = [int(line) for line in done.stdout.split()]
    assert starts == sorted(starts), "no checkpoint is lost"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        latest = run.latest()
    assert latest is not None
    assert latest.step >= 5
    for step, path in run.checkpoints:
        loaded = load_checkpoint(path, with_optimiser=True)
        assert torch.equal(loaded.model["w"], torch.full((1000,), float(step)))
    recorded = [record["step"] for record in run.metrics()]
    assert recorded == list(range(1, len(recorded) + 1))
    assert recorded[-1] >= latest.step


def test_link_that_a_kill_left_is_passed_over(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    (run.path / ".spairkit-tmp-best").symlink_to("nowhere")
    assert Run.open(run.path).config == run.config
    (run.path / "other").symlink_to("nowhere")
    with pytest.raises(InputError, match="other: is a link"):
        Run.open(run.path)


def test_packaged_checkpoint_is_inside_the_package() -> None:
    import spairkit

    assert pretrained().is_relative_to(Path(spairkit.__file__).parent)
