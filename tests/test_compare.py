"""`spairkit compare` end to end with tiny runs: results, resumption and error messages."""

import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from scipy import stats

from spairkit.cli.main import main
from spairkit.config import SPAIRConfig
from spairkit.data.datasets import evaluation_batches, open_dataset
from spairkit.detector import load
from spairkit.evaluation import evaluate
from spairkit.experiments.compare import compare, is_evaluated
from spairkit.experiments.folder import Comparison, Method, folder_advice, recommended
from spairkit.experiments.intervals import Interval, t_interval
from spairkit.experiments.picture import draw_comparison
from spairkit.experiments.published import FIGURE_2
from spairkit.experiments.settings import MODELS, Settings, config_of, open_comparison
from spairkit.experiments.shared_runs import Ended, Started, claimed
from spairkit.experiments.side_by_side import Panel, _window, draw_side_by_side
from spairkit.experiments.table import Cell, Row, advice, summary, tabulate
from spairkit.images import write_png
from spairkit.presets import resolve
from spairkit.storage.checkpoints import load_checkpoint
from spairkit.storage.runs import Run
from spairkit.training.loop import Step

CPU = torch.device("cpu")
NETWORK = {"what": 4, "encoder_hidden": [8], "decoder_hidden": [8]}
TINY: dict[str, Any] = {
    "data": {"image_height": 24, "image_width": 24, "validation_images": 6, "test_images": 8},
    "spair": {
        "model": {"backbone_channels": [4], "features": 8, "hidden": 8, **NETWORK},
        "search": {"mode": "refine"},  # moves of an untrained network take long
    },
    "air": {"model": {"units": 8, "output_hidden": 8, **NETWORK}},
    "dair": {"model": {"units": 8, "difference_hidden": [8], "output_hidden": 8, **NETWORK}},
    "conncomp": {"model": {"images": 8}, "train": {"steps": 4}},
}
BOXES = [[2, 3, 6, 5], [14, 10, 5, 8]]  # x, y, width, height
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


@pytest.fixture
def squares(tmp_path: Path) -> Path:
    """Three images of two rectangles on black."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(3):
        image = torch.zeros(3, 24, 30)
        for x, y, width, height in BOXES:
            image[:, y : y + height, x : x + width] = 0.75
        write_png(folder / f"{number}.png", image)
    return folder


def annotate(folder: Path) -> None:
    """Gives the first two images their boxes."""
    content = {
        "images": [{"id": n, "file_name": f"{n}.png"} for n in range(2)],
        "categories": [{"id": 1}],
        "annotations": [
            {"id": 2 * n + i, "image_id": n, "category_id": 1, "bbox": box}
            for n in range(2)
            for i, box in enumerate(BOXES)
        ],
    }
    (folder / "annotations.json").write_text(json.dumps(content))


def begin(folder: Path, **changes: Any) -> Settings:
    """A comparison in the folder, new or to resume."""
    asked = {"objects": [1], "seeds": 2, "budget": "3", "over": TINY, **changes}
    return open_comparison(folder, asked)[1]


def is_finished(chosen: Settings, folder: Path) -> bool:
    return all(is_evaluated(chosen, folder / "runs" / task.name) for task in chosen.tasks())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished comparison of all four models."""
    folder = tmp_path_factory.mktemp("comparison") / "whole"
    list(compare(begin(folder), folder, CPU))
    return folder


