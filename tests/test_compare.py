"""`spairkit compare` from end to end, at a scale that is done in seconds, stopped and gone on."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from scipy import stats

from spairkit.cli.main import main
from spairkit.experiments.compare import Finished, Started, compare
from spairkit.experiments.folder import begin, is_finished
from spairkit.experiments.intervals import Interval, t_interval
from spairkit.experiments.published import FIGURE_2
from spairkit.experiments.settings import Settings, settings_from
from spairkit.experiments.table import Cell, Row, advice, summary, tabulated
from spairkit.images import write_png
from spairkit.storage.checkpoints import load_checkpoint
from spairkit.storage.runs import Run
from spairkit.training.loop import Step

CPU = torch.device("cpu")
NETWORK = {"what": 4, "encoder_hidden": [8], "decoder_hidden": [8]}
TINY: dict[str, Any] = {
    "data": {"image_height": 24, "image_width": 24, "validation_images": 6, "test_images": 8},
    "spair": {"model": {"backbone_channels": [4], "features": 8, "hidden": 8, **NETWORK}},
    "air": {"model": {"units": 8, "output_hidden": 8, **NETWORK}},
    "dair": {"model": {"units": 8, "difference_hidden": [8], "output_hidden": 8, **NETWORK}},
    "conncomp": {"model": {"images": 8}, "train": {"steps": 4}},
}
WORDS = [
    word
    for table, keys in TINY.items()
    for key, value in (
        keys.items()
        if table == "data"
        else ((f"{t}.{k}", v) for t, values in keys.items() for k, v in values.items())
    )
    for word in ("--set", f"{table}.{key}={value}")
]


def settings(**changes: Any) -> Settings:
    values = {
        "models": ["spair", "air", "dair", "conncomp"],
        "objects": [1],
        "seeds": 2,
        "preset": "quick",
        "budget_updates": 3,
        "data": {},
        "over": TINY,
    }
    return settings_from({**values, **changes}, "test")


def run_all(folder: Path, chosen: Settings) -> list[Any]:
    begin(folder, chosen)
    return list(compare(chosen, folder, CPU))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished comparison of all four models."""
    folder = tmp_path_factory.mktemp("comparison") / "whole"
    run_all(folder, settings())
    return folder


