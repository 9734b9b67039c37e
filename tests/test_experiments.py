"""`spairkit experiment` at the scale smoke: results, resumption, errors; the published figures."""

import errno
import json
import shutil
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from spairkit.cli.main import main
from spairkit.data.shapes import KINDS
from spairkit.errors import InputError
from spairkit.experiments.experiment import Measured, over_seeds
from spairkit.experiments.fidelity import DIFFERENCES
from spairkit.experiments.published import (
    FIGURE_2,
    FIGURE_3,
    FIGURE_4,
    FIGURE_7,
    OBJECTS_ARI,
    TABLE_1,
)
from spairkit.experiments.shared_runs import Ended, Started
from spairkit.experiments.work import (
    EXPERIMENTS,
    carry_out,
    concluded,
    is_measured,
    open_experiment,
)
from spairkit.training.loop import Step

CPU = torch.device("cpu")
AS_ONE = pytest.mark.parametrize("finished", ["fig7"], indirect=True)  # all share this code


@pytest.fixture(scope="module", params=EXPERIMENTS)
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of each experiment, carried out by the command; its name is the experiment's."""
    name: str = request.param
    if name == "fig6":
        pytest.importorskip("ale_py")
    folder = tmp_path_factory.mktemp("experiments") / name
    words = [name, "--scale", "smoke", "--out", str(folder), "--device", "cpu"]
    with pytest.raises(SystemExit) as ended:
        main(["experiment", *words, "--quiet"])
    assert ended.value.code == 0
    return folder


def test_results_are_those_measured(finished: Path) -> None:
    name = finished.name
    values = json.loads((finished / "results.json").read_text())
    experiment, settings, _, trials = open_experiment(name, finished)
    assert (settings.experiment, settings.scale) == (name, "smoke")
    assert {path.name for path in (finished / "runs").iterdir() if path.name[0] != "."} == {
        trial.name for trial in trials
    }
    measured: dict[float, int] = {}
    for trial in trials:
        content = json.loads((finished / "runs" / trial.name / "measured.json").read_text())
        assert content["figures"].keys() == trial.measures.keys()
        assert content == {k: v for k, v in values["runs"][trial.name].items() if v is not None}
        for figures in content["figures"].values():
            for value in figures.values():
                measured[value] = measured.get(value, 0) + 1
    table = (finished / "table.txt").read_text()
    for lines in values["charts"].values():
        for points in lines.values():
            assert points
            for point in points.values():
                # one seed: the mean is what was measured
                assert point["ours"]["mean"] in measured
                assert f"{point['ours']['mean']:.3f}" in table
                if point["published"]:
                    assert f"({point['published']['mean']:.3f})" in table
    for trend in values["trends"]:
        assert trend in table
    assert "scale smoke: " in table
    assert table.startswith(f"{name}: {experiment.about}\n")
    with Image.open(finished / "figure.png") as picture:
        assert picture.width > 500


@AS_ONE
def test_finished_experiment_is_not_repeated(
    finished: Path, in_process: Callable[..., Any]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in (finished / "runs").rglob("*.json")}
    status, out, _ = in_process("experiment", finished.name, "--out", finished, "--json")
    assert status == 0
    assert json.loads(out) == json.loads((finished / "results.json").read_text())
    assert before == {path: path.stat().st_mtime_ns for path in (finished / "runs").rglob("*.json")}


def stop_after(calls: int) -> Callable[[], bool]:
    """Asks to stop from the call after `calls` on."""
    counter = count(1)
    return lambda: next(counter) > calls


