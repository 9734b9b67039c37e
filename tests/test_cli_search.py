"""The search on the command line: its option, calibration after training, and progress."""

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from spairkit.cli import console
from spairkit.cli.main import main
from spairkit.config import Config
from spairkit.config_values import from_toml
from spairkit.detector import load
from spairkit.images import write_png
from spairkit.models.loading import build
from spairkit.presets import resolve
from spairkit.search.calibration import Calibration
from spairkit.search.search import PosteriorSearch
from spairkit.storage.checkpoints import (
    environment,
    load_checkpoint,
    save_calibration,
    save_checkpoint,
)
from spairkit.storage.runs import Run, pretrained
from spairkit.training.calibration import calibrates
from spairkit.training.loop import fit, train

CPU = torch.device("cpu")
TINY = """\
[data]
image_height = 24
image_width = 24
max_objects = 2
validation_images = 6
test_images = 4

[model]
backbone_channels = [4]
features = 8
hidden = 8
passthrough = 4
what = 4
encoder_hidden = [8]
decoder_hidden = [8]

[search]
mode = "refine"

[train]
batch_size = 4
steps = 3
validation_every = 2
threads = 1
"""


@dataclass(frozen=True)
class Ended:
    """Exit status and output of a command."""

    status: Any
    out: str
    err: str


