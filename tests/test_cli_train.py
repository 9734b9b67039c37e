"""The command line from `train` to pictures, with tiny models."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from spairkit.cli import train as train_command
from spairkit.cli import train_progress
from spairkit.cli.main import main
from spairkit.cli.train_progress import show_compiling, show_events
from spairkit.config import Config, PrepareConfig, TrainConfig
from spairkit.counts import CountPosterior
from spairkit.detections import Detections, Explanation
from spairkit.detector import Detector, load
from spairkit.errors import InputError
from spairkit.images import read_image, write_png
from spairkit.models import compiling
from spairkit.models.compiling import Compiling
from spairkit.preparation import fixed_levels
from spairkit.report import signs
from spairkit.report.drawing import panel
from spairkit.report.signs import Signs
from spairkit.storage.checkpoints import load_checkpoint
from spairkit.storage.runs import Run
from spairkit.training import restarts
from spairkit.training.validation import Step

TINY = """\
[data]
image_height = 24
image_width = 28
max_objects = 2
validation_images = 6
test_images = 10

[model]
backbone_channels = [4]
features = 8
hidden = 8
passthrough = 4
what = 4
encoder_hidden = [8]
decoder_hidden = [8]
presence_bias = 1.0

[search]
mode = "refine"

[train]
batch_size = 4
steps = 6
validation_every = 3
training_wheels = 2
threads = 1
"""


@dataclass(frozen=True)
class Ended:
    """Exit status and output of a command."""

    status: Any
    out: str
    err: str


Runner = Callable[..., Ended]


@contextmanager
def working_in(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the run `runs/digits-quick-1` of six steps."""
    folder = tmp_path_factory.mktemp("workplace")
    (folder / "tiny.toml").write_text(TINY)
    with working_in(folder), pytest.raises(SystemExit) as ended:
        main(["train", "--config", "tiny.toml", "--quiet"])
    assert ended.value.code == 0
    return folder


