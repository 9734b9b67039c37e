"""Sweeps of real, tiny runs: what they leave, and what survives stops, kills and bad words."""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch

from spairkit.cli.main import main
from spairkit.config import Config
from spairkit.config_values import differences, from_dict
from spairkit.errors import DivergedError, InputError
from spairkit.storage.checkpoints import load_checkpoint
from spairkit.storage.runs import Run
from spairkit.sweeps import sweep as sweeps
from spairkit.sweeps.processes import work_in_processes
from spairkit.sweeps.search_space import parse
from spairkit.sweeps.study import Definition
from spairkit.sweeps.sweep import Ended, Progress, Sweep
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
class Told:
    """How a command ended."""

    status: Any
    out: str
    err: str


Runner = Callable[..., Told]


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Runner:
    """Runs a command in this process, in an empty folder but for tiny.toml."""
    monkeypatch.chdir(tmp_path)
    Path("tiny.toml").write_text(TINY)

    def run_command(*arguments: object) -> Told:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(["sweep", *(str(argument) for argument in arguments)])
        captured = capsys.readouterr()
        return Told(ended.value.code, captured.out, captured.err)

    return run_command


def definition(**train: Any) -> Definition:
    import tomllib

    values = tomllib.loads(TINY)
    values["train"] |= train
    config = from_dict(values)
    space = parse(
        {"model": {"beta": [0.5, 1.0, 2.0], "position_prior_std": [0.5, 1.0]}}, config, ""
    )
    return Definition(config, space, 5)


def work(sweep: Sweep, trials: int, stop: Callable[[], bool] = lambda: False) -> list[Any]:
    told: list[Any] = []
    sweep.work(trials, CPU, stop, told.append)
    return told


def weights(run: Path) -> bytes:
    return (run / "last" / "model.safetensors").read_bytes()


def figures(run: Path) -> list[float]:
    return [r["elbo"] for r in Run.open(run).metrics() if r["kind"] == "validation"]


def test_a_sweep_ends_with_a_table_a_picture_and_words_to_paste(run: Runner) -> None:
    ended = run("--config", "tiny.toml", "--trials", 3, "--device", "cpu")
    assert ended.status == 0, ended.err
    folder = Path("runs/sweep-1")
    assert "sweeping in runs/sweep-1 on cpu: 3 trials, compared by validation elbo" in ended.err
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((folder / "sweep.json").read_text())
    assert set(results) == {"sweep", "figure", "seed", "space", "picture", "trials", "best"}
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
    best = results["best"]
    assert best["trial"] == results["trials"][0]["number"]
    words, path_line = ended.out.splitlines()[-2:]
    assert words == "best: " + " ".join(f"--set {word}" for word in best["set"])
    assert path_line == f"run: {best['run']}"

    before = {path: weights(path) for path in folder.glob("trial-*")}
    told = run("--out", folder, "--trials", 4, "--json")
    assert told.status == 0
    assert "going on with runs/sweep-1" in told.err
    assert len(json.loads(told.out)["trials"]) == 4
    assert {path: weights(path) for path in before} == before


def test_a_seed_gives_the_same_settings_and_figures(run: Runner) -> None:
    common = ("--config", "tiny.toml", "--trials", 2, "--json", "--quiet")
    one, other, third = (
        json.loads(run(*common, "--seed", seed).out)["trials"] for seed in (1, 1, 2)
    )
    kept = ("number", "values", "figure", "steps")
    assert [[t[k] for k in kept] for t in one] == [[t[k] for k in kept] for t in other]
    assert [t["values"] for t in one] != [t["values"] for t in third]


def test_a_stopped_trial_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    whole = Sweep.create(tmp_path / "whole", None, definition())
    work(whole, 2)
    sweep = Sweep.create(tmp_path / "stopped", None, definition())
    asked = iter(range(100))
    told = work(sweep, 2, stop=lambda: next(asked) >= 4)
    assert told[-1] == Ended(0, None)
    assert sweep.trials() == []
    assert load_checkpoint(sweep.run_path(0) / "last").step < 6
    again = Sweep.find(sweep.path, None)
    assert again is not None
    told = work(again, 2)
    assert [event.trial for event in told if isinstance(event, Ended)] == [0, 1]
    assert [(t.number, t.figure) for t in again.trials()] == [
        (t.number, t.figure) for t in whole.trials()
    ]
    for number in (0, 1):
        assert weights(again.run_path(number)) == weights(whole.run_path(number))