def command(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[Any, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["compare", *map(str, words)])
    printed = capsys.readouterr()
    return ended.value.code, printed.out, printed.err


def test_t_interval() -> None:
    values = [0.5, 0.75, 0.625, 0.9]
    found = t_interval(values)
    low, high = stats.t.interval(0.95, 3, loc=sum(values) / 4, scale=stats.sem(values))
    assert (found.low, found.high) == pytest.approx((low, high))
    # by hand: the table's 12.706 for one degree of freedom
    two = t_interval([0.2, 0.4])
    assert two.mean == pytest.approx(0.3)
    assert two.half_width == pytest.approx(12.7062 * 0.1, rel=1e-5)
    assert t_interval([0.25]) == Interval(0.25, None, (0.25,))
    with pytest.raises(ValueError, match="at least one"):
        t_interval([])


def test_published_figures_lie_in_their_intervals() -> None:
    for rows in FIGURE_2.values():
        assert list(rows) == [1, 3, 5, 7, 9]
        for figure in rows.values():
            assert 0 <= figure.low <= figure.mean <= figure.high <= 1
    assert FIGURE_2["spair"][3].mean == 0.696
    assert FIGURE_2["conncomp"][1].low == FIGURE_2["conncomp"][1].mean == 0.989


def test_a_comparison_trains_and_measures_every_run(whole: Path) -> None:
    chosen = settings()
    assert is_finished(chosen, whole)
    names = {path.name for path in (whole / "runs").iterdir() if not path.name.startswith(".")}
    assert names == {f"{model}-1-seed-{seed}" for model in chosen.models for seed in (0, 1)}
    rows = tabulated(chosen, whole)
    assert [row.objects for row in rows] == [1]
    assert rows[0].overlapping == 0
    assert "8 scenes of 24 × 24 px, 1 glyph of 14 px" in rows[0].measured_on
    for row in rows:
        assert list(row.cells) == list(chosen.models)
        for model, cell in row.cells.items():
            runs = [whole / "runs" / f"{model}-{row.objects}-seed-{seed}" for seed in (0, 1)]
            tests = [json.loads((run / "test.json").read_text()) for run in runs]
            for name, interval in cell.figures.items():
                assert interval.values == tuple(test["overall"][name] for test in tests)
            assert cell.steps == (4 if model == "conncomp" else 3)
            assert cell.seconds is not None
            assert cell.seconds > 0
            for run in runs:
                assert Run.open(run).config.data.min_objects == row.objects
                assert load_checkpoint(run / "last").step == cell.steps
    # told the counts, they count right
    assert rows[0].cells["air"].figures["count_accuracy"].mean == 1


def test_what_is_done_is_not_done_again(whole: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (whole / "runs").rglob("*.json")}
    events = run_all(whole, settings())
    assert [type(event) for event in events] == [Finished] * 8
    assert before == {path: path.stat().st_mtime_ns for path in (whole / "runs").rglob("*.json")}


def is_long(steps: list[Step], allowed: int) -> bool:
    return len(steps) >= allowed


def test_stopped_anywhere_it_goes_on_to_the_same_bits(whole: Path, tmp_path: Path) -> None:
    chosen = settings(models=["spair", "dair", "conncomp"], seeds=1)
    begin(tmp_path, chosen)
    started: list[str] = []
    for allowed in (1, 2, 4, 100):
        steps: list[Step] = []
        stop = partial(is_long, steps, allowed)
        for event in compare(chosen, tmp_path, CPU, stop):
            if isinstance(event, Step):
                steps.append(event)
            elif isinstance(event, Started):
                started.append(event.task.name)
    assert is_finished(chosen, tmp_path)
    assert len(started) > 3
    for task in chosen.tasks():
        mine, theirs = tmp_path / "runs" / task.name, whole / "runs" / task.name
        for name in ("last/model.safetensors", "metrics.jsonl"):
            assert (mine / name).read_bytes() == (theirs / name).read_bytes(), task.name
    for model, cell in tabulated(chosen, tmp_path)[0].cells.items():
        every = tabulated(settings(), whole)[0].cells[model].figures
        assert {name: figure.mean for name, figure in cell.figures.items()} == {
            name: figure.values[0] for name, figure in every.items()
        }


def test_a_run_that_another_process_makes_is_passed_over(tmp_path: Path) -> None:
    from filelock import FileLock

    chosen = settings(models=["conncomp"], objects=[1, 2], seeds=1)
    begin(tmp_path, chosen)
    (tmp_path / "runs").mkdir()
    with FileLock(tmp_path / "runs" / ".conncomp-1-seed-0.lock"):
        events = list(compare(chosen, tmp_path, CPU))
    assert [event.task.objects for event in events if isinstance(event, Finished)] == [2]
    assert not is_finished(chosen, tmp_path)
    list(compare(chosen, tmp_path, CPU))
    assert is_finished(chosen, tmp_path)
    rows = tabulated(chosen, tmp_path)
    assert [row.objects for row in rows] == [1, 2]
    assert rows[0].overlapping == 0 < rows[1].overlapping
    table = summary(chosen, rows)["rows"]
    assert not any(line["models"]["conncomp"]["published_ap_spair"] for line in table)
    papers = [replace(row, is_papers=True) for row in rows]
    published = [
        line["models"]["conncomp"]["published_ap_spair"] for line in summary(chosen, papers)["rows"]
    ]
    assert published == [{"mean": 0.989, "low": 0.989, "high": 0.989}, None]


def test_a_budget_in_time_becomes_updates_that_the_seeds_share(tmp_path: Path) -> None:
    chosen = settings(models=["spair"], objects=[1], budget_updates=None, budget_seconds=2.0)
    events = [event for event in run_all(tmp_path, chosen) if isinstance(event, Started)]
    assert [event.measured for event in events] == [True, False]
    assert events[0].steps == events[1].steps >= 10
    for seed in (0, 1):
        run = Run.open(tmp_path / "runs" / f"spair-1-seed-{seed}")
        assert run.config.train.steps == events[0].steps
        assert load_checkpoint(run.path / "last").step == events[0].steps


def test_the_command_prints_and_writes_the_result(
    whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = command(capsys, "--out", whole, "--device", "cpu")
    assert status == 0
    assert f"comparing in {whole} on cpu: 8 runs, 3 updates for each run that learns" in err
    for text in ("SPAIR", "DAIR", "ConnComp", "±", "1 to an image (0 % of", "budget"):
        assert text in out
    with Image.open(whole / "figure.png") as picture:
        assert min(picture.size) > 400
    status, out, _ = command(capsys, "--out", whole, "--json")
    assert status == 0
    values = json.loads(out)
    assert json.loads((whole / "results.json").read_text()) == values
    assert values.keys() >= {"comparison", "settings", "budget", "rows", "advice", "protocols"}
    assert values["budget"] == "3 updates for each run that learns"
    assert [row["objects"] for row in values["rows"]] == [1]
    models = values["rows"][0]["models"]
    assert list(models) == ["spair", "air", "dair", "conncomp"]
    assert models["spair"]["published_ap_spair"] is None, "of images of another size"
    assert models["spair"]["ap"].keys() == {"mean", "half_width", "values"}
    assert len(models["spair"]["ap"]["values"]) == 2


def test_other_settings_are_refused(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--out", whole, "--seeds", "3", "--budget", "4", "--models", "spair"]
    status, out, err = command(capsys, *words)
    assert (status, out) == (2, "")
    assert "a comparison keeps its settings, and these differ: models: " in err
    assert "seeds: 2 -> 3" in err
    assert "budget_updates: 3 -> 4" in err
    assert err.count("\n") == 1
    # what it has, it may be asked for
    assert command(capsys, "--out", whole, "--seeds", "2", "--budget", "3", *WORDS)[0] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--models", "spair,yolo"], "models.1: Input should be 'spair', 'air', 'dair' or"),
        (["--objects", "1,x"], "--objects 1,x: write numbers, as 1,3,5"),
        (["--objects", "3,3"], "objects must differ from each other, got [3, 3]"),
        (["--seeds", "0"], "seeds: Input should be greater than or equal to 1 (got 0)"),
        (["--set", "data=3"], "--set data: write data., model. or train. and a key"),
        (["--set", "spair=3"], "--set spair.: write data., model. or train. and a key"),
        (["--set", "preset=paper"], "--set preset: write data., model. or train. and a key"),
        (["--set", "train.seed=5"], "--set train.seed: the comparison sets it itself"),
        (["--set", "spair.model.kind=air"], "--set spair.model.kind: the comparison sets it"),
        (["--set", "data.max_objects=2"], "--set data.max_objects: the comparison sets it"),
        (["--set", "spair.data.seed=2"], "--set spair.data: all models see the same images"),
        (["--budget", "soon"], "--budget soon: write updates"),
        (["--preset", "slow"], "unknown preset 'slow'"),
        (["--set", "spair.model.whats=3"], "model.whats: unknown key, did you mean what?"),
        (["--objects", "100"], "more area than the image has"),
    ],
)
def test_mistakes_leave_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    status, out, err = command(capsys, "--out", tmp_path / "new", *words)
    assert (status, out) == (2, "")
    assert message in err
    assert not (tmp_path / "new").exists()


def test_a_folder_of_images_is_one_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    boxes = [[2, 3, 6, 5], [14, 10, 5, 8]]
    names = [f"{n}.png" for n in range(3)]
    for name in names:
        image = torch.zeros(3, 24, 30)
        for x, y, width, height in boxes:
            image[:, y : y + height, x : x + width] = 0.75
        write_png(folder / name, image)
    words = ["--data", folder, "--out", tmp_path / "own", "--seeds", "1", "--budget", "2", *WORDS]
    status, _, err = command(capsys, *words)
    assert status == 2
    assert "nothing to compare with: no annotations.json" in err
    content = {
        "images": [{"id": n, "file_name": name} for n, name in enumerate(names)],
        "categories": [{"id": 1}],
        "annotations": [
            {"id": 2 * n + i, "image_id": n, "category_id": 1, "bbox": box}
            for n in range(3)
            for i, box in enumerate(boxes)
        ],
    }
    (folder / "annotations.json").write_text(json.dumps(content))
    status, _, err = command(capsys, *words, "--models", "air")
    assert status == 2
    assert "AIR takes images of one size, here 24x24 px" in err
    status, out, err = command(capsys, *words)
    assert status == 0, err
    assert "AIR and DAIR take images of one size and are left out" in err
    assert "these images (0 % of the boxes overlap another): ConnComp, AP 1.000, before" in out
    assert "one seed gives no intervals" in out
    assert "measured on all of the images, those for training included" in out
    assert "(0." not in out
    assert (tmp_path / "own" / "figure.png").is_file()


def row(overlapping: float = 0.0, **aps: tuple[float, float | None, float]) -> Row:
    """Mean AP, half width and seconds of each model."""
    cells = {
        model: Cell(
            {"ap": Interval(mean, half, (mean,) * (1 if half is None else 3))},
            5,
            seconds,
            told=model == "air",
        )
        for model, (mean, half, seconds) in aps.items()
    }
    return Row(3, overlapping, "", cells)


def test_advice_follows_its_rules() -> None:
    wins = row(0.5, spair=(0.8, 0.02, 99), air=(0.3, 0.1, 9), conncomp=(0.6, 0.0, 1))
    lines = advice([wins])
    assert lines[0] == (
        "3 to an image (50 % of the boxes overlap another): SPAIR, AP 0.800 ± 0.020, before "
        "ConnComp's 0.600 ± 0.000"
    )
    assert lines[1].startswith("the rules: ")
    ties = advice([row(0.1, spair=(0.8, 0.02, 99), conncomp=(0.79, 0.0, 1))])
    assert ": ConnComp, AP 0.790 ± 0.000, not to be told from SPAIR's 0.800 ± 0.020, and" in ties[0]
    assert "seldom touch: here up to 10 % of the boxes overlap" in ties[1]
    assert not any("told the true numbers" in line for line in ties)
    unsure = advice([row(spair=(0.7, 0.3, 99), conncomp=(0.79, 0.0, 1))])
    assert ": ConnComp, AP 0.790 ± 0.000, not to be told from SPAIR's 0.700 ± 0.300" in unsure[0]
    told = advice([row(spair=(0.5, 0.02, 99), air=(0.7, 0.02, 9))])
    assert "SPAIR, AP 0.500 ± 0.020; AIR's 0.700 ± 0.020 is higher, but it is told" in told[0]
    assert any(line.startswith("AIR is told the true numbers") for line in told)
    single = advice([row(spair=(0.8, None, 99), conncomp=(0.79, None, 1))])
    assert ": SPAIR, AP 0.800, before" in single[0]
    assert any("one seed" in line for line in single)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_signal_saves_and_the_same_command_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: int
) -> None:
    out = tmp_path / "own"
    words = ["--out", str(out), "--seeds", "1", "--workers", str(workers)]
    many = ["--objects", "1", "--models", "spair,dair", "--budget", "60", *WORDS]
    with subprocess.Popen(
        [sys.executable, "-m", "spairkit", "compare", *words, *many],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        try:
            while not list(out.glob("runs/*/last")):
                assert process.poll() is None
                time.sleep(0.05)
            process.send_signal(signal.SIGTERM)
            printed, said = process.communicate(timeout=100)
        finally:
            process.kill()
    assert process.returncode == 143
    assert printed == ""
    assert f"stopped, saved; go on with: spairkit compare --out {out}" in said
    assert "Traceback" not in said
    status, printed, said = command(capsys, *words, "--json")
    assert status == 0, said
    values = json.loads(printed)
    assert math.isfinite(values["rows"][0]["models"]["dair"]["ap"]["mean"])
