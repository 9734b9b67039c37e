"""The command line without training: errors, options and settings."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from PIL import Image

import spairkit
from spairkit import config_values
from spairkit.cli.console import progress_bar, results
from spairkit.cli.interrupts import Interrupts
from spairkit.cli.main import main
from spairkit.cli.options import choose_checkpoint
from spairkit.config_values import from_toml
from spairkit.errors import InputError
from spairkit.images import is_picture, write_png
from spairkit.presets import names, resolve
from spairkit.report.signs import Signs, write_signs
from spairkit.storage.runs import Run, pretrained

COMMANDS = ("train", "eval", "viz", "detect", "count", "doctor", "data", "config", "report")


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
    """Runs a command in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run_command(*arguments: object) -> Ended:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Ended(ended.value.code, captured.out, captured.err)

    return run_command


def raising(error: BaseException) -> Callable[..., NoReturn]:
    def fail(*args: object) -> NoReturn:
        raise error

    return fail


def test_help_lists_every_command(run: Runner) -> None:
    ended = run("--help")
    assert ended.status == 0
    for command in COMMANDS:
        assert re.search(rf"\b{command}\b", ended.out)
        assert run(command, "--help").status == 0
    assert ended.out.strip() in run().out, "a command without arguments prints help"


def test_help_lists_every_preset(run: Runner) -> None:
    text = " ".join(run("train", "--help").out.split())
    for name in names():
        assert name in text


def test_version_is_printed(run: Runner) -> None:
    assert run("--version") == Ended(0, f"spairkit {spairkit.__version__}\n", "")


def test_module_runs_like_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "spairkit", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"spairkit {spairkit.__version__}\n"


@pytest.mark.parametrize(
    "words", [["nonsense"], ["train", "--nonsense"], ["viz"], ["eval", "--threshold", "1"]]
)
def test_wrong_usage_prints_one_line_and_exits_with_2(run: Runner, words: list[str]) -> None:
    ended = run(*words)
    assert ended.status == 2
    assert ended.out == ""
    assert ended.err.startswith("spairkit: ")
    assert ended.err.endswith("--help\n")
    assert ended.err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--preset", "nope"], "unknown preset 'nope'; choose from: quick, laptop, paper"),
        (["train", "--set", "train.steps=0"], "train.steps: input should be greater than or equal"),
        (["train", "--set", "train.stops=1"], "unknown key, did you mean steps?"),
        (["train", "--set", "steps"], "--set steps: write key=value"),
        (["train", "--config", "absent.toml"], "absent.toml: no such config file"),
        (["train", "--data", "absent"], "absent: no such folder or file, and no dataset"),
        (["train", "--out", "a", "--resume", "b"], "--out names a new run and --resume an old one"),
        (["train", "--resume", "absent"], "absent: not a run (no config.toml in it)"),
        (["train", "--out", "file", "--steps", "1"], "cannot create the folder file: File exists"),
        (
            ["eval", "--checkpoint", "absent"],
            "absent: no such checkpoint; create one",
        ),
        (["eval", "--checkpoint", "last"], "--checkpoint last: no run under ./runs"),
        (["eval", "--set", "train.steps=3"], "--set train: eval accepts only data settings"),
        (["viz", "a.png", "b.png", "--out", "c.png"], "--out names one picture"),
        (["viz", "a/x.png", "b/x.png"], "a/x.png: no such image or folder"),
        (["viz", "file"], "file: not an image that can be read"),
        (
            ["viz", "file", "--out", "a/b.png"],
            "--out a/b.png: there is no folder a; create it first",
        ),
        (["viz", "file", "--out", "."], "--out .: pictures are PNG; name a file that ends in .png"),
        (["eval", "--out", "a/b.json"], "--out a/b.json: there is no folder a"),
        (["detect", "file", "--out", "a/b.json"], "--out a/b.json: there is no folder a"),
        (["detect", "file"], "file: not an image that can be read"),
        (["detect", "."], ".: no images in this folder"),
        (["detect", "absent.png"], "absent.png: no such image or folder"),
        (["config", "copy", "file"], "file already exists; name a new file"),
        (["data", "make", "file"], "file already exists; name a new folder"),
        (["data", "make", "new", "--data", "."], "a folder holds image files already"),
        (["data", "look", "absent"], "absent: no such image or folder"),
        (["data", "look", "."], "no image"),
        (["data", "look", "file"], "not an image that can be read"),
        (["data", "look", ".", "--out", "no/picture.png"], "there is no folder no"),
    ],
)
def test_user_errors_print_one_line_and_exit_with_2(
    run: Runner, tmp_path: Path, words: list[str], message: str
) -> None:
    (tmp_path / "file").write_bytes(b"content")
    ended = run(*words)
    assert ended.status == 2
    assert ended.out == ""
    (line,) = ended.err.splitlines()
    assert line.startswith("spairkit: ")
    assert message in line
    assert "Traceback" not in ended.err
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "nothing is left behind"
    assert (tmp_path / "file").read_bytes() == b"content"