def test_ctrl_c_saves_and_says_how_to_go_on(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted_fit(*arguments: Any) -> Iterator[Any]:
        for event in fit(*arguments):
            signal.raise_signal(signal.SIGINT)
            yield event

    monkeypatch.setattr(sweeps, "fit", interrupted_fit)
    told = run("--config", "tiny.toml", "--trials", 2)
    assert told.status == 130
    assert "trial 0: stopped and saved" in told.err
    assert "go on with: spairkit sweep --out runs/sweep-1 --trials 2" in told.err
    assert load_checkpoint(Path("runs/sweep-1/trial-0000/last")).step == 1


@pytest.mark.slow
def test_a_killed_process_loses_nothing_but_its_time(tmp_path: Path) -> None:
    sweep = Sweep.create(tmp_path / "sweep", None, definition(steps=60, validation_every=10))
    killed: list[int] = []
    exits: list[int] = []
    for event in work_in_processes(sweep, 3, CPU, 2, lambda: False):
        if isinstance(event, int):
            exits.append(event)
        elif isinstance(event, Progress) and not killed:
            owner = (sweep.run_path(event.trial) / ".owner").read_text()
            os.kill(int(owner.split()[1]), signal.SIGKILL)
            killed.append(event.trial)
    assert exits == [-signal.SIGKILL]
    trials = sweep.trials()
    assert sorted(trial.number for trial in trials) == [0, 1, 2]
    assert {(trial.state, trial.steps) for trial in trials} == {("complete", 60)}
    assert len(figures(sweep.run_path(killed[0]))) == 6


def test_a_trial_whose_process_is_gone_is_made_by_another(tmp_path: Path) -> None:
    sweep = Sweep.create(tmp_path / "sweep", None, definition())
    study = optuna.load_study(
        study_name="sweep",
        storage=optuna.storages.JournalStorage(
            optuna.storages.journal.JournalFileBackend(str(tmp_path / "sweep" / "journal.log"))
        ),
    )
    study.ask()  # and nobody holds its run
    (sweep.run_path(0)).mkdir()  # killed as it was made
    work(sweep, 2)
    assert [(t.number, t.state) for t in sorted(sweep.trials(), key=lambda t: t.number)] == [
        (0, "complete"),
        (1, "complete"),
    ]
    study.ask()
    with Run.create(tmp_path / "sweep" / "trial-0003", definition().config).lock():
        assert work(sweep, 3) == []  # it runs elsewhere
        assert [t.state for t in sweep.trials()] == ["complete", "complete", "running"]


def test_a_trial_that_diverges_counts_and_is_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverging_fit(config: Config, run: Run, *rest: Any) -> Iterator[Any]:
        if run.path.name == "trial-0001":
            raise DivergedError("the losses were not finite")
        yield from fit(config, run, *rest)

    monkeypatch.setattr(sweeps, "fit", diverging_fit)
    sweep = Sweep.create(tmp_path / "sweep", None, definition())
    told = work(sweep, 3)
    assert Ended(1, None, "the losses were not finite") in told
    assert [(t.number, t.state) for t in sweep.trials()][-1] == (1, "failed")
    assert len(sweep.trials()) == 3
    assert work(sweep, 3) == []


def test_an_error_that_settings_do_not_mend_ends_the_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing_fit(*_: Any) -> Iterator[Any]:
        raise InputError("the disk is full")

    monkeypatch.setattr(sweeps, "fit", failing_fit)
    sweep = Sweep.create(tmp_path / "sweep", None, definition())
    with pytest.raises(InputError, match="the disk is full"):
        work(sweep, 3)
    monkeypatch.undo()
    work(sweep, 1)
    assert [(t.number, t.state) for t in sweep.trials()] == [(0, "complete")]


def test_a_database_serves_folders_that_share_nothing(run: Runner) -> None:
    url = f"sqlite:///{Path('trials.db').resolve()}"
    Path("here").mkdir()
    Path("there").mkdir()
    first = run(
        "--config", "tiny.toml", "--trials", 1, "--out", "here/s", "--storage", url, "--json"
    )
    assert first.status == 0, first.err
    second = run("--trials", 2, "--out", "there/s", "--storage", url, "--json")
    assert second.status == 0, second.err
    trials = sorted(json.loads(second.out)["trials"], key=lambda trial: int(trial["number"]))
    assert [trial["state"] for trial in trials] == ["complete"] * 2
    assert trials[0]["run"].endswith(f":{Path('here/s').resolve()}/trial-0000")
    assert trials[1]["run"] == "there/s/trial-0001"
    assert run("--trials", 2, "--storage", url).err.count("--storage needs --out") == 1


def test_more_trials_than_asked_for_are_dropped(tmp_path: Path) -> None:
    """As when two machines, of which neither sees the other's lock, begin the last one at once."""
    url = f"sqlite:///{tmp_path}/trials.db"
    sweep = Sweep.create(tmp_path / "sweep", url, definition())
    study = optuna.load_study(study_name="sweep", storage=url)
    offer = sweep._offer

    def late(trials: int) -> bool:
        answer = offer(trials)
        if answer:
            study.ask().set_user_attr("folder", "elsewhere:/sweep")
        return answer

    sweep._offer = late  # type: ignore[method-assign]
    assert work(sweep, 1) == []
    assert len(sweep.trials()) == 1
    assert sweep.trials()[0].run == "elsewhere:/sweep/trial-0000"


@pytest.mark.parametrize(
    "url",
    ["nonsense", "redis://localhost", "postgresql://nobody/nothing", "sqlite:////no/folder/x.db"],
)
def test_a_bad_storage_is_told_in_one_line(run: Runner, url: str) -> None:
    ended = run("--config", "tiny.toml", "--out", "new", "--storage", url)
    assert ended.status == 2
    assert ended.err.startswith("spairkit: ")
    assert "storage" in ended.err
    assert ended.err.count("\n") == 1
    assert not Path("new").exists()


def test_a_sweep_keeps_its_settings_and_its_folder(run: Runner) -> None:
    Sweep.create(Path("sweep"), None, definition())
    told = run("--out", "sweep", "--set", "train.steps=7", "--seed", 6)
    assert told.status == 2
    assert "train.steps: 6 -> 7; --seed: 5 -> 6; leave them out" in told.err
    Path("space.toml").write_text("model.beta = [9.0]\n")
    assert "its model is spair, not air" in run("--out", "sweep", "--model", "air").err
    assert "these differ: the search space" in run("--out", "sweep", "--space", "space.toml").err
    Path("taken").mkdir()
    Path("taken/file").touch()
    assert "not empty, and no sweep" in run("--config", "tiny.toml", "--out", "taken").err
    assert [path.name for path in Path("taken").iterdir()] == ["file"]
    Path("space.toml").write_text("model.bta = [9.0]\n")
    told = run("--config", "tiny.toml", "--out", "new", "--space", "space.toml")
    assert (told.status, Path("new").exists()) == (2, False)
    assert "bta: unknown key, did you mean beta?" in told.err


def test_a_damaged_journal_is_told_in_one_line(run: Runner) -> None:
    Sweep.create(Path("sweep"), None, definition())
    journal = Path("sweep/journal.log")
    journal.write_text("{broken\n" + journal.read_text())
    told = run("--out", "sweep")
    assert told.status == 2
    assert "storage cannot be used" in told.err


def test_without_optuna_it_says_how_to_get_it(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    for name in ("spairkit.sweeps.study", "spairkit.sweeps.sweep"):
        monkeypatch.delitem(sys.modules, name)
    told = run("--config", "tiny.toml")
    assert told.status == 2
    assert told.err == (
        "spairkit: a sweep needs Optuna, which is not installed: pip install '.[search]' in "
        "spairkit's folder\n"
    )
    assert not Path("runs").exists()