def test_interrupted_experiment_resumes_bit_identically(tmp_path: Path) -> None:
    """Stopped within the training, before a measure and between two measures."""
    results: dict[tuple[str, str], tuple[bytes, Any, int]] = {}
    for name in ("whole", "stopped"):
        folder, rounds = tmp_path / name, 0
        every = open_experiment("fig2", folder, scale="smoke")[3]
        trials = [trial for trial in every if trial.name.startswith(("spair-1", "conncomp-1"))]
        assert len(trials) == 2
        while not all(is_measured(trial, folder) for trial in trials):
            rounds += 1
            list(carry_out(trials, folder, CPU, stop_after(10**6 if name == "whole" else rounds)))
        assert rounds == 1 if name == "whole" else rounds > 3
        for trial in trials:
            run = folder / "runs" / trial.name
            measured = json.loads((run / "measured.json").read_text())
            weights = (run / "last" / "model.safetensors").read_bytes()
            results[name, trial.name] = weights, measured["figures"], measured["steps"]
    for trial in trials:
        assert results["whole", trial.name] == results["stopped", trial.name]


def digits_file(path: Path, seed: int) -> Path:
    """A file of random digits in MNIST's form."""
    digits = np.random.default_rng(seed).integers(1, 256, (200, 28, 28), np.uint8)
    labels = np.arange(200) % 10
    np.savez(path, x_train=digits, y_train=labels, x_test=digits, y_test=labels)
    return path


def test_file_of_digits_may_move(tmp_path: Path, in_process: Callable[..., Any]) -> None:
    first, other = (digits_file(tmp_path / f"{seed}.npz", seed) for seed in (1, 2))
    words = ["experiment", "fig7", "--scale", "smoke", "--out", tmp_path / "out", "--quiet"]
    assert in_process(*words, "--data", first).status == 0
    assert "digits of 1.npz" in (tmp_path / "out/table.txt").read_text()
    (tmp_path / "elsewhere").mkdir()
    moved = first.rename(tmp_path / "elsewhere" / first.name)
    measured = next((tmp_path / "out/runs").glob("*/measured.json"))
    before = json.loads(measured.read_text())["figures"]
    measured.unlink()
    status, _, err = in_process(*words)
    assert status == 2
    assert "give them with --data" in err
    status, _, err = in_process(*words, "--data", other)
    assert status == 2
    assert "not the images of" in err
    assert in_process(*words, "--data", moved).status == 0
    assert json.loads(measured.read_text())["figures"] == before


def test_experiments_are_listed(in_process: Callable[..., Any]) -> None:
    status, out, _ = in_process("experiment")
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()] == list(EXPERIMENTS)
    assert json.loads(in_process("experiment", "--json").out).keys() == EXPERIMENTS.keys()


@AS_ONE
def test_errors_are_one_line_and_leave_nothing(
    finished: Path, tmp_path: Path, in_process: Callable[..., Any]
) -> None:
    name, new = finished.name, tmp_path / "new"
    (tmp_path / "images").mkdir()
    (tmp_path / "broken.npz").write_bytes(b"PK")
    for words, message in (
        (["fig99"], "unknown experiment 'fig99'; choose from: fig2"),
        ([name, "--out", new, "--data", tmp_path / "images"], "--data"),
        ([name, "--out", new, "--data", tmp_path / "missing.npz"], "missing.npz"),
        ([name, "--out", new, "--data", tmp_path / "broken.npz"], "broken.npz"),
        ([name, "--out", new, "--scale", "big"], "'big' is not one of 'smoke', 'cpu', 'full'"),
        ([name, "--out", finished, "--seeds", 7], "seeds: 1 -> 7; omit them, or pass another"),
        ([name, "--out", finished, "--scale", "cpu"], "scale: smoke -> cpu"),
        ([name, "--out", tmp_path], "not empty; name another folder"),
    ):
        status, out, err = in_process("experiment", *words)
        assert (status, out) == (2, ""), words
        assert message in err
        assert len(err.splitlines()) == 1, err
        assert not new.exists()


