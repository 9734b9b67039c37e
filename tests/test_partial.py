"""What `detect` keeps of its work: after kills, full disks, broken images and other settings."""

import fcntl
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from PIL import Image

from spairkit.cli import detect as detect_command
from spairkit.cli.partial import Partial
from spairkit.detector import Detector
from spairkit.images import write_png

if TYPE_CHECKING:
    from conftest import Ended

QUICKLY = ("--search", "off", "--device", "cpu", "--quiet")


Runner = Callable[..., "Ended"]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_process: Runner) -> Runner:
    """Runs a command in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    return in_process


def scenes(folder: Path, number: int) -> Path:
    """Images of two sizes, which are searched in batches of two."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for i in range(number):
        size = 48 + 2 * (i % 4 > 1)
        image = (torch.rand(3, size, size, generator=generator) > 0.9).float()
        write_png(folder / f"{i:03}.png", image)
    return folder


class Stop(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("format_", ["coco", "csv", "jsonl"])
def test_detect_goes_on_where_it_was_stopped(
    run: Runner, monkeypatch: pytest.MonkeyPatch, format_: str
) -> None:
    words = ["detect", scenes(Path("few"), 9), "--format", format_, "--threshold", "0.01"]
    assert run(*words, "--search", "refine", "--out", "whole").status == 0
    plain, calls = Detector.detect_batch, []

    def stopping(self: Detector, images: torch.Tensor, *rest: object) -> object:
        calls.append(len(images))
        if sum(calls) > 5:
            raise Stop
        return plain(self, images, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Detector, "detect_batch", stopping)
        ended = run(*words, "--search", "refine", "--out", "found")
    assert ended.status == 1
    assert "4 images finished, kept in found.partial; the same command goes on" in ended.err
    assert not Path("found").exists()
    left: list[int] = []

    def counting(self: Detector, images: torch.Tensor, *rest: object) -> object:
        left.append(len(images))
        return plain(self, images, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Detector, "detect_batch", counting)
    ended = run(*words, "--search", "refine", "--out", "found")
    assert ended.status == 0
    assert "4 images finished before, 5 left" in ended.err
    assert sum(left) == 5
    assert Path("found").read_bytes() == Path("whole").read_bytes()
    assert sorted(path.name for path in Path().iterdir()) == ["few", "found", "whole"]


def test_only_what_has_not_changed_is_kept(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = scenes(Path("few"), 6)
    words = ["detect", folder, "--out", "found.json", *QUICKLY]

    def full(*_: object) -> None:
        raise Stop

    def kept() -> int:
        """Leaves a partial result of all images, and counts those that are used of an earlier."""
        with monkeypatch.context() as patch:
            patch.setattr(detect_command, "_text", full)
            said = run(*words).err
        before = [line for line in said.splitlines() if "finished before" in line]
        return int(before[0].split()[0]) if before else 0

    assert kept() == 0
    assert kept() == 6
    write_png(folder / "002.png", torch.ones(3, 48, 48))
    assert kept() == 5
    os.rename(folder / "001.png", folder / "001b.png")
    assert kept() == 5
    write_png(folder / "000a.png", torch.ones(3, 48, 48))
    assert kept() == 1, "those behind a new image have other numbers"
    words += ["--threshold", "0.6"]
    assert kept() == 0, "other settings"
    assert run(*words).status == 0
    assert not Path("found.json.partial").exists()


def test_line_that_a_crash_cut_short_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "x.partial"
    path.write_bytes(b'{"spairkit detect": "k"}\n[]\n[{"name": "a", "num')
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND)
    Partial(path, descriptor).read("k")
    assert path.read_bytes() == b'{"spairkit detect": "k"}\n[]\n'
    Partial(path, descriptor).read("other")
    assert path.read_bytes() == b'{"spairkit detect": "other"}\n'
    os.close(descriptor)


def test_files_of_others_are_not_taken_for_partial_results(run: Runner) -> None:
    image = scenes(Path("few"), 1) / "000.png"
    before = image.read_bytes()
    os.link(image, "found.json.partial")
    ended = run("detect", image, "--out", "found.json", *QUICKLY)
    assert ended.status == 2
    assert ended.err.splitlines()[-1].startswith("spairkit: found.json.partial: is no partial")
    assert image.read_bytes() == before
    Path("found.json.partial").unlink()
    os.symlink(image, "found.json.partial")
    assert run("detect", image, "--out", "found.json", *QUICKLY).status == 2
    assert image.read_bytes() == before
    Path("found.json.partial").unlink()
    os.mkfifo("found.json.partial")
    assert run("detect", image, "--out", "found.json", *QUICKLY).status == 2


def test_a_broken_image_costs_no_other_result(run: Runner) -> None:
    folder = scenes(Path("mixed"), 6)
    Image.fromarray((torch.rand(72, 96) * 255).byte().numpy()).save(folder / "004.jpg")
    data = (folder / "004.jpg").read_bytes()
    (folder / "004.jpg").write_bytes(data[: len(data) // 2])
    ended = run("detect", folder, "--out", "found.jsonl", "--format", "jsonl", *QUICKLY)
    assert ended.status == 0
    assert "skipped 1 of 7: mixed/004.jpg: a damaged image" in ended.err
    assert len(Path("found.jsonl").read_text().splitlines()) == 6
    # one that is named is an error, but after the others are done
    ended = run("detect", *sorted(folder.iterdir()), "--out", "named.jsonl", "--format", "jsonl")
    assert ended.status == 2
    assert ended.err.splitlines()[-1].startswith("spairkit: skipped 1 of 7: mixed/004.jpg: a dam")
    assert len(Path("named.jsonl").read_text().splitlines()) == 6
    ended = run("viz", *sorted(folder.iterdir()), "--search", "off")
    assert ended.status == 2
    assert len(list(Path("viz").iterdir())) == 6


def started(*words: object) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "spairkit", *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, env=environment)


def test_full_disk_is_one_line_and_a_second_start_goes_on(run: Runner) -> None:
    words = ["detect", scenes(Path("few"), 6), "--format", "jsonl", "--threshold", "0", *QUICKLY]
    assert run(*words, "--out", "whole").status == 0
    limit = Path("whole").stat().st_size // 2
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        ended = run(*words, "--out", "found")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert ended.status == 2
    assert ended.err.splitlines()[-1] == "spairkit: cannot write found.partial: File too large"
    assert sorted(path.name for path in Path().iterdir()) == ["few", "found.partial", "whole"]
    ended = run(*words, "--out", "found")
    assert "finished before" in ended.err
    assert Path("found").read_bytes() == Path("whole").read_bytes()


def test_second_process_on_one_output_is_refused(run: Runner) -> None:
    folder = scenes(Path("few"), 1)
    with open("found.partial", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        ended = run("detect", folder, "--out", "found", *QUICKLY)
    assert ended.status == 2
    assert ended.err.endswith("found.partial: another process works on this output\n")


@pytest.mark.parametrize("kills", [2, pytest.param(200, marks=pytest.mark.long)])
def test_kills_lose_no_finished_image(run: Runner, kills: int) -> None:
    words = ["detect", scenes(Path("many"), 120), "--format", "csv", "--threshold", "0.01"]
    words += QUICKLY[:-1]
    assert run(*words, "--out", "whole").status == 0
    partial = Path("found.partial")
    delay = torch.Generator().manual_seed(0)
    for _ in range(kills):
        reached = partial.stat().st_size if partial.exists() else 0
        if Path("found").exists():
            Path("found").unlink()
            reached = 0
        process = started(*words, "--out", "found")
        while process.poll() is None and not (
            partial.exists() and partial.stat().st_size > reached
        ):
            time.sleep(0.005)
        time.sleep(float(torch.rand((), generator=delay)) * 0.05)
        process.kill()
        process.communicate()
        assert Path("found").exists() or partial.stat().st_size >= reached, "nothing went back"
    assert run(*words, "--out", "found").status == 0
    assert Path("found").read_bytes() == Path("whole").read_bytes()
    assert json.dumps(sorted(os.listdir())) == json.dumps(["found", "many", "whole"])