Runner = Callable[..., Ended]


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Runner:
    """Runs a command in this process, in a folder without runs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.toml").write_text(TINY)

    def run_command(*arguments: object) -> Ended:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Ended(ended.value.code, captured.out, captured.err)

    return run_command


def tiny(**changes: Any) -> Config:
    return from_toml(TINY + "".join(f"{key} = {value}\n" for key, value in changes.items()))


def untrained(folder: Path, config: Config) -> Path:
    """A checkpoint of a network with its first weights."""
    weights = build(config).state_dict()
    return save_checkpoint(folder, step=0, config=config, model=weights, environment=environment())


def test_eval_names_its_search_and_its_default_is_that_of_the_run(
    run: Runner, tmp_path: Path
) -> None:
    few = ("--set", "data.test_images=4")
    figures = {
        mode: json.loads(run("eval", "--json", *few, "--search", mode).out)
        for mode in ("off", "refine", "full")
    }
    assert {mode: found["search"] for mode, found in figures.items()} == {
        mode: mode for mode in figures
    }
    coverage = {mode: found["overall"]["interval_coverage"] for mode, found in figures.items()}
    assert coverage["off"] is None
    assert coverage["full"] is not None
    assert figures["off"]["overall"]["ap"] != figures["full"]["overall"]["ap"]
    packaged = load(device="cpu").search
    assert f"\nSearch: {packaged}.\n" in run("eval", *few).out
    assert "\nSearch: refine.\n" in run("eval", *few, "--search", "refine").out
    own = untrained(tmp_path, tiny())
    assert "\nSearch: refine.\n" in run("eval", "--checkpoint", own).out
    assert "\nSearch: off.\n" in run("eval", "--checkpoint", own, "--search", "off").out


def test_eval_uses_the_calibration_of_the_checkpoint(run: Runner, tmp_path: Path) -> None:
    own = shutil.copytree(pretrained(), tmp_path / "own")
    words = ("eval", "--json", "--checkpoint", own, "--search", "refine")
    few = ("--set", "data.test_images=4")
    found = json.loads(run(*words, *few).out)["overall"]
    assert found["count_accuracy"] > 0
    save_calibration(own, asdict(Calibration(midpoint=1e9)))  # no object saves so much
    none = json.loads(run(*words, *few).out)["overall"]
    assert none["count_bias"] == -none["objects"] / none["images"]


def test_detect_and_viz_search_as_told(run: Runner, tmp_path: Path) -> None:
    assert run("data", "make", "scenes", "--count", "1").status == 0
    image = "scenes/00000.png"
    for command in (("detect", image, "--format", "jsonl"), ("viz", image, "--json")):
        off, full = (json.loads(run(*command, "--search", mode).out) for mode in ("off", "full"))
        if command[0] == "viz":
            off, full = off["pictures"][0], full["pictures"][0]
        assert "count_mean" not in off
        low, high = full["count_interval"]
        assert low - 0.5 < full["count_mean"] < high + 0.5
    ended = run("detect", image, "--search", "half")
    assert ended.status == 2
    assert ended.err.count("\n") == 1


@pytest.mark.parametrize("kind", ["air", "conncomp"])
def test_models_without_a_search_refuse_the_option(run: Runner, tmp_path: Path, kind: str) -> None:
    config = resolve("quick", {"model": {"kind": kind}})
    own = untrained(tmp_path, config)
    image = tmp_path / "image.png"
    write_png(image, torch.zeros(3, 50, 50))
    for words in (["eval"], ["viz", image], ["detect", image]):
        ended = run(*words, "--checkpoint", own, "--search", "full")
        assert (ended.status, ended.out) == (2, "")
        assert ended.err == f"spairkit: {kind} has no search; remove it (--search), or use off\n"
        ended = run("viz", image, "--checkpoint", own, "--search", "off")
        assert ended.status == 0


def test_train_calibrates_before_it_measures(
    run: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[int] = []
    monkeypatch.setattr(console.Counter, "__call__", lambda self, number: done.append(number))
    ended = run("train", "--config", "tiny.toml", "--out", "own")
    assert ended.status == 0, ended.err
    assert done == [6, 4, 1, 2, 3, 4]  # scenes of the calibration, the test and the report
    said = "validations are quick, without the search; test figures are with it"
    assert f"{said} (search.mode = 'refine')\n" in ended.err
    calibration = load_checkpoint(Path("own")).calibration
    assert calibration.keys() == asdict(Calibration()).keys()
    assert load("own", "cpu").calibration == Calibration(**calibration)
    test = json.loads(Path("own/test.json").read_text())
    assert test["search"] == "refine"
    again = json.loads(run("eval", "--checkpoint", "own", "--json").out)
    assert test["overall"] == again["overall"]
    assert "Search: refine." in Path("own/report.html").read_text()
    assert "\nSearch: refine.\n" in ended.out


def test_training_without_a_search_is_not_calibrated(run: Runner) -> None:
    ended = run("train", "--config", "tiny.toml", "--out", "own", "--set", "search.mode=off")
    assert ended.status == 0
    assert load_checkpoint(Path("own")).calibration == {}
    assert "validations are quick" not in ended.err


def test_interrupted_training_is_not_calibrated(
    run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def signalled(*arguments: Any) -> Iterator[Any]:
        for event in fit(*arguments):
            signal.raise_signal(signal.SIGINT)
            yield event

    monkeypatch.setattr("spairkit.training.loop.fit", signalled)
    ended = run("train", "--config", "tiny.toml", "--out", "own")
    assert ended.status == 130
    assert load_checkpoint(Path("own")).calibration == {}
    assert not Path("own/test.json").exists()


def test_validations_do_not_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: Any) -> Any:
        raise AssertionError("searched")

    config = tiny()
    own = Run.create(tmp_path / "own", config)
    assert calibrates(own)
    monkeypatch.setattr(PosteriorSearch, "find", refused)
    with own.lock():
        list(fit(config, own, CPU))
    with pytest.raises(AssertionError, match="searched"):
        load(own.path, CPU).detect(torch.zeros(3, 24, 24))


def test_train_in_python_calibrates(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    values = {
        "data.validation_images": 2,
        "model.backbone_channels": [4],
        "model.encoder_hidden": [8],
        "search.mode": "refine",
        "train.steps": 1,
    }
    detector = train(set=values, device="cpu")
    assert "calibrating the search\n" in capsys.readouterr().err
    saved = load_checkpoint(Path(detector.name)).calibration
    assert detector.calibration == Calibration(**saved)


def test_progress_names_its_phases_and_grows() -> None:
    detector = load(device="cpu", search="full")
    calls: list[tuple[str, float]] = []
    detector.on_progress = lambda phase, share: calls.append((phase, share))
    detector.detect(torch.zeros(3, 48, 48))
    scene = torch.zeros(3, 48, 48)
    scene[:, 10:22, 12:22] = 1
    detector.detect(scene)
    assert {phase for phase, _ in calls} == {"refining objects", "trying moves"}
    first = calls[: [phase for phase, _ in calls].index("trying moves")]
    assert all(0 < share <= 1 for _, share in first)
    moves = [share for phase, share in calls if phase == "trying moves"]
    assert moves[0] == 0
    assert max(moves) < 1
    detector.on_progress = None
    assert isinstance(detector.detect(scene).scores, torch.Tensor)


class Bar:
    """A progress bar that notes the state of its tasks."""

    disable = False

    def __init__(self) -> None:
        self.tasks: list[dict[str, Any]] = []

    def add_task(self, description: str, **state: Any) -> int:
        self.tasks.append({"description": description, "visible": True, **state})
        return len(self.tasks) - 1

    def update(self, task: int, **state: Any) -> None:
        self.tasks[task].update(state)


def test_only_a_long_search_shows_its_own_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    bar = Bar()
    show_done = console.Counter(bar, "images", 3)
    images, part = bar.tasks
    show_done.search("refining objects", 0.25)
    assert not part["visible"]
    now += 2.5
    show_done.search("trying moves", 0.5)
    assert part["visible"]
    assert (part["description"], part["completed"], part["total"]) == ("trying moves", 50, 100)
    show_done(1)
    assert images["completed"] == 1
    assert not part["visible"], "the next image has only begun"
    show_done.search("refining objects", 0.1)
    assert not part["visible"]


def test_detect_shows_the_progress_of_a_long_search(
    run: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(console.Counter, "search", lambda self, phase, share: calls.append(phase))
    image = tmp_path / "image.png"
    write_png(image, torch.rand(3, 24, 24))
    for words in (["detect", image], ["viz", image], ["eval", "--set", "data.test_images=1"]):
        calls.clear()
        assert run(*words, "--search", "refine").status == 0
        assert set(calls) == {"refining objects"}