def command(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[Any, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["compare", *map(str, words)])
    printed = capsys.readouterr()
    return ended.value.code, printed.out, printed.err


def test_t_interval_equals_scipy() -> None:
    values = [0.5, 0.75, 0.625, 0.9]
    found = t_interval(values)
    low, high = stats.t.interval(0.95, 3, loc=sum(values) / 4, scale=stats.sem(values))
    assert (found.low, found.high) == pytest.approx((low, high))
    # by hand: the table's 12.706 for one degree of freedom
    two = t_interval([0.2, 0.4])
    assert two.mean == pytest.approx(0.3)
    assert two.high - two.mean == pytest.approx(12.7062 * 0.1, rel=1e-5)
    assert str(two) == "0.300 ± 1.271"
    assert t_interval([0.25]) == Interval(0.25, 0.25, 0.25, (0.25,))
    assert str(t_interval([0.25])) == "0.250"


def test_published_figures_lie_in_their_intervals() -> None:
    for rows in FIGURE_2.values():
        assert list(rows) == [1, 3, 5, 7, 9]
        for figure in rows.values():
            assert 0 <= figure.low <= figure.mean <= figure.high <= 1
    assert FIGURE_2["spair"][3].mean == 0.696
    assert FIGURE_2["conncomp"][1].low == FIGURE_2["conncomp"][1].mean == 0.989


def test_comparison_trains_and_evaluates_every_run(whole: Path) -> None:
    chosen = begin(whole)
    assert is_finished(chosen, whole)
    names = {path.name for path in (whole / "runs").iterdir() if not path.name.startswith(".")}
    assert names == {f"{model}-1-seed-{seed}" for model in chosen.models for seed in (0, 1)}
    rows = tabulate(chosen, whole)
    assert [row.objects for row in rows] == [1]
    assert rows[0].overlapping == 0
    assert "8 scenes of 24 × 24 px, 1 glyph of 14 px" in rows[0].measured_on
    for row in rows:
        assert list(row.models) == list(chosen.models)
        for model, cell in row.models.items():
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
    # AIR is given the counts
    assert rows[0].models["air"].figures["count_accuracy"].mean == 1


def test_finished_comparison_is_not_repeated(whole: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (whole / "runs").rglob("*.json")}
    events = list(compare(begin(whole), whole, CPU))
    assert [type(event) for event in events] == [Ended] * 8
    assert before == {path: path.stat().st_mtime_ns for path in (whole / "runs").rglob("*.json")}


def has_enough_steps(steps: list[Step], allowed: int) -> bool:
    return len(steps) >= allowed


def test_stopped_comparison_resumes_bit_identically(whole: Path, tmp_path: Path) -> None:
    chosen = begin(tmp_path, models=["spair", "dair", "conncomp"], seeds=1)
    started: list[str] = []
    for allowed in (1, 2, 4, 100):
        steps: list[Step] = []
        stop = partial(has_enough_steps, steps, allowed)
        for event in compare(chosen, tmp_path, CPU, stop):
            if isinstance(event, Step):
                steps.append(event)
            elif isinstance(event, Started):
                started.append(event.name)
    assert is_finished(chosen, tmp_path)
    assert len(started) > 3
    for task in chosen.tasks():
        mine, theirs = tmp_path / "runs" / task.name, whole / "runs" / task.name
        for name in ("last/model.safetensors", "metrics.jsonl"):
            assert (mine / name).read_bytes() == (theirs / name).read_bytes(), task.name
    for model, cell in tabulate(chosen, tmp_path)[0].models.items():
        every = tabulate(begin(whole), whole)[0].models[model].figures
        assert {name: figure.mean for name, figure in cell.figures.items()} == {
            name: figure.values[0] for name, figure in every.items()
        }


def test_run_claimed_by_another_process_is_skipped(tmp_path: Path) -> None:
    chosen = begin(tmp_path, models=["conncomp"], objects=[1, 2], seeds=1)
    (tmp_path / "runs").mkdir()
    with claimed(tmp_path / "runs" / "conncomp-1-seed-0") as mine:
        assert mine
        events = list(compare(chosen, tmp_path, CPU))
    assert [e.name for e in events if isinstance(e, Ended)] == ["conncomp-2-seed-0"]
    assert not is_finished(chosen, tmp_path)
    list(compare(chosen, tmp_path, CPU))
    assert is_finished(chosen, tmp_path)
    rows = tabulate(chosen, tmp_path)
    assert [row.objects for row in rows] == [1, 2]
    assert rows[0].overlapping == 0 < rows[1].overlapping
    assert not any(row.models["conncomp"].published_ap_spair for row in rows)


def test_published_figures_are_shown_for_the_papers_size_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spairkit.experiments.table._PAPER_SIZES", (24, 24, 14, 0))
    chosen = begin(tmp_path, models=["conncomp"], objects=[1, 2], seeds=1)
    list(compare(chosen, tmp_path, CPU))
    table = summary(chosen, tabulate(chosen, tmp_path))["rows"]
    published = [line["models"]["conncomp"]["published_ap_spair"] for line in table]
    assert published == [{"mean": 0.989, "low": 0.989, "high": 0.989}, None]
    drawn = [draw_comparison(tabulate(chosen, tmp_path), "note")]
    monkeypatch.undo()
    drawn.append(draw_comparison(tabulate(chosen, tmp_path), "note"))
    assert drawn[0] != drawn[1]


def test_time_budget_gives_all_seeds_the_same_updates(tmp_path: Path) -> None:
    chosen = begin(tmp_path, models=["spair"], budget="2s")
    events = [e for e in compare(chosen, tmp_path, CPU) if isinstance(e, Started)]
    assert [e.name for e in events] == ["timing spair-1", "spair-1-seed-0", "spair-1-seed-1"]
    steps = events[1].steps
    assert steps == events[2].steps
    assert 10 < steps < 10_000
    for seed in (0, 1):
        run = Run.open(tmp_path / "runs" / f"spair-1-seed-{seed}")
        assert run.config.train.steps == steps
        assert load_checkpoint(run.path / "last").step == steps


def test_command_prints_and_writes_the_results(
    whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = command(capsys, "--out", whole, "--device", "cpu")
    assert status == 0
    assert f"comparing in {whole} on cpu: 8 runs, 3 updates per neural model" in err
    for text in ("SPAIR", "DAIR", "ConnComp", "±", "1 per image (0 % of"):
        assert text in out
    with Image.open(whole / "figure.png") as picture:
        assert min(picture.size) > 400
    status, out, _ = command(capsys, "--out", whole, "--json")
    assert status == 0
    values = json.loads(out)
    assert json.loads((whole / "results.json").read_text()) == values
    assert values.keys() >= {"comparison", "settings", "budget", "rows", "advice", "protocols"}
    assert values["budget"] == "3 updates per neural model"
    assert [row["objects"] for row in values["rows"]] == [1]
    models = values["rows"][0]["models"]
    assert list(models) == ["spair", "air", "dair", "conncomp"]
    assert models["spair"]["published_ap_spair"] is None, "published for images of another size"
    assert models["spair"]["figures"]["ap"].keys() == {"mean", "low", "high", "values"}
    assert len(models["spair"]["figures"]["ap"]["values"]) == 2


def test_only_spair_searches_and_is_calibrated(whole: Path) -> None:
    for task in begin(whole).tasks():
        path = whole / "runs" / task.name
        is_spair = task.model == "spair"
        assert json.loads((path / "test.json").read_text())["search"] == (
            "refine" if is_spair else "off"
        )
        assert bool(load_checkpoint(path).calibration) == is_spair


@pytest.mark.parametrize("preset", ["quick", "paper"])
def test_search_of_the_preset_reaches_spair_alone(tmp_path: Path, preset: str) -> None:
    chosen = open_comparison(tmp_path / "new", {"objects": [1], "seeds": 1, "preset": preset})[1]
    modes = {task.model: config_of(chosen, task).search.mode for task in chosen.tasks()}
    usual = resolve(preset).search.mode
    assert modes == {"spair": usual, "air": "off", "dair": "off", "conncomp": "off"}


def test_search_can_be_chosen_for_spair(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = [word for word in WORDS[1::2] if not word.startswith("spair.search")]
    words = [word for setting in settings for word in ("--set", setting)]
    words = ["--objects", "1", "--seeds", "1", "--budget", "2", *words]
    refused = command(capsys, "--models", "air,conncomp", "--search", "off", *words)
    assert refused[:2] == (2, "")
    assert "--search off: only SPAIR has a search; add spair to --models" in refused[2]
    out = tmp_path / "own"
    words = ["--out", str(out), "--models", "spair,conncomp", *words]
    status, table, err = command(capsys, "--search", "refine", *words)
    assert status == 0, err
    assert "2 updates per neural model; SPAIR's search: refine\n" in table
    values = json.loads((out / "results.json").read_text())
    assert values["settings"]["over"]["spair"]["search"] == {"mode": "refine"}
    cells = values["rows"][0]["models"]
    assert {model: cell["search"] for model, cell in cells.items()} == {
        "spair": "refine",
        "conncomp": "off",
    }
    status, _, err = command(capsys, "--search", "off", *words)
    assert status == 2
    assert "the settings of a comparison are fixed, and these differ: over: " in err


def test_other_settings_are_refused(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--out", whole, "--seeds", "3", "--budget", "4", "--models", "spair"]
    status, out, err = command(capsys, *words)
    assert (status, out) == (2, "")
    assert "the settings of a comparison are fixed, and these differ: models: " in err
    assert "seeds: 2 -> 3" in err
    assert "budget: 3 -> 4" in err
    assert err.count("\n") == 1
    # its own settings may be repeated
    assert command(capsys, "--out", whole, "--seeds", "2", "--budget", "3", *WORDS)[0] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--models", "spair,yolo"], "models.1: Input should be 'spair', 'air', 'dair', 'conn"),
        (["--objects", "1,x"], "--objects 1,x: write numbers, as 1,3,5"),
        (["--objects", "3,3"], "objects must differ from each other, got [3, 3]"),
        (["--seeds", "0"], "seeds: Input should be greater than or equal to 1 (got 0)"),
        (["--set", "data=3"], "--set data: write a key in data., prepare., model. or train."),
        (["--set", "spair=3"], "--set spair.: write a key in data., prepare., model. or train."),
        (
            ["--set", "preset=paper"],
            "--set preset: write a key in data., prepare., model. or train.",
        ),
        (["--set", "train.seed=5"], "--set train.seed: set by the comparison itself"),
        (["--set", "spair.model.kind=air"], "--set spair.model.kind: set by the comparison"),
        (["--set", "data.max_objects=2"], "--set data.max_objects: set by the comparison"),
        (["--set", "spair.data.seed=2"], "--set spair.data: all models use the same images"),
        (["--budget", "soon"], "--budget soon: write updates"),
        (["--preset", "slow"], "unknown preset 'slow'"),
        (["--set", "spair.model.whats=3"], "model.whats: unknown key, did you mean what?"),
        (["--objects", "100"], "more area than the image has"),
    ],
)
def test_user_errors_leave_no_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    status, out, err = command(capsys, "--out", tmp_path / "new", *words)
    assert (status, out) == (2, "")
    assert message in err
    assert not (tmp_path / "new").exists()


def test_folder_is_compared_without_annotations(
    squares: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "own"
    words = ["--data", squares, "--out", out, "--seeds", "2", "--budget", "2", *WORDS]
    status, table, err = command(capsys, *words)
    assert status == 0, err
    assert f"comparing in {out} on cpu: 4 runs, 2 updates per neural model" in err
    assert "watershed-seed-0: objects 6.000" in err
    for text in (
        "objects in 3 images\n",
        "agreement (F1 at IoU .5",
        "no annotations: agreement is",
    ):
        assert text in table
    assert "AP" not in table
    assert (out / "table.txt").read_text() in table
    with Image.open(out / "figure.png") as picture:
        assert min(picture.size) > 400
    measured = json.loads((out / "settings.json").read_text())["measured"]
    assert "objects are brighter than the background, grey images" in err
    assert 1 < measured["prepare"]["scale"] < 3
    for model in ("spair", "watershed", "conncomp"):
        config = Run.open(out / "runs" / f"{model}-seed-0").config
        assert config.prepare.scale == measured["prepare"]["scale"]
        likelihood = getattr(config.model, "likelihood", None)
        assert likelihood == ("normal" if model == "spair" else None)
    names = {path.name for path in (out / "runs").iterdir() if not path.name.startswith(".")}
    assert names == {"spair-seed-0", "spair-seed-1", "watershed-seed-0", "conncomp-seed-0"}
    status, printed, _ = command(capsys, "--out", out, "--json")
    assert status == 0
    values = json.loads(printed)
    assert json.loads((out / "results.json").read_text()) == values
    assert (values["images"], values["annotated"], values["recommended"]) == (3, 0, "watershed")
    assert values["methods"]["watershed"]["found"]["mean"] == 6
    assert values["methods"]["watershed"]["figures"] == {}
    assert values["agreement"]["watershed"]["conncomp"] == 1
    assert "watershed" not in values["agreement"]["watershed"]
    assert 0 <= values["agreement"]["spair"]["spair"] <= 1
    for run in ("spair-seed-1", "watershed-seed-0", "conncomp-seed-0"):
        assert not (out / "runs" / run / "test.json").exists()
        with pytest.raises(SystemExit) as ended:
            main(["report", str(out / "runs" / run)])
        assert ended.value.code == 0
        assert (out / "runs" / run / "report.html").is_file()


def test_folder_is_compared_by_its_annotations(
    squares: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "own"
    annotate(squares)
    words = ["--data", squares, "--out", out, "--seeds", "1", "--budget", "2", *WORDS]
    status, _, err = command(capsys, *words, "--models", "air")
    assert status == 2
    assert "AIR takes images of one size, here 24x24 px" in err
    status, table, err = command(capsys, *words, "--set", "model.background=mode")
    assert status == 0, err
    assert "objects in 3 images; 4 in 2 annotated\n" in table
    assert "one seed gives no intervals" in table
    assert "the test images include the training images" in table
    values = json.loads((out / "results.json").read_text())
    assert (values["images"], values["annotated"], values["objects"]) == (3, 2, 4)
    ap = {model: method["figures"]["ap"]["mean"] for model, method in values["methods"].items()}
    assert values["recommended"] in ("watershed", "conncomp")
    assert ap[values["recommended"]] == max(ap.values())
    assert f"use {MODELS[values['recommended']]}: AP {max(ap.values()):.3f}\n" in table
    figures = {
        name: figure["mean"] for name, figure in values["methods"]["watershed"]["figures"].items()
    }
    assert figures.pop("ap") > 0.8
    assert figures == {"ap50": 1, "f1": 1, "count_error": 0}
    for model in ("spair", "watershed", "conncomp"):
        run = out / "runs" / f"{model}-seed-0"
        test = json.loads((run / "test.json").read_text())
        figures = values["methods"][model]["figures"]
        for name in ("ap", "ap50", "count_error"):
            assert figures[name]["values"] == [test["overall"][name]]
        found = json.loads((run / "found.json").read_text())["images"]
        assert [item["file"] for item in found] == ["0.png", "1.png", "2.png"]
        assert [item["true"] for item in found] == [2, 2, None]
        report = evaluate(
            load(run, "cpu"),
            evaluation_batches(open_dataset(Run.open(run).config.data, "test"), 1),
            measured_on=test["measured_on"],
        )
        assert report.to_json()["overall"] == test["overall"]
    background = Run.open(out / "runs" / "spair-seed-0").config.model
    assert isinstance(background, SPAIRConfig)
    assert background.background == "mode"


def test_changed_images_are_refused(
    squares: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--data", squares, "--out", tmp_path / "own", "--models", "watershed,conncomp"]
    assert command(capsys, *words)[0] == 0
    path = tmp_path / "own/runs/watershed-seed-0/found.json"
    whole = path.read_text()
    for text, message in (
        (whole.replace("1.png", "4.png"), "the images have changed between the runs"),
        (whole.replace("[", "[[", 1), "not JSON; delete it to measure again"),
        ('{"images": [{"file": "0.png"}]}', "not the objects of a run; delete it"),
        (whole.replace('"boxes": [[', '"boxes": [[1, 2], ['), "not the objects of a run"),
        (whole.replace('"figures": {}', '"figures": {"x": 1}'), "not the objects of a run"),
        ("[]", "not the objects of a run"),
    ):
        path.write_text(text)
        status, out, err = command(capsys, *words)
        assert (status, out) == (2, ""), text
        assert message in err
        assert "Traceback" not in err


def comparison(
    counts: Mapping[str, float],
    agreement: dict[tuple[str, str], float],
    aps: dict[str, tuple[float, float]] | None = None,
) -> Comparison:
    """Numbers of objects, agreements, and mean AP with the half width of its interval."""
    methods = {}
    for model, number in counts.items():
        figures = {}
        if aps:
            mean, half = aps[model]
            figures = {"ap": Interval(mean, mean - half, mean + half, (mean,))}
        found = Interval(number, number, number, (number,))
        methods[model] = Method(found, figures, 5, 9.0, "off")
    both = agreement | {(two, one): value for (one, two), value in agreement.items()}
    table = {one: {two: both[one, two] for two in counts if (one, two) in both} for one in counts}
    return Comparison("", 1, 1 if aps else 0, 0, methods, table)


@pytest.mark.parametrize(
    ("between", "choice", "reason"),
    [
        # of SPAIR and the watershed, SPAIR and ConnComp, the watershed and ConnComp, and seeds
        ((0.12, 0.1, 0.8, 0.9), "watershed", "SPAIR disagrees with it (F1 0.12; 8,659 objects"),
        ((0.8, 0.6, 0.6, 0.5), "watershed", "the seeds of SPAIR disagree with each other"),
        ((0.95, 0.92, 0.97, 0.9), "watershed", "all find the same objects (F1 at least 0.92"),
        ((0.8, 0.5, 0.6, 0.9), "spair", "it agrees with Watershed on most objects (F1 0.80"),
    ],
)
def test_advice_without_annotations_follows_the_agreement(
    between: tuple[float, float, float, float], choice: str, reason: str
) -> None:
    names = [("spair", "watershed"), ("spair", "conncomp"), ("watershed", "conncomp")]
    pairs = dict(zip([*names, ("spair", "spair")], between, strict=True))
    result = comparison({"spair": 8659, "watershed": 286, "conncomp": 200}, pairs)
    assert recommended(result)[0] == choice
    lines = folder_advice(result)
    assert lines[0].startswith(f"use {MODELS[choice]}: {reason}")
    assert "annotations.json" in lines[1]


def test_advice_where_nothing_is_found_names_no_winner() -> None:
    counts = {"spair": 0.0, "watershed": 0.0, "conncomp": 148.0}
    nothing = comparison(counts, {("spair", "watershed"): 1.0, ("spair", "conncomp"): 0.0})
    chosen, reason = recommended(nothing)
    assert chosen == "watershed"
    assert "are there any in these images?" in reason


def test_advice_on_a_single_model() -> None:
    assert recommended(comparison({"conncomp": 3}, {}))[0] == "conncomp"
    assert recommended(comparison({"air": 3}, {}))[0] == "air"
    assert recommended(comparison({"spair": 3}, {}))[0] == "spair"
    alone = comparison({"spair": 3, "conncomp": 3}, {("spair", "conncomp"): 0.2})
    assert recommended(alone)[0] == "conncomp"


@pytest.mark.parametrize(
    ("aps", "choice"),
    [
        ({"spair": (0.8, 0.02), "watershed": (0.7, 0.0), "conncomp": (0.5, 0.0)}, "spair"),
        ({"spair": (0.8, 0.12), "watershed": (0.7, 0.0), "conncomp": (0.5, 0.0)}, "watershed"),
        ({"spair": (0.6, 0.5), "watershed": (0.7, 0.0), "conncomp": (0.72, 0.0)}, "conncomp"),
        ({"spair": (0.6, 0.5), "watershed": (0.7, 0.0)}, "watershed"),
    ],
)
def test_advice_with_annotations_follows_ap(
    aps: dict[str, tuple[float, float]], choice: str
) -> None:
    result = comparison(dict.fromkeys(aps, 3.0), {}, aps)
    assert recommended(result) == (choice, f"AP {aps[choice][0]:.3f}")


def test_part_of_a_large_image_with_most_boxes_is_drawn() -> None:
    image = torch.rand(3, 200, 300, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[250.0, 150, 260, 160], [270, 170, 280, 180], [5, 5, 9, 9]])
    panel = Panel("a.png", image, {"SPAIR": boxes, "Watershed": boxes[:0]}, None)
    assert _window(panel, 100) == (100, 200)
    assert _window(panel, 1000) == (0, 0)
    png = draw_side_by_side([panel, replace(panel, true=boxes)], 100, "a note")
    with Image.open(io.BytesIO(png)) as picture:
        assert picture.height > picture.width > 600


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("runs/conncomp-1-seed-0/test.json", "{", "not JSON; delete it to measure again"),
        ("runs/conncomp-1-seed-0/test.json", "[]", "not the figures of a run; delete it"),
        ("runs/conncomp-1-seed-0/test.json", '{"overall": {}}', "not the figures of a run"),
        ("settings.json", '{"models": 3}', "models: Input should be a valid array (got 3)"),
        ("settings.json", "\udc80", "settings.json: not JSON; pass another --out"),
    ],
)
def test_damaged_files_give_one_line_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, text: str, message: str
) -> None:
    list(compare(begin(tmp_path, models=["conncomp"], seeds=1), tmp_path, CPU))
    (tmp_path / name).write_bytes(text.encode(errors="surrogateescape"))
    status, out, err = command(capsys, "--out", tmp_path)
    assert (status, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


def test_run_of_other_settings_is_not_continued(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = begin(tmp_path, models=["conncomp"], seeds=1)
    (task,) = chosen.tasks()
    config = config_of(chosen, task)
    other = replace(config, train=replace(config.train, seed=7))
    (tmp_path / "runs").mkdir()
    path = Run.create(tmp_path / "runs" / task.name, other).path
    status, out, err = command(capsys, "--out", tmp_path, "--quiet")
    assert (status, out) == (2, "")
    assert f"{path}: this run has other settings: train.seed: 0 -> 7; pass another --out" in err
    assert not (path / "checkpoints").exists()


def test_incomplete_run_is_recreated(tmp_path: Path) -> None:
    chosen = begin(tmp_path, models=["conncomp"], seeds=1)
    (tmp_path / "runs/conncomp-1-seed-0").mkdir(parents=True)
    list(compare(chosen, tmp_path, CPU))
    assert is_finished(chosen, tmp_path)


def row(overlapping: float = 0.0, **aps: tuple[float, float, float]) -> Row:
    """Mean AP, half width of its interval and seconds of each model; AIR is given the count."""
    cells = {
        model: Cell(
            {"ap": Interval(mean, mean - half, mean + half, (mean,) * (3 if half else 1))},
            5,
            seconds,
            given_count=model == "air",
        )
        for model, (mean, half, seconds) in aps.items()
    }
    return Row(3, overlapping, "", cells)


@pytest.mark.parametrize(
    ("aps", "choice"),
    [
        ({"spair": (0.8, 0.02, 99), "conncomp": (0.6, 0.01, 1), "air": (0.3, 0.1, 9)}, "SPAIR"),
        ({"spair": (0.8, 0.02, 99), "conncomp": (0.785, 0.001, 500)}, "ConnComp"),
        ({"spair": (0.7, 0.3, 99), "conncomp": (0.79, 0.01, 1)}, "ConnComp"),
        ({"spair": (0.8, 0.02, 99), "dair": (0.79, 0.02, 9)}, "DAIR"),
        ({"spair": (0.5, 0.02, 99), "air": (0.7, 0.02, 9)}, "SPAIR"),
        ({"air": (0.7, 0.02, 9)}, "AIR"),
        ({"spair": (0.8, 0, 99), "conncomp": (0.79, 0, 1)}, "SPAIR"),
    ],
)
def test_advice_follows_its_rule(aps: dict[str, Any], choice: str) -> None:
    lines = advice([row(0.5, **aps)])
    assert lines[0].startswith(f"3 per image (50 % of the boxes overlap another): {choice}, AP ")
    assert lines[1].startswith("rule: the highest mean AP wins")
    assert any(line.startswith("AIR is given the true counts") for line in lines) == ("air" in aps)
    assert any("one seed" in line for line in lines) == (aps.get("spair", (0, 1))[1] == 0)


def test_advice_gives_the_figure_of_its_choice() -> None:
    line = advice([row(spair=(0.8, 0.02, 99), air=(0.3, 0.1, 9), conncomp=(0.6, 0, 1))])[0]
    assert line.endswith("SPAIR, AP 0.800 ± 0.020")


@pytest.mark.slow
def test_same_command_resumes_after_a_signal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "own"
    words = ["--out", str(out), "--seeds", "1", "--workers", "2"]
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
    assert f"stopped and saved; to resume: spairkit compare --out {out}" in said
    assert "Traceback" not in said
    status, printed, said = command(capsys, *words, "--json")
    assert status == 0, said
    values = json.loads(printed)
    assert math.isfinite(values["rows"][0]["models"]["dair"]["figures"]["ap"]["mean"])
