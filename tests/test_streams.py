"""Closed, full and broken standard streams, and names on a terminal."""

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spairkit.cli.main import main
from spairkit.images import is_picture, write_png

CLI = Path(__file__).parent.parent / "cli"
QUICKLY = ("--search", "off", "--device", "cpu")


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A black image in the current folder."""
    monkeypatch.chdir(tmp_path)
    write_png("a.png", torch.zeros(3, 48, 48))
    return Path("a.png")


def status_of(*words: object) -> int:
    """The exit status of a command in this process."""
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def available(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 1 << 16)
    except BlockingIOError:
        return b""


def test_closed_streams_lose_no_result(image: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "spairkit",
        "detect",
        str(image),
        "--out",
        "found.json",
        *QUICKLY,
    ]
    done = subprocess.run(["sh", "-c", '"$@" <&- >&- 2>&-', "sh", *command], check=False)
    assert done.returncode == 0
    assert json.loads(Path("found.json").read_text()) == []


@pytest.mark.parametrize("closed", ["stdin", "stdout", "stderr"])
def test_a_closed_stream_loses_no_result(
    image: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], closed: str
) -> None:
    monkeypatch.setattr(sys, closed, None)
    assert status_of("viz", image, *QUICKLY) == 0
    assert is_picture("a-spairkit.png")
    assert "error" not in capsys.readouterr().err


def test_result_for_a_closed_stdout_is_refused_before_the_work(
    image: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert status_of("detect", image) == 2
    message = "spairkit: standard output is closed; name a file with --out\n"
    assert capsys.readouterr().err == message


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_full_stdout_is_one_line(unbuffered: str) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "spairkit", "config", "show"],
            stdout=full,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
            text=True,
            check=False,
        )
    assert done.returncode == 2
    assert done.stderr == "spairkit: standard output cannot be written: No space left on device\n"


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_pictures_are_drawn_although_a_stream_is_full(
    image: Path, monkeypatch: pytest.MonkeyPatch, stream: str
) -> None:
    write_png("b.png", torch.zeros(3, 48, 48))
    with open("/dev/full", "w") as full, monkeypatch.context() as patch:
        patch.setattr(sys, stream, full)
        status = status_of("viz", "a.png", "b.png", *QUICKLY)
    assert status == (2 if stream == "stdout" else 0)
    assert is_picture("viz/a-spairkit.png")
    assert is_picture("viz/b-spairkit.png")


def test_closed_pipe_causes_no_error_message() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as closed:
        done = subprocess.run(
            [sys.executable, "-m", "spairkit", "config", "show"],
            stdout=closed,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.stderr == ""
    assert done.returncode == 1


@pytest.mark.parametrize(
    "words",
    [
        ["viz", ".", *QUICKLY],
        ["viz", ".", "--json", *QUICKLY],
        ["detect", ".", *QUICKLY],
        ["detect", ".", "--format", "csv", "--threshold", "0", *QUICKLY],
        ["detect", ".", "--format", "jsonl", *QUICKLY],
        ["eval", "--data", ".", *QUICKLY],
        ["data", "look", "."],
    ],
)
def test_no_escape_sequence_of_a_name_reaches_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    folder = tmp_path / "\x1b]0;title\x07\x1b[31m\x9b5m"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TERM", "dumb")  # gets no progress bar
    name = "\x1b[2J\x9b7m.png"
    write_png(name, torch.zeros(3, 48, 48).index_fill_(2, torch.arange(20, 30), 1.0))
    bar = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [20, 0, 10, 48], "area": 480}
    truth = {
        "images": [{"id": 1, "file_name": name, "width": 48, "height": 48}],
        "annotations": [bar | {"iscrowd": 0}],
        "categories": [{"id": 1, "name": "bar"}],
    }
    Path("annotations.json").write_text(json.dumps(truth))
    ours, terminal = pty.openpty()
    os.set_blocking(ours, False)
    with os.fdopen(terminal, "w") as stream:
        assert stream.isatty()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            patch.setattr(sys, "stderr", stream)
            assert status_of(*words) == 0
        received = b"".join(iter(lambda: available(ours), b"")).decode()
    os.close(ours)
    assert re.search("[57]m", received) or words[0] == "detect"
    assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", received)


def test_commands_print_through_one_module() -> None:
    """It escapes what a terminal would obey."""
    for path in CLI.glob("*.py"):
        if path.name != "console.py":
            assert not re.search(r"typer\.s?echo\(|(?<![.\w])(print|Console)\(", path.read_text())