def test_missing_extra_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_process: Callable[..., Any]
) -> None:
    monkeypatch.setitem(sys.modules, "ale_py", None)
    status, out, err = in_process("experiment", "fig6", "--scale", "smoke", "--out", tmp_path / "x")
    assert (status, out) == (2, "")
    assert "need ale-py, which is not installed" in err
    assert len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def fill_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every later write finds no space."""

    def refuse(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("spairkit.storage.durable._write_new", refuse)


@AS_ONE
def test_full_disk_is_one_line(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_process: Callable[..., Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, "copy", symlinks=True)

    fill_disk(monkeypatch)
    before = (tmp_path / "copy/table.txt").read_bytes()
    status, out, err = in_process("experiment", finished.name, "--out", "copy", "--quiet")
    assert (status, out) == (2, "")
    assert "No space left on device; free some space or write elsewhere" in err
    assert (tmp_path / "copy/table.txt").read_bytes() == before


def test_images_without_space_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_process: Callable[..., Any]
) -> None:
    fill_disk(monkeypatch)
    words = ("experiment", "objects", "--scale", "smoke", "--out", tmp_path / "new")
    status, out, err = in_process(*words)
    assert (status, out) == (2, "")
    assert "No space left on device; free some space or write elsewhere" in err
    assert len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@AS_ONE
def test_damaged_files_are_refused(finished: Path, in_process: Callable[..., Any]) -> None:
    name = finished.name
    trial = open_experiment(name, finished)[3][0]
    first = next(iter(trial.measures))
    measured = finished / "runs" / trial.name / "measured.json"
    nan = json.dumps({"steps": 1, "figures": {first: {"ap": float("nan")}}})
    empty = json.dumps({"steps": 2, "figures": {key: {} for key in trial.measures}})
    for path, text, message in (
        (measured, "[]", "not the figures of a run; delete it"),
        (measured, nan, "not the figures of a run; delete it"),
        (measured, empty, "is missing in a measured.json"),
        (finished / "settings.json", "{}", "not the settings of an experiment"),
        (finished / "settings.json", '{"experiment": [', "not JSON"),
        (
            finished / "settings.json",
            json.dumps({"experiment": name, "scale": "smoke", "seeds": 0}),
            "seeds are from 1",
        ),
    ):
        whole = path.read_text()
        path.write_text(text)
        status, out, err = in_process("experiment", name, "--out", finished, "--quiet")
        path.write_text(whole)
        assert (status, out) == (2, ""), text
        assert message in err
        assert "Traceback" not in err


def test_seeds_of_a_method_are_averaged() -> None:
    measured = {
        f"{method}-seed-{seed}": Measured(1, None, {"test": {"ap": value}})
        for method, values in {"spair-1": (0.5, 0.75, 0.625), "spair-11": (0.0, 0.0)}.items()
        for seed, value in enumerate(values)
    }
    found = over_seeds(measured, "spair-1", "test", "ap")
    assert found.values == (0.5, 0.75, 0.625)
    assert found.mean == fmean(found.values)
    assert found.low < found.mean < found.high


def test_every_scale_has_valid_configs(tmp_path: Path) -> None:
    """The paper's and the CPU's trials, though no test carries them out."""
    for name, experiment in EXPERIMENTS.items():
        if not experiment.takes_digits:
            continue  # it makes its images
        for scale, updates in (("cpu", None), ("full", 200_000)):
            _, settings, _, trials = open_experiment(
                name, tmp_path / f"{name}-{scale}", scale=scale
            )
            assert len({trial.name for trial in trials}) == len(trials)
            effort = experiment.effort(settings)
            assert {t.config.train.seed for t in trials} == set(range(effort.seeds))
            neural = [t.config for t in trials if t.config.model.kind in ("spair", "air", "dair")]
            assert {config.train.steps for config in neural} == {updates or effort.steps}
            assert {config.preset for config in neural} == {"quick" if scale == "cpu" else "paper"}


def test_published_figures_are_those_of_the_paper() -> None:
    for rows in FIGURE_2.values():
        assert list(rows) == [1, 3, 5, 7, 9]
    lines_of_3 = {"conncomp", "1-5", "6-10", "11-15"}
    for figure, lines in FIGURE_3.items():
        assert lines.keys() == lines_of_3
        for line in lines.values():
            assert list(line) == list(range(1, 21))
            assert all(
                0 <= item.mean <= (3 if figure == "count_error" else 1) for item in line.values()
            )
    for figure, lines in FIGURE_7.items():
        assert lines.keys() == {"lateral", "no-lateral"}
        for line in lines.values():
            assert list(line) == list(range(1, 21))
            most = 3.5 if figure == "count_error" else 1
            assert all(0 <= item.mean <= most for item in line.values())
        # the paper's claim: lateral context is better, at any number
        for n in range(1, 21):
            gain = lines["lateral"][n].mean - lines["no-lateral"][n].mean
            assert gain > 0 if figure == "ap_spair" else gain < 0
    # of the same counts, errors are at least the share that is wrong
    for published in (FIGURE_3, FIGURE_7):
        for name in published["count_error"].keys() - {"conncomp"}:  # it has two thresholds
            for n in range(1, 21):
                error, wrong = (published[key][name][n] for key in ("count_error", "count_wrong"))
                assert error.mean >= wrong.mean
    assert [FIGURE_3["count_wrong"]["11-15"][n].mean for n in (5, 10, 20)] == [0.12, 0.281, 0.55]
    for method, line in FIGURE_4.items():
        sizes = [1000 * 2**k for k in range(8)]
        assert list(line) == [n for n in sizes if method != "conncomp" or n not in (4000, 8000)]
        assert all(0 <= item.low <= item.mean <= item.high <= 1 for item in line.values())
    order = ("truebb", "spair-unfixed", "spair-fixed", "conncomp", "convnet", "air-unfixed")
    largest = [FIGURE_4[method][128_000].mean for method in order]
    assert largest == sorted(largest, reverse=True)
    assert OBJECTS_ARI.keys() == KINDS.keys()
    for methods in OBJECTS_ARI.values():
        assert all(0 < mean <= 1 and 0 < std < 0.1 for mean, std in methods.values())
    assert TABLE_1["spair"][0] > TABLE_1["truebb"][0] > TABLE_1["convnet"][0]


def test_every_difference_of_the_sources_is_measured_or_explained(tmp_path: Path) -> None:
    text = (Path(__file__).parent.parent / "docs/model.md").read_text()
    table = text.partition("## 13. Differences")[2].partition("\n## ")[0]
    rows = [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines() if "|" in line]
    assert list(DIFFERENCES) == rows[2:]
    _, _, _, trials = open_experiment("fidelity", tmp_path / "new", scale="smoke")
    made = {trial.name.rpartition("-seed-")[0] for trial in trials}
    made |= {measure for trial in trials for measure in trial.measures}
    shown = {name for names in DIFFERENCES.values() if isinstance(names, tuple) for name in names}
    assert made - shown == {"baseline", "conncomp", "paper"}
    assert shown < made


def test_events_name_training_and_measuring(tmp_path: Path) -> None:
    _, _, _, trials = open_experiment("fig2", tmp_path, scale="smoke")
    events = list(carry_out(trials[3:4], tmp_path, CPU))
    assert [type(e) for e in events if isinstance(e, (Started, Step, Ended))] == [
        Started,
        Step,
        Step,
        Step,
        Started,
        Step,
        Ended,
    ]
    assert [(e.steps, e.unit) for e in events if isinstance(e, Started)] == [
        (3, "steps"),
        (1, "measures"),
    ]
    assert isinstance(events[-1], Ended)
    assert events[-1].figures


def test_conclusion_needs_every_measure(tmp_path: Path) -> None:
    experiment, settings, _, trials = open_experiment("fig2", tmp_path, scale="smoke")
    list(carry_out(trials[3:4], tmp_path, CPU))
    with pytest.raises(InputError, match=r"spair-1-seed-0/measured.json"):
        concluded(experiment, settings, tmp_path, trials)