def test_viz_does_not_overwrite_its_image(run: Runner, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"content")
    ended = run("viz", "x.png", "--out", "./x.png")
    assert ended.status == 2
    assert "--out x.png: is an input (x.png); name another file" in ended.err
    assert (tmp_path / "x.png").read_bytes() == b"content"


def test_system_errors_print_one_line_and_exit_with_2(
    run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = PermissionError(13, "Permission denied", "thing")
    monkeypatch.setattr(config_values, "to_toml", raising(error))
    assert run("config", "show") == Ended(2, "", "spairkit: thing: Permission denied\n")


def too_much_for_torch() -> Exception:
    with pytest.raises(RuntimeError) as caught:
        torch.zeros(1 << 50)
    return caught.value


def too_much_for_numpy() -> Exception:
    with pytest.raises(MemoryError) as caught:
        np.zeros(1 << 50)
    return caught.value


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(12, "Cannot allocate memory"),
        torch.OutOfMemoryError("CUDA out of memory"),
        too_much_for_torch(),
        too_much_for_numpy(),
    ],
)
def test_lack_of_memory_prints_one_line_and_exits_with_2(
    run: Runner, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(config_values, "to_toml", raising(error))
    ended = run("config", "show")
    assert ended.status == 2
    assert ended.err.startswith("spairkit: not enough memory; try a lower train.batch_size")


def test_internal_errors_print_one_line_and_exit_with_1(
    run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config_values, "to_toml", raising(KeyError("gone")))
    assert run("config", "show") == Ended(
        1,
        "",
        "spairkit: internal error: KeyError: 'gone'; set SPAIRKIT_DEBUG=1 for the traceback\n",
    )
    monkeypatch.setenv("SPAIRKIT_DEBUG", "1")
    ended = run("config", "show")
    assert ended.status == 1
    assert ended.err.startswith("Traceback (most recent call last):")
    assert ended.err.endswith("spairkit: internal error: KeyError: 'gone'\n")


def test_messages_are_one_printable_line(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    error = InputError("evil\n\x1b[31mname\udcff.png: é")
    monkeypatch.setattr(config_values, "to_toml", raising(error))
    assert run("config", "show").err == "spairkit: evil \\x1b[31mname\\udcff.png: é\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_exits_with_128_plus_its_number(
    run: Runner, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    before = signal.getsignal(number)
    monkeypatch.setattr(config_values, "to_toml", lambda *_: os.kill(os.getpid(), number))
    assert run("config", "show") == Ended(128 + number, "", f"spairkit: stopped by {number.name}\n")
    assert signal.getsignal(number) is before


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


def test_long_note_leaves_room_for_the_progress_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "xterm")
    with progress_bar() as bar:
        bar.add_task("training", total=9, completed=3, note="word " * 30)
    shown = terminal.getvalue()
    assert "training" in shown
    assert "3/9" in shown
    assert shown.count("word") % 30 == 0
    monkeypatch.setenv("TERM", "dumb")
    assert progress_bar().disable, "a dumb terminal gets lines instead"


def test_tables_are_wide_enough_for_their_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", Terminal())
    for columns, width in ((40, 80), (120, 120)):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert results().width == width
    assert results(least_width=130).width == 130


def test_config_show_prints_the_config(run: Runner, tmp_path: Path) -> None:
    assert from_toml(run("config", "show").out) == resolve("quick")
    assert from_toml(run("config", "show", "--preset", "paper").out) == resolve("paper")
    shown = json.loads(run("config", "show", "--json").out)
    assert shown == config_values.to_dict(resolve("quick"))
    # a file overrides the preset, and --set overrides both
    (tmp_path / "mine.toml").write_text("[train]\nsteps = 5\nseed = 6\n")
    words = ["--config", "mine.toml", "--set", "train.seed=7"]
    settings = tomllib.loads(run("config", "show", *words).out)
    assert settings["train"]["steps"] == 5
    assert settings["train"]["seed"] == 7
    assert settings["train"]["learning_rate"] == resolve("quick").train.learning_rate


def test_copied_config_round_trips(run: Runner, tmp_path: Path) -> None:
    ended = run("config", "copy", "mine.toml", "--preset", "paper", "--set", "data.seed=3")
    assert (ended.status, ended.out) == (0, "")
    assert ended.err.startswith(
        "wrote mine.toml; train with: spairkit train --config mine.toml (on"
    )
    again = run("config", "show", "--config", "mine.toml")
    assert again.out == (tmp_path / "mine.toml").read_text()
    assert from_toml(again.out) == resolve("paper", {"data": {"seed": 3}})


def test_default_checkpoint_is_newest_run_else_packaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert choose_checkpoint(None) == pretrained()
    assert "using the packaged model" in capsys.readouterr().err
    brief = {"train": {"steps": 1}}
    made = Run.create(None, resolve("quick", brief))
    (made.path / "checkpoints" / "step-1").mkdir(parents=True)
    (made.path / "last").symlink_to("checkpoints/step-1")
    assert choose_checkpoint(None) == made.path
    assert capsys.readouterr().err == f"using the newest run: {made.path}\n"
    other = {"name": "folder", "path": str(tmp_path / "cells")}
    trained = Run.create(None, resolve("quick", brief, {"data": other}))
    (trained.path / "checkpoints" / "step-1").mkdir(parents=True)
    os.utime(trained.path / "checkpoints" / "step-1", (0, 0))  # before the other one
    assert choose_checkpoint(None, [tmp_path / "cells" / "a.png"]) == trained.path
    assert capsys.readouterr().err == f"using the newest run on these images: {trained.path}\n"
    assert choose_checkpoint(None, [tmp_path / "others" / "a.png"]) == made.path
    assert capsys.readouterr().err == f"using the newest run: {made.path}\n"
    assert choose_checkpoint(Path("last")) == made.path / "last"
    assert choose_checkpoint(Path("elsewhere")) == Path("elsewhere")
    (tmp_path / "last").mkdir()
    assert choose_checkpoint(Path("last")) == Path("last"), "an existing path takes precedence"
    assert capsys.readouterr().err == ""


def test_a_default_run_that_is_not_done_is_said_to_be_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    made = Run.create(Path("runs/a run"), resolve("quick", {"train": {"steps": 9}}))
    (made.path / "checkpoints" / "step-3").mkdir(parents=True)
    resume = "continue with: spairkit train --resume 'runs/a run'"
    choose_checkpoint(None)
    assert capsys.readouterr().err == (
        f"using the newest run: runs/a run, interrupted at update 3 of 9; {resume}\n"
    )
    choose_checkpoint(Path("best"))
    assert capsys.readouterr().err == (
        f"using runs/a run/best, interrupted at update 3 of 9; {resume}\n"
    )
    with made.lock():
        choose_checkpoint(None)
    assert capsys.readouterr().err == (
        "using the newest run: runs/a run, still training, at update 3 of 9\n"
    )
    assert not made.is_training
    (made.path / "checkpoints" / "step-9").mkdir()
    choose_checkpoint(None)
    choose_checkpoint(Path("best"))
    assert capsys.readouterr().err == "using the newest run: runs/a run\n"
    shutil.rmtree(made.path / "checkpoints" / "step-9")
    write_signs(made.path, Signs())  # as at the end of --minutes
    choose_checkpoint(None)
    assert capsys.readouterr().err == "using the newest run: runs/a run\n"


def test_doctor_tries_the_backends(run: Runner) -> None:
    findings = json.loads(run("doctor", "--json").out)
    assert findings["spairkit"] == spairkit.__version__
    assert findings["backend torch"] == "works"
    assert findings["backend cpu"] == "works"
    lines = run("doctor").out.splitlines()
    assert len(lines) == len(findings)


def test_repeated_signal_is_deferred_under_torchrun(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with Interrupts(quiet=True) as interrupts:
        for _ in range(2):
            signal.raise_signal(signal.SIGTERM)
        assert interrupts.number == signal.SIGTERM


def discs(folder: Path, *names: str) -> Path:
    """A folder of images of dark discs of 16 px; nine of them in each."""
    folder.mkdir()
    y, x = torch.meshgrid(torch.arange(96) + 0.5, torch.arange(96) + 0.5, indexing="ij")
    mask = (y % 32 - 16) ** 2 + (x % 32 - 16) ** 2 < 8**2
    for name in names:
        write_png(folder / name, (0.8 - 0.5 * mask).expand(3, -1, -1))
    return folder


def test_data_look_measures_and_draws(run: Runner, tmp_path: Path) -> None:
    folder = discs(tmp_path / "cells", "a.png", "b.png")
    ended = run("data", "look", folder)
    assert ended.status == 0
    lines = ended.out.splitlines()
    assert re.match(r"size: 1[67] px \(1\d to 1\d\); images are resized by 0\.7", lines[0])
    assert "darker than the background, grey images (--set prepare.contrast" in lines[1]
    assert lines[-1] == "picture: cells-look.png"
    assert ended.err == ""
    assert is_picture("cells-look.png")
    with Image.open("cells-look.png") as picture:
        assert picture.width > 2 * 96, "two images side by side"
    before = Path("cells-look.png").read_bytes()
    answer = json.loads(run("data", "look", folder, "--json", "--quiet").out)
    assert Path("cells-look.png").read_bytes() == before
    assert answer["diameter"] == pytest.approx(16, abs=1.5)
    assert (answer["polarity"], answer["objects"], answer["images"]) == ("dark", 9, 2)
    assert answer["picture"] == "cells-look.png"


def test_data_look_takes_one_image_and_names_the_picture(run: Runner, tmp_path: Path) -> None:
    image = discs(tmp_path / "cells.2", "a.png", "b.png") / "b.png"
    assert json.loads(run("data", "look", image.parent, "--json").out)["picture"] == (
        "cells.2-look.png"
    )
    assert json.loads(run("data", "look", image, "--json").out)["picture"] == "b-look.png"
    named = run("data", "look", image, "--out", "seen.png", "--json")
    assert json.loads(named.out)["picture"] == "seen.png"
    assert Path("seen.png").read_bytes() == Path("b-look.png").read_bytes()


def test_data_look_overwrites_only_pictures(run: Runner, tmp_path: Path) -> None:
    image = discs(tmp_path / "cells", "a.png") / "a.png"
    before = image.read_bytes()
    ended = run("data", "look", tmp_path / "cells", "--out", image)
    assert ended.status == 2
    assert "exists and is no picture by spairkit; name another with --out" in ended.err
    assert ended.err.count("\n") == 1
    assert image.read_bytes() == before
    ended = run("data", "look", tmp_path / "cells", "--out", "look.jpg")
    assert ended.status == 2
    assert ended.err == (
        "spairkit: --out look.jpg: pictures are PNG; name a file that ends in .png\n"
    )


def test_data_look_warns_where_there_are_no_objects(run: Runner, tmp_path: Path) -> None:
    (tmp_path / "blank").mkdir()
    write_png(tmp_path / "blank" / "a.png", torch.full((3, 40, 50), 0.5))
    ended = run("data", "look", "blank")
    assert ended.status == 0
    assert ended.err == (
        "warning: fewer than 5 compact objects were found: are there any in these images?\n"
    )
    assert is_picture("blank-look.png")