@pytest.fixture
def run(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Runner:
    """Runs a command in this process, in the workplace."""
    monkeypatch.chdir(workplace)

    def run_command(*arguments: object) -> Ended:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Ended(ended.value.code, captured.out, captured.err)

    return run_command


def weights(folder: Path) -> bytes:
    return (folder / "last" / "model.safetensors").read_bytes()


def test_run_contains_all_documented_files(workplace: Path) -> None:
    folder = workplace / "runs" / "digits-quick-1"
    names = {"config.toml", "metrics.jsonl", "test.json", "objects", "report.html", "example.png"}
    assert names <= {path.name for path in folder.iterdir()}
    assert load_checkpoint(folder / "last").step == 6
    assert load_checkpoint(folder).config == Run.open(folder).config
    assert [path.name for path in folder.iterdir() if "tmp" in path.name] == []


def test_training_prints_figures_and_two_working_commands(run: Runner) -> None:
    ended = run("train", "--config", "tiny.toml", "--out", "my run", "--seed", "3")
    assert ended.status == 0
    assert re.search(
        r"^step 3: validation \d+\.\d objects an image, elbo -\S+, AP \d\S+, AP paper \d\S+, ",
        ended.err,
        re.M,
    )
    assert re.search(
        r"^ *objects +images +AP +paper +COCO +AP50 +right +error +bias +holds +width ",
        ended.out,
        re.M,
    )
    assert "AP paper: the rule of the SPAIR authors' code." in ended.out
    assert "run: my run\n" in ended.out
    assert Run.open(Path("my run")).config.train.seed == 3
    commands = [line for line in ended.out.splitlines() if line.startswith("  spairkit ")]
    assert len(commands) == 2
    for command in commands:
        words = shlex.split(command)
        assert words[0] == "spairkit"
        assert run(*words[1:]).status == 0


def test_train_json_equals_eval_json(run: Runner) -> None:
    ended = run("train", "--config", "tiny.toml", "--out", "as-json", "--json", "--quiet")
    assert ended.status == 0
    trained = json.loads(ended.out)
    assert trained["run"] == "as-json"
    assert trained["step"] == 6
    evaluated = json.loads(run("eval", "--checkpoint", "as-json", "--json", "--quiet").out)
    assert evaluated["overall"] == trained["test"]["overall"]
    assert evaluated["overall"]["images"] == 10
    assert json.loads(Path("as-json/test.json").read_text()) == trained["test"]


SIGNS = Signs(failures=("no object was found in any image",), warnings=("look at its boxes",))


def test_failed_training_exits_with_3_and_is_remembered(
    run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signs, "signs_of", lambda *_: SIGNS)
    ended = run("train", "--config", "tiny.toml", "--out", "failed")
    assert (ended.status, ended.out) == (3, "")
    assert "warning: look at its boxes\n" in ended.err
    said = ended.err.splitlines()
    assert said[-2] == "this training failed: no object was found in any image"
    assert said[-1].startswith("see failed/report.html; try another --seed, `spairkit data look`")
    kept = json.loads(Path("failed/signs.json").read_text())
    assert kept == {"failed": True, "warnings": [*SIGNS.failures, *SIGNS.warnings]}
    assert SIGNS.failures[0] in Path("failed/report.html").read_text()

    frames = "failed/example.png", shutil.copy("failed/example.png", "next.png")
    for checkpoint in ("failed", "failed/best"):
        for command in ("detect", "count", "track"):
            words = (command, *frames, "--checkpoint", checkpoint)
            found = run(*words, "--out", "found.csv")
            assert (found.status, found.out) == (3, "")
            line = found.err.splitlines()[-1]
            assert line.startswith(f"the training of {Path('failed').resolve()} failed, so what it")
            assert not list(Path().glob("found.csv*"))
        drawn = run("viz", "failed/example.png", "--checkpoint", checkpoint)
        assert drawn.status == 0
        assert (
            f"warning: the training of {Path('failed').resolve()} failed, see its report.html; do "
            "not trust it\n"
        ) in drawn.err
    ended = run("train", "--resume", "failed", "--json", "--quiet")
    assert (ended.status, ended.err) == (3, "")
    answer = json.loads(ended.out)
    assert answer["failures"] == list(SIGNS.failures)
    assert answer["warnings"] == list(SIGNS.warnings)
    assert answer["test"]["overall"]["images"] == 10

    monkeypatch.setattr(signs, "signs_of", lambda *_: Signs())
    ended = run("train", "--resume", "failed", "--steps", "7", "--quiet")
    assert ended.status == 0
    found = run("detect", "failed/example.png", "--checkpoint", "failed")
    assert (found.status, "failed, so what it" in found.err) == (0, False)


def discs(folder: Path) -> Path:
    """A folder of images of dark discs of 24 px; four of them in each."""
    folder.mkdir()
    y, x = torch.meshgrid(torch.arange(96) + 0.5, torch.arange(96) + 0.5, indexing="ij")
    mask = (y % 48 - 24) ** 2 + (x % 48 - 24) ** 2 < 12**2
    for number in range(3):
        write_png(folder / f"{number}.png", (0.8 - 0.5 * mask).expand(3, -1, -1))
    return folder


def test_folder_is_looked_at_before_training(run: Runner, tmp_path: Path) -> None:
    folder = discs(tmp_path / "cells")
    words = ["train", "--config", "tiny.toml", "--data", folder, "--steps", "1"]
    ended = run(*words, "--out", "seen")
    assert ended.status == 0
    assert re.search(r"^size: 2[345] px .*--set prepare\.scale\)$", ended.err, re.M)
    assert "darker than the background, grey images" in ended.err
    config = Run.open(Path("seen")).config
    assert config.prepare.scale == pytest.approx(0.5, rel=0.1)
    assert (config.prepare.contrast, config.prepare.levels) == ("direction", "image")
    assert sum(config.prepare.direction) < 0
    assert config.search.start == "watershed"
    assert load_checkpoint(Path("seen")).config == config
    again = run("train", "--resume", "seen", "--steps", "2")
    assert again.status == 0
    assert "size: " not in again.err, "a run keeps its settings"

    plain = ["--set", "prepare.contrast=none", "--set", "prepare.scale=1"]
    ended = run(*words, *plain, "--out", "plain", "--quiet")
    assert ended.status == 0
    assert "size: " not in ended.err
    config = Run.open(Path("plain")).config
    assert config.prepare == PrepareConfig()
    assert config.search.start == "encoder"


def test_failing_training_says_that_it_starts_again(
    run: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sign(model: Any, config: Config, dataset: Any) -> tuple[str, str] | None:
        return ("many", "91% of cells are on") if config.train.seed == 0 else None

    monkeypatch.setattr(restarts, "_FIRST_STEP", 0)
    monkeypatch.setattr(restarts, "_sign", sign)
    folder = discs(tmp_path / "cells")
    schedule = ["--set", "model.odds_start=1.0", "--set", "train.training_wheels=0"]
    words = ["train", "--config", "tiny.toml", "--data", folder, *schedule]
    ended = run(*words, "--out", "again", "--set", 'train.retries=["seed"]')
    assert ended.status == 0
    line = "step 3: 91% of cells are on; starting again with train.seed = 1\n"
    assert ended.err.count(line) == 1
    assert Run.open(Path("again")).config.train.seed == 1
    assert "Started again after 3 updates: 91% of cells" in Path("again/report.html").read_text()
    again = run("train", "--resume", "again", "--steps", "8")
    assert again.status == 0
    assert "starting again" not in again.err

    own = ["--seed", "0", "--set", "model.least_noise=.1", "--set", "prepare.background=image"]
    ended = run(*words, "--out", "seeded", *own, "--json")
    assert ended.status == 0
    assert "starting again" not in ended.err
    assert json.loads(ended.out)["step"] == 6


def test_look_says_which_settings_are_the_users(run: Runner, tmp_path: Path) -> None:
    folder = discs(tmp_path / "cells")
    words = ["train", "--config", "tiny.toml", "--data", folder, "--steps", "1"]
    ended = run(*words, "--out", "set", "--set", "prepare.scale=.25", "--set", "model.what=3")
    assert ended.status == 0
    assert re.search(r"^size: .* resized by 0\.25, to .* \(set: prepare\.scale\)$", ended.err, re.M)
    assert "in place of what the images call for" not in ended.err
    config = Run.open(Path("set")).config
    assert config.prepare.scale == 0.25
    assert (config.prepare.contrast, config.prepare.levels) == ("direction", "image")

    copied = run("config", "copy", "whole.toml", "--config", "tiny.toml")
    assert "remove the settings that are to be measured" in copied.err
    words = ["train", "--config", "whole.toml", "--data", folder, "--steps", "1"]
    ended = run(*words, "--out", "whole")
    assert "contrast: none, colours are kept (set: prepare.contrast" in ended.err
    yours = "yours, in place of what the images call for: "
    assert any(
        line.startswith(yours) and "model.likelihood" in line for line in ended.err.split("\n")
    )
    assert Run.open(Path("whole")).config.prepare == PrepareConfig()


def test_signs_of_an_earlier_end_go_when_training_goes_on(
    run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("train", "--config", "tiny.toml", "--out", "old", "--steps", "2").status == 0
    kept = Path("old/signs.json")
    kept.write_text('{"warnings": ["no object"], "failed": true}')

    def stopped(*_: object, **__: object) -> None:
        raise InputError("stopped")

    monkeypatch.setattr(train_command, "_train", stopped)
    assert run("train", "--resume", "old", "--steps", "4").status == 2
    assert not kept.exists()


def test_doubts_of_the_look_stay_on_resumption(run: Runner, tmp_path: Path) -> None:
    (tmp_path / "blank").mkdir()
    write_png(tmp_path / "blank" / "a.png", torch.full((3, 60, 60), 0.5))
    words = ["train", "--config", "tiny.toml", "--data", tmp_path / "blank", "--steps", "1"]
    assert run(*words, "--out", tmp_path / "run").status == 0
    first = (tmp_path / "run" / "signs.json").read_text()
    assert "fewer than 5 compact objects" in first
    assert run("train", "--resume", tmp_path / "run").status == 0
    assert (tmp_path / "run" / "signs.json").read_text() == first


@pytest.mark.parametrize("word", ["background='surface'", "levels='image'", "black=0.1"])
def test_one_setting_of_the_preparation_can_be_overridden(
    run: Runner, tmp_path: Path, word: str
) -> None:
    folder = discs(tmp_path / "cells")
    words = ["train", "--model", "watershed", "--data", folder, "--quiet"]
    assert run(*words, "--out", tmp_path / "seen", "--set", f"prepare.{word}").status == 0
    prepare = Run.open(tmp_path / "seen").config.prepare
    assert prepare.contrast == "direction", "measured"
    key, value = word.split("=")
    assert str(getattr(prepare, key)) == value.strip("'")


def test_resumed_run_is_bit_identical(run: Runner) -> None:
    ended = run("train", "--config", "tiny.toml", "--out", "cut", "--minutes", "0", "--quiet")
    assert ended.status == 0
    assert "ended after step 1 of 6; continue with: spairkit train --resume cut" in ended.err
    assert "goes on" not in ended.err
    resumed = run("train", "--out", "cut", "--resume", "./cut")  # as a restarted job would
    assert resumed.status == 0
    assert "resuming from step 1: 5 of 6 steps left\n" in resumed.err
    again = run("train", "--resume", "cut")
    assert "resuming from step 6: 0 of 6 steps left\n" in again.err
    whole = Path("runs/digits-quick-1")
    assert weights(Path("cut")) == weights(whole)
    assert Path("cut/metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_run_killed_before_its_first_checkpoint_restarts(run: Runner) -> None:
    settings = Run.open(Path("runs/digits-quick-1")).config
    Run.create(Path("killed"), settings)
    ended = run("train", "--resume", "killed")
    assert ended.status == 0
    assert "there is no checkpoint yet: starting at the first step\n" in ended.err
    assert weights(Path("killed")) == weights(Path("runs/digits-quick-1"))


def test_resumed_run_keeps_all_settings_but_steps(run: Runner) -> None:
    ended = run("train", "--config", "tiny.toml", "--out", "long", "--steps", "3", "--quiet")
    assert ended.status == 0
    words = ["--seed", "9", "--set", "model.what=5", "--preset", "paper"]
    ended = run("train", "--resume", "long", *words)
    assert ended.status == 2
    for change in ("train.seed: 0 -> 9", "model.what: 4 -> 5", "preset: 'quick' -> 'paper'"):
        assert change in ended.err
    assert run("train", "--resume", "long", "--steps", "5", "--quiet").status == 0
    assert load_checkpoint(Path("long/last")).step == 5
    assert Run.open(Path("long")).config.train.steps == 5


def test_quiet_prints_nothing_to_stderr(run: Runner) -> None:
    assert run("train", "--config", "tiny.toml", "--out", "hush", "--quiet").err == ""
    assert run("train", "--resume", "hush", "--steps", "7", "--quiet").err == ""


def test_out_and_resume_exclude_each_other(run: Runner) -> None:
    ended = run("train", "--resume", "runs/digits-quick-1", "--out", "runs/digits-quick-2")
    wanted = "spairkit: --out names a new run and --resume an old one; give one of them\n"
    assert ended == Ended(2, "", wanted)


def test_run_with_only_damaged_checkpoints_is_refused(run: Runner) -> None:
    assert run("train", "--config", "tiny.toml", "--out", "worn", "--quiet").status == 0
    for weights_ in Path("worn/checkpoints").glob("*/model.safetensors"):
        weights_.write_bytes(weights_.read_bytes()[:100])
    ended = run("train", "--resume", "worn")
    assert ended.status == 2
    assert ended.err.startswith("spairkit: worn: every checkpoint is damaged; the newest: ")
    assert ended.err.count("\n") == 1


def test_second_trainer_is_refused(run: Runner) -> None:
    with Run.open(Path("runs/digits-quick-1")).lock():
        ended = run("train", "--resume", "runs/digits-quick-1")
    assert ended.status == 2
    assert f"process {os.getpid()} on " in ended.err
    assert "is training here; wait for it or stop it" in ended.err


def test_unusable_data_leaves_no_run(run: Runner, tmp_path: Path) -> None:
    before = sorted(Path("runs").iterdir())
    assert run("train", "--data", tmp_path).status == 2
    assert run("train", "--data", "mnist").status == 2
    assert run("train", "--set", "data.max_objects=200").status == 2
    assert sorted(Path("runs").iterdir()) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_signal_saves_a_checkpoint_and_prints_how_to_resume(
    workplace: Path, tmp_path: Path, number: signal.Signals, status: int
) -> None:
    out = tmp_path / "run"
    words = ["train", "--config", str(workplace / "tiny.toml"), "--out", str(out)]
    many = ["--steps", "1000000", "--set", "train.validation_every=1000000"]
    with subprocess.Popen(
        [sys.executable, "-m", "spairkit", *words, *many],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        try:
            metrics = out / "metrics.jsonl"
            while not metrics.exists() or not metrics.stat().st_size:
                assert process.poll() is None
                time.sleep(0.05)
            process.send_signal(number)
            printed, said = process.communicate(timeout=60)
        finally:
            process.kill()  # otherwise a run that ignored the signal would never end
    assert process.returncode == status
    assert printed == ""
    assert f"checkpoint saved; continue with: spairkit train --resume {out}" in said
    assert "Traceback" not in said
    step = load_checkpoint(out / "last", with_optimiser=True).step
    assert f"stopped after step {step}," in said


def test_signal_during_test_figures_prints_how_to_resume(
    run: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"

    def interrupted(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr("spairkit.cli.train.measure", interrupted)
        ended = run("train", "--config", "tiny.toml", "--out", out, "--quiet")
    assert ended.status == 130
    assert ended.err.splitlines()[-2:] == [
        "the training is saved, but test figures and report are not complete; continue with: "
        f"spairkit train --resume {out}",
        "spairkit: stopped by SIGINT",
    ]
    assert run("train", "--resume", out, "--quiet").status == 0
    assert (out / "report.html").exists()


def test_eval_prints_each_count_and_names_the_protocols(run: Runner) -> None:
    ended = run("eval", "--checkpoint", "runs/digits-quick-1", "--out", "figures.json")
    assert ended.status == 0
    assert "10 scenes of 24 × 28 px, 1 to 2 glyphs of 14 px (UCI optical digits)" in ended.out
    rows = [line.split() for line in ended.out.splitlines()]
    first_cells = [row[0] for row in rows if row]
    assert {"all", "1", "2"} <= set(first_cells)
    figures = json.loads(Path("figures.json").read_text())
    assert figures["overall"]["images"] == sum(f["images"] for f in figures["by_objects"].values())
    assert "COCO matching" in figures["protocols"]["ap"]


def test_eval_accepts_other_data(run: Runner) -> None:
    words = ["--set", "data.max_objects=1", "--set", "data.test_images=4", "--json"]
    figures = json.loads(run("eval", *words).out)
    assert list(figures["by_objects"]) == ["1"]
    assert figures["overall"]["images"] == 4
    validation = json.loads(run("eval", "--split", "validation", "--json").out)
    assert validation["overall"]["images"] == 6
    assert "data.max_objects" in run("eval", "--set", "data.max_objects=-1").err


def test_saved_scenes_give_the_same_figures(run: Runner) -> None:
    """`data make` and the folder reader keep every pixel and box."""
    made = run("data", "make", "scenes", "--count", "10", "--config", "tiny.toml")
    assert made.status == 0
    assert "wrote 10 images and annotations.json to scenes" in made.err
    from_folder = json.loads(run("eval", "--data", "scenes", "--json").out)
    from_scenes = json.loads(run("eval", "--json").out)
    assert from_folder["overall"] == from_scenes["overall"]
    assert from_folder["by_objects"] == from_scenes["by_objects"]


def test_detect_writes_valid_coco_csv_and_jsonl(run: Runner, workplace: Path) -> None:
    from pycocotools.coco import COCO

    assert run("data", "make", "for-coco", "--count", "3", "--config", "tiny.toml").status == 0
    words = ["detect", "for-coco", "--threshold", "0.01"]
    ended = run(*words, "--out", "found.json")
    assert ended.status == 0
    found = json.loads(Path("found.json").read_text())
    assert len(found) > 0
    assert f"wrote found.json: {len(found)} objects in 3 images" in ended.err
    truth = COCO(str(workplace / "for-coco" / "annotations.json"))
    assert {result["image_id"] for result in found} <= set(truth.getImgIds()) == {1, 2, 3}
    truth.loadRes("found.json")

    assert json.loads(run(*words).out) == found
    files = sorted(Path("for-coco").glob("*.png"))
    alone = json.loads(run("detect", *files, *words[2:]).out)
    assert [(one["bbox"], one["score"]) for one in alone] == [
        (one["bbox"], one["score"]) for one in found
    ]
    lines = run(*words, "--format", "csv").out.splitlines()
    assert lines[0] == "image,image_id,x1,y1,x2,y2,score,area,intensity"
    assert len(lines) == 1 + len(found)
    name, number, x1, y1, x2, y2, score, area, _ = lines[1].split(",")
    assert name == "for-coco/00000.png"
    assert [float(x1), float(y1), float(x2) - float(x1), float(y2) - float(y1)] == pytest.approx(
        found[0]["bbox"]
    )
    assert (int(number), float(score)) == (found[0]["image_id"], found[0]["score"])
    assert int(area) == found[0]["area"]
    records = [json.loads(line) for line in run(*words, "--format", "jsonl").out.splitlines()]
    assert [record["image_id"] for record in records] == [1, 2, 3]
    assert sum(record["count"] for record in records) == len(found)


@pytest.fixture
def searching(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model also gives masks, the upper left 3 x 4 pixels, and a posterior of the count."""
    plain_detect, plain_explain = Detector.detect_batch, Detector.explain_batch

    def richer(found: Detections, image: Tensor) -> Detections:
        label_image = torch.zeros(image.shape[1:], dtype=torch.int32)
        label_image[:3, :4] = 1
        labels = torch.arange(1, len(found) + 1, dtype=torch.int32)
        counts = CountPosterior.independent(torch.tensor([*[1.0] * len(found), 0.5]))
        return replace(found, label_image=label_image, labels=labels, counts=counts)

    def detect(self: Detector, images: Tensor, *rest: Any) -> list[Detections]:
        return list(map(richer, plain_detect(self, images, *rest), images))

    def explain(self: Detector, images: Tensor, *rest: Any) -> list[Explanation]:
        return [
            replace(one, detections=richer(one.detections, one.image))
            for one in plain_explain(self, images, *rest)
        ]

    monkeypatch.setattr(Detector, "detect_batch", detect)
    monkeypatch.setattr(Detector, "explain_batch", explain)


@pytest.mark.usefixtures("searching")
def test_detect_writes_masks_and_counts(run: Runner, tmp_path: Path) -> None:
    image = torch.zeros(3, 26, 27)
    image[:, :3, :4] = 0.2
    for name in "ab":
        write_png(tmp_path / f"{name}.png", image)
    words = ("detect", tmp_path / "a.png", "--threshold", "0.01", "--search", "off")
    ended = run(*words, "--out", "rich.json")
    results = json.loads(Path("rich.json").read_text())
    num = len(results)
    assert num > 1
    assert (
        f"wrote rich.json: {num} objects in 1 image ({num}.5 expected, {num} to {num + 1} at 90 %)"
        in ended.err
    )
    assert [result["area"] for result in results] == [12] + [0] * (num - 1)
    assert results[0]["segmentation"]["size"] == [26, 27]
    ended = run("detect", tmp_path, *words[2:], "--out", "rich.json")
    interval = f"{2 * num} to {2 * num + 2} at 90 %"
    assert f": {2 * num} objects in 2 images ({2 * num + 1}.0 expected, {interval})" in ended.err

    lines = run(*words, "--format", "csv").out.splitlines()
    assert lines[0] == "image,image_id,x1,y1,x2,y2,score,area,intensity"
    assert lines[1].split(",")[-2] == "12"
    assert float(lines[1].split(",")[-1]) == pytest.approx(0.2)
    assert [line.split(",")[-2:] for line in lines[2:]] == [["0", ""]] * (num - 1)
    record = json.loads(run(*words, "--format", "jsonl").out)
    assert (record["count"], record["count_mean"]) == (num, pytest.approx(num + 0.5))
    assert record["count_interval"] == [num, num + 1]
    assert record["area"] == [12] + [0] * (num - 1)
    empty = run(*words, "--threshold", "0.999999", "--format", "csv").out
    assert empty.splitlines() == lines[:1]


@pytest.mark.usefixtures("searching")
def test_viz_gives_the_interval_of_the_count(run: Runner, tmp_path: Path) -> None:
    image = tmp_path / "scene.png"
    write_png(image, torch.rand(3, 30, 31))
    options = ("--threshold", "0.01", "--search", "off")
    words = ("viz", image, *options, "--out", tmp_path / "picture.png")
    answer = json.loads(run(*words, "--json").out)["pictures"][0]
    num = answer["count"]
    assert (answer["count_mean"], answer["count_interval"]) == (num + 0.5, [num, num + 1])
    assert (
        f"{num} objects found ({num}.5 expected, {num} to {num + 1} at 90 %); picture: "
        in run(*words).out
    )


@pytest.mark.usefixtures("searching")
def test_eval_prints_intervals_where_there_are_any(run: Runner) -> None:
    report = run("eval", "--json").out
    assert 0 <= json.loads(report)["overall"]["interval_coverage"] <= 1
    assert json.loads(report)["overall"]["interval_width"] == 1
    table = run("eval").out
    assert "holds" in table
    assert "90 %: intervals of the count.\n" in table
    row = next(line.split() for line in table.splitlines() if line.strip().startswith("all"))
    assert (len(row), row[-1]) == (11, "1.000")


def test_eval_of_models_without_counts_has_no_columns_of_intervals(run: Runner) -> None:
    words = ("eval", "--search", "off")
    assert json.loads(run(*words, "--json").out)["overall"]["interval_width"] is None
    assert "90 %" not in run(*words).out


def test_detect_writes_names_that_are_not_utf8_but_not_over_an_image(
    run: Runner, tmp_path: Path
) -> None:
    image, table = tmp_path / os.fsdecode(b"im\xff.png"), tmp_path / "found.csv"
    write_png(image, torch.rand(3, 24, 24))
    before = image.read_bytes()
    refused = run("detect", image, "--out", image)
    assert refused.status == 2
    assert "is an input" in refused.err
    assert image.read_bytes() == before
    options = ("--format", "csv", "--threshold", "0", "--out", table)
    assert run("detect", image, *options).status == 0
    assert "im\\udcff.png" in table.read_text()


def test_detect_numbers_images_in_the_given_order(run: Runner, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name in ("b/2.png", "b/1.png", "a.png"):
        write_png(tmp_path / name, torch.rand(3, 5, 40))
    paths = [tmp_path / "b", tmp_path / "a.png"]
    lines = run("detect", *paths, "--format", "jsonl").out.splitlines()
    records = [json.loads(line) for line in lines]
    assert [(record["image_id"], Path(record["image"]).name) for record in records] == [
        (1, "1.png"),
        (2, "2.png"),
        (3, "a.png"),
    ]


def test_viz_writes_to_the_current_folder_and_prints_the_path(run: Runner, tmp_path: Path) -> None:
    image = tmp_path / "scene.png"
    write_png(image, torch.rand(3, 30, 31))
    content = image.read_bytes()
    ended = run("viz", image)
    assert ended.status == 0
    assert "using the newest run: runs/" in ended.err
    assert "picture: scene-spairkit.png" in ended.out
    assert read_image(Path("scene-spairkit.png")).shape[2] > 3 * 31
    assert image.read_bytes() == content
    ended = run("viz", image, "--out", tmp_path / "panel.png", "--json", "--threshold", "0.01")
    answer = json.loads(ended.out)
    assert load_checkpoint(Path(answer["checkpoint"])).path == Path(answer["checkpoint"])
    drawn = answer["pictures"]
    assert [one["picture"] for one in drawn] == [str(tmp_path / "panel.png")]
    found = json.loads(run("detect", image, "--threshold", "0.01").out)
    assert drawn[0]["count"] == len(found)


def test_box_contrast_can_be_chosen_after_training(run: Runner, tmp_path: Path) -> None:
    image, option = tmp_path / "scene.png", "--box-contrast"
    write_png(image, torch.rand(3, 30, 31))

    def boxes(*words: str) -> Tensor:
        options = ("--search", "off", "--threshold", "0.01", *words)
        found = json.loads(run("detect", image, *options).out)
        return torch.tensor([one["bbox"] for one in found])

    trained, own, close = (boxes(*words) for words in ([], [option, "0"], [option, "0.95"]))
    assert len(trained) > 0
    assert torch.equal(boxes(option, "0.05"), trained)  # the preset's
    assert (close == close.round()).all()
    assert (own != own.round()).any()
    assert (close[:, 2:].prod(1) <= trained[:, 2:].prod(1)).all()
    assert (close[:, 2:].prod(1) < trained[:, 2:].prod(1)).any()
    figures = [
        json.loads(run("eval", "--json", "--search", "off", option, share).out)
        for share in ("0", "0.95")
    ]
    assert figures[0]["overall"]["count_error"] == figures[1]["overall"]["count_error"]
    assert figures[0]["overall"]["ap"] != figures[1]["overall"]["ap"]
    assert [one["box_contrast"] for one in figures] == [0, 0.95]
    assert "Boxes: the model's own.\n" in run("eval", option, "0").out
    assert "Boxes:" not in run("eval").out
    for share in ("0", "0.95"):
        assert run("viz", image, option, share, "--out", f"{share}.png").status == 0
    assert not torch.equal(read_image("0.png"), read_image("0.95.png"))
    ended = run("viz", image, option, "1.5")
    assert (ended.status, ended.err.count("\n")) == (2, 1)


def test_eval_needs_annotations_but_train_does_not(run: Runner, tmp_path: Path) -> None:
    for index in range(3):
        write_png(tmp_path / f"{index}.png", torch.rand(3, 40, 40))
    words = ["--config", "tiny.toml", "--data", tmp_path, "--out", "own", "--steps", "2"]
    ended = run("train", *words)
    assert ended.status == 0
    assert "no annotations.json, so there are no test figures" in ended.err
    assert f"spairkit viz {tmp_path / '0.png'} --checkpoint own" in ended.out
    assert re.search(r"found: \d+ objects? in \d+ images?; a watershed finds", ended.out)
    assert f"spairkit detect {tmp_path} --out found.json --checkpoint own" in ended.out
    ended = run("eval", "--checkpoint", "own")
    assert ended.status == 2
    assert "no annotations in annotations.json (COCO), so there is no ground truth" in ended.err


def test_levels_of_a_run_are_applied_to_all_images(run: Runner, tmp_path: Path) -> None:
    for index in range(3):
        write_png(tmp_path / f"{index}.png", torch.rand(3, 40, 40) * 0.3 + 0.2)
    black, white = 0.25, 0.45
    words = ["--config", "tiny.toml", "--data", tmp_path, "--out", "levels", "--steps", "2"]
    plain = ["--set", "prepare.contrast=none", "--set", "prepare.scale=1"]
    levels = ["--set", f"prepare.black={black}", "--set", f"prepare.white={white}"]
    ended = run("train", *words, *plain, *levels)
    assert ended.status == 0
    detector, path = load("levels"), tmp_path / "1.png"
    image = read_image(path)
    prepared = fixed_levels(image, PrepareConfig(black=black, white=white))
    by_hand = detector.finder.detect(prepared[None], threshold=0.0)[0].scores  # type: ignore[call-arg]
    raw = detector.finder.detect(image[None], threshold=0.0)[0].scores  # type: ignore[call-arg]
    assert by_hand.tolist() != raw.tolist()
    for scores in (
        detector.detect(path, threshold=0.0).scores,
        next(detector.detect_many(tmp_path.glob("1.png"), threshold=0.0)).scores,
        detector.explain(image, threshold=0.0).detections.scores,
        detector.detect_batch(image[None], 0.0)[0].scores,
    ):
        torch.testing.assert_close(scores, by_hand)
    words = ["--checkpoint", "levels", "--threshold", "0"]
    found = json.loads(run("detect", path, *words).out)
    assert [one["score"] for one in found] == pytest.approx(by_hand.tolist())
    assert run("viz", path, "--checkpoint", "levels", "--out", "dim.png").status == 0
    write_png("expected.png", panel(detector.explain(path)))
    assert torch.equal(read_image("dim.png"), read_image("expected.png"))
    assert run("eval", "--checkpoint", "levels", "--data", "digits").status == 0


def test_viz_draws_all_images_or_none(run: Runner, tmp_path: Path) -> None:
    write_png(tmp_path / "good.png", torch.rand(3, 30, 31))
    (tmp_path / "bad.png").write_text("no picture")
    ended = run("viz", tmp_path / "good.png", tmp_path / "bad.png")
    assert ended.status == 2
    assert "bad.png: not an image that can be read" in ended.err
    assert not Path("good-spairkit.png").exists()


def images_in(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_png(folder / name, torch.rand(3, 30, 31))
    return folder


def truncate(path: Path) -> Path:
    """Leaves the header and a part of the pixels."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    return path


ANNOTATED = {
    "images": [{"id": 1, "file_name": "0.png"}],
    "categories": [{"id": 1}],
    "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [3, 3, 9, 9]}],
}


def test_damaged_files_of_a_folder_are_named_and_skipped(run: Runner, tmp_path: Path) -> None:
    folder = images_in(tmp_path / "cells", *(f"{n}.png" for n in range(12)))
    (folder / "annotations.json").write_text(json.dumps(ANNOTATED))
    (folder / "notes.txt").write_text("no image")
    truncate(folder / "3.png")
    (folder / "7.png").write_text("no image")
    said = rf"skipped 2 of 12: {folder}/7\.png: not an image.*; {folder}/3\.png: a damaged image"
    words = ["--config", "tiny.toml", "--data", folder, "--out", "skips", "--steps", "2"]
    ended = run("train", *words)
    assert ended.status == 0
    assert len(re.findall(said, ended.err)) == 2
    assert len(re.findall(f"{said}.*; the figures leave such files out", ended.err)) == 1
    ended = run("eval", "--checkpoint", "skips")
    assert ended.status == 0
    (line,) = [line for line in ended.err.splitlines() if "skipped" in line]
    assert re.fullmatch(f"{said}.*; the figures leave such files out", line)
    (folder / "annotations.json").unlink()
    said = rf"skipped 2 of 12: {folder}/7\.png: not an image.*; {folder}/3\.png: a damaged image"
    ended = run("detect", folder, "--checkpoint", "skips", "--format", "jsonl")
    assert ended.status == 0
    assert re.search(said, ended.err)
    records = [json.loads(line) for line in ended.out.splitlines()]
    order = [0, 1, 10, 11, 2, 4, 5, 6, 8, 9]
    assert [Path(record["image"]).stem for record in records] == [str(n) for n in order]
    assert [record["image_id"] for record in records] == [1, 2, 3, 4, 5, 7, 8, 9, 11, 12]
    assert "in 10 images" in ended.err
    ended = run("viz", folder, "--checkpoint", "skips", "--out", tmp_path / "drawn")
    assert ended.status == 0
    assert re.search(said, ended.err)
    drawn = {path.name for path in (tmp_path / "drawn").iterdir()}
    assert drawn == {f"{n}-spairkit.png" for n in order}


def test_damaged_files_that_are_named_are_errors(run: Runner, tmp_path: Path) -> None:
    good = images_in(tmp_path / "good", "good.png") / "good.png"
    bad = truncate(images_in(tmp_path, "bad.png") / "bad.png")
    ended = run("viz", bad, "--out", tmp_path / "found.png")
    assert ended.status == 2
    assert ended.err.splitlines()[-1].startswith(f"spairkit: {bad}: a damaged image")
    assert not (tmp_path / "found.png").exists()
    for words in (["detect", good, bad], ["detect", tmp_path / "good", bad]):
        ended = run(*words, "--out", tmp_path / "found.csv", "--format", "csv")
        assert ended.status == 2
        assert ended.err.splitlines()[-1].startswith(f"spairkit: skipped 1 of 2: {bad}: a damaged")
        assert (tmp_path / "found.csv").read_text().startswith("image,"), "of the others"
        (tmp_path / "found.csv").unlink()


def test_folder_of_damaged_files_is_an_error(run: Runner, tmp_path: Path) -> None:
    folder = images_in(tmp_path / "cells", *(f"{n}.png" for n in range(5)))
    for path in folder.iterdir():
        truncate(path)
    for command in ("detect", "viz"):
        ended = run(command, folder, "--out", tmp_path / "found")
        assert ended.status == 2
        assert ended.err.splitlines()[-1].startswith(
            f"spairkit: no image can be read: skipped 5 of 5: {folder}/0.png: a damaged image"
        )
        assert ended.err.splitlines()[-1].endswith("; and 2 more")
    assert not (tmp_path / "found").exists()
    ended = run("train", "--data", folder, "--out", "none")
    assert ended.status == 2
    assert "no image can be read: skipped 5 of 5" in ended.err
    assert not Path("none").exists()


def test_one_image_is_a_folder(run: Runner, tmp_path: Path) -> None:
    slide = images_in(tmp_path, "0.png", "1.png") / "0.png"
    (tmp_path / "annotations.json").write_text(json.dumps(ANNOTATED))
    words = ["--config", "tiny.toml", "--data", slide, "--out", tmp_path / "run", "--steps", "2"]
    ended = run("train", *words)
    assert ended.status == 0
    assert f"spairkit viz {slide} --checkpoint" in ended.out
    figures = json.loads(run("eval", "--checkpoint", tmp_path / "run", "--json").out)
    assert figures["overall"]["images"] == 1
    assert figures["overall"]["objects"] == 1
    assert figures["data"]["path"] == str(slide)


def test_viz_mirrors_a_folder(run: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = images_in(tmp_path / "cells", "a/1.png", "b/1.png", "1.png", "2.png")
    Image.new("RGB", (30, 30)).save(folder / "2.bmp")
    checkpoint = Path("runs/digits-quick-1").resolve()
    monkeypatch.chdir(tmp_path)
    words = ["viz", folder, "--checkpoint", checkpoint, "--search", "off"]
    ended = run(*words)
    assert ended.status == 0
    drawn = sorted(path.relative_to("viz").as_posix() for path in Path("viz").rglob("*.png"))
    assert drawn == [
        "1-spairkit.png",
        "2.bmp-spairkit.png",
        "2.png-spairkit.png",
        "a/1-spairkit.png",
        "b/1-spairkit.png",
    ]
    assert "picture: viz/a/1-spairkit.png" in ended.out
    assert run(*words).status == 0, "pictures of the same images are drawn again"
    other = images_in(tmp_path / "others", "1.png")
    before = Path("viz/1-spairkit.png").read_bytes()
    ended = run("viz", other, *words[2:])
    assert "picture: viz/1-spairkit-2.png" in ended.out
    assert Path("viz/1-spairkit.png").read_bytes() == before
    several = ["viz", folder / "a", other / "1.png", "--out", "mixed", *words[2:]]
    assert run(*several).status == 0
    drawn = sorted(path.relative_to("mixed").as_posix() for path in Path("mixed").rglob("*.png"))
    assert drawn == ["cells/a/1-spairkit.png", "others/1-spairkit.png"]
    monkeypatch.chdir(folder)
    assert run("viz", ".", *words[2:]).status == 0
    found = run("detect", ".", *words[2:], "--format", "jsonl").out.splitlines()
    assert len(found) == 5, "pictures are no images"
    assert sorted(path.name for path in Path("viz/a").iterdir()) == ["1-spairkit.png"]


def test_viz_overwrites_only_pictures(run: Runner, tmp_path: Path) -> None:
    image = images_in(tmp_path, "scene.png", "photo.png") / "scene.png"
    photo = (tmp_path / "photo.png").read_bytes()
    ended = run("viz", image, "--out", tmp_path / "photo.png")
    assert ended.status == 2
    assert "photo.png is no picture by spairkit" in ended.err
    assert (tmp_path / "photo.png").read_bytes() == photo
    Path("scene-spairkit.png").write_bytes(b"a file of the user")
    assert "picture: scene-spairkit-2.png" in run("viz", image, "--search", "off").out
    assert Path("scene-spairkit.png").read_bytes() == b"a file of the user"
    Path("scene-spairkit.png").unlink()
    named = [tmp_path / "picture.png", "--search", "off"]
    assert run("viz", image, "--out", *named).status == 0
    assert run("viz", tmp_path / "photo.png", "--out", *named).status == 0
    ended = run("viz", image, tmp_path / "photo.png", "--out", tmp_path / "c.png")
    assert ended.status == 2
    assert "--out names one picture and there are several images; name a folder" in ended.err
    ended = run("viz", tmp_path, "--out", tmp_path / "absent" / "pictures")
    assert ended.status == 2
    assert "there is no folder" in ended.err
    ended = run("viz", tmp_path, "--out", "tiny.toml")
    assert ended.status == 2
    assert "tiny.toml: is a file" in ended.err


def test_selection_by_ap_is_announced(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_command, "_finish", lambda *_, **__: None)
    said = "the highest validation AP paper"
    words = ["train", "--config", "tiny.toml", "--steps", "1"]
    assert said in run(*words, "--out", "by-ap", "--select", "ap").err
    assert said not in run(*words, "--out", "by-elbo").err


def test_laptop_without_data_warns_about_mnist(
    run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_command, "_finish", lambda *_, **__: None)
    said = "the published figures of the laptop preset are for MNIST (--data FILE)"
    words = ["train", "--config", "tiny.toml", "--steps", "1"]
    laptop = [*words, "--preset", "laptop"]
    assert run(*laptop, "--out", "laptop").err.count(said) == 1
    assert said not in run(*laptop, "--out", "laptop-digits", "--data", "digits").err
    assert said not in run(*words, "--out", "quick").err
    assert said not in run("train", "--resume", "laptop").err


def test_report_can_be_regenerated(run: Runner) -> None:
    page = Path("runs/digits-quick-1/report.html")
    page.unlink()
    ended = run("report", "runs/digits-quick-1")
    assert ended == Ended(0, f"{page}\n", "")
    assert page.is_file()


AIR = """\
[data]
image_height = 24
image_width = 24
min_objects = 0
max_objects = 2
validation_images = 6
test_images = 10

[model]
units = 8
output_hidden = 8
difference_hidden = [8]
what = 4
encoder_hidden = [8]
decoder_hidden = [8]

[train]
batch_size = 4
steps = 4
validation_every = 2
threads = 1
"""


@pytest.mark.parametrize(("kind", "preset"), [("air", "quick"), ("dair", "paper")])
def test_air_works_from_train_to_pictures(run: Runner, kind: str, preset: str) -> None:
    """The quick preset infers the count; the paper preset is given it. Images may be empty."""
    Path("air.toml").write_text(AIR)
    options = ("--config", "air.toml", "--preset", preset, "--model", kind)
    ended = run("train", *options, "--json", "--quiet")
    assert ended.status == 0
    trained = json.loads(ended.out)
    folder = f"digits-{preset}-{kind}-1"
    assert trained["run"] == f"runs/{folder}"
    assert {"0", "1", "2"} == trained["test"]["by_objects"].keys()
    evaluated = run("eval", "--checkpoint", trained["run"], "--json", "--quiet")
    assert json.loads(evaluated.out)["overall"] == trained["test"]["overall"]
    assert run("report", trained["run"]).status == 0
    out = f"{folder}-again"
    commands = [
        line
        for line in run("train", *options, "--out", out, "--quiet").out.splitlines()
        if line.startswith("  spairkit ")
    ]
    assert len(commands) == 2
    for command in commands:
        assert run(*shlex.split(command)[1:]).status == 0, command
    image = f"{out}/example.png"
    for command in ("viz", "detect"):
        plain = run(command, image, "--checkpoint", out)
        counted = run(command, image, "--checkpoint", out, "--count", 2)
        if preset == "paper":
            assert plain.status == 2
            assert "this DAIR was trained with the number of objects" in plain.err
            assert counted.status == 0
        else:
            assert plain.status == 0
            assert counted.status == 2
            assert "this model infers the count itself; remove count" in counted.err


def test_run_cannot_be_resumed_with_another_model(run: Runner) -> None:
    ended = run("train", "--resume", "runs/digits-quick-1", "--model", "air")
    assert ended.status == 2
    assert "the model of this run is spair, not air; remove --model" in ended.err
    assert run("train", "--model", "airy").err.strip().endswith("(got 'airy')")


def test_progress_shows_the_objects_of_an_image(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train_progress, "LINE_EVERY_SECONDS", 0.0)
    losses = {"reconstruction": 9.0, "kl_pres": 1.0, "total": 10.0, "elbo": -10.0, "found": 18.26}
    settings = Config(train=TrainConfig(steps=40))
    events = [Step(step, 40, losses if step == 20 else None, step / 10) for step in range(1, 31)]
    step, figures = show_events([*events], settings, 0, quiet=False)
    assert (step, figures) == (30, {})
    said = capsys.readouterr().err.splitlines()
    shown = "18.3 objects an image  elbo -10.0 = -(reconstruction 9.0, pres 1.0)"
    assert said[-1] == f"step 30 of 40, 10.0/s, 0:00:01 left  {shown}"
    show_events([*events], settings, 0, quiet=True)
    assert not capsys.readouterr().err


def test_slow_compilation_shows_its_progress(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = [Compiling(0, 4, "cells"), Compiling(1, 4, "renderer"), Compiling(3, 4, "likelihood")]
    monkeypatch.setattr(compiling, "compiling", lambda *_: iter(steps))
    monkeypatch.setattr(train_progress, "_COMPILING_SECONDS", 0.0)
    show_compiling(Config(), torch.device("cpu"), quiet=False)
    said = capsys.readouterr().err.splitlines()
    assert said[1] == "compiling kernels (first use only): 25%, next: renderer"
    assert len(said) == 3
    show_compiling(Config(), torch.device("cpu"), quiet=True)
    assert not capsys.readouterr().err
