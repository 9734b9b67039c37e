"""Commands where nothing can be written: one line, nothing half-written, and what was there stays.

A small file system in memory is filled to the last bytes, and one is made read-only. These tests
need the right to mount one.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from spairkit.storage.checkpoints import load_checkpoint
from spairkit.storage.runs import Run

TRAIN = ["train", "--config", "tiny.toml", "--data", "cells", "--steps", 3, "--quiet", "--out"]
OUTPUTS: dict[str, list[object]] = {
    "detect": ["detect", "cells", "--checkpoint", "run", "--out", "@/found.json"],
    "viz": ["viz", "cells/0.png", "--checkpoint", "run", "--out", "@/picture.png"],
    "eval": ["eval", "--checkpoint", "run", "--out", "@/figures.json"],
    "train": [*TRAIN, "@/new"],
    "compare": [
        "compare", "--data", "cells", "--models", "watershed,conncomp", "--quiet", "--out", "@/new",
    ],
    "data make": ["data", "make", "@/made", "--count", 2],
    "data look": ["data", "look", "cells", "--out", "@/look.png"],
    "config copy": ["config", "copy", "@/mine.toml"],
}  # fmt: skip
KEPT = {"detect": ["found.json.parts"], "compare": ["new"]}
"""What is done before the disk is full, from which the same command goes on."""


def words_of(name: str, folder: Path) -> list[str]:
    return [str(word).replace("@", str(folder)) for word in OUTPUTS[name]]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if mount("-t", "tmpfs", "-o", "size=1m", "tmpfs", folder) != 0:
        pytest.skip("file systems cannot be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def mount(*words: str | Path) -> int:
    return subprocess.run(["mount", *words], capture_output=True, check=False).returncode


def fill(disk: Path, but: int) -> None:
    """Leaves `but` pages of 4 KiB."""
    (disk / "filler").unlink(missing_ok=True)
    status = os.statvfs(disk)
    (disk / "filler").write_bytes(b"0" * (status.f_bavail - but) * status.f_frsize)


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("name", [name for name in OUTPUTS if name != "train"])
def test_no_output_is_half_written_on_a_full_disk(
    name: str, workplace: Path, disk: Path, command: Callable[..., Any]
) -> None:
    words = words_of(name, disk)
    for pages in (0, 1, 3, 12, 200):
        fill(disk, pages)
        ended = command(*words)
        if ended.status == 0:
            break
        assert "No space left on device" in ended.err
        left = {path.partition("/")[0] for path in listing(disk)} - {"filler"}
        assert left <= set(KEPT.get(name, []))
        assert not list(disk.rglob(".spairkit-tmp-*"))
    assert pages > 0
    assert ended.status == 0
    assert not (disk / "found.json.parts").exists()


@pytest.mark.parametrize("pages", [0, 1, 9, 40])
def test_training_on_a_full_disk_can_go_on(
    pages: int, workplace: Path, disk: Path, command: Callable[..., Any]
) -> None:
    fill(disk, pages)
    run = disk / "new"
    ended = command(*TRAIN, run)
    assert ended.status == 2
    assert "No space left on device" in ended.err
    assert not list(disk.rglob(".spairkit-tmp-*"))
    (disk / "filler").unlink()
    if (run / "config.toml").exists():
        for _, path in Run.open(run).checkpoints:
            load_checkpoint(path, with_optimiser=True)
        ended = command("train", "--resume", run, "--quiet")
    else:
        ended = command(*TRAIN, run)
    assert ended.status == 0, ended.err
    for file in ("model.safetensors", "optimiser.safetensors"):
        whole = Path("run/checkpoints/step-3", file).read_bytes()
        assert (run / "checkpoints" / "step-3" / file).read_bytes() == whole


@pytest.mark.parametrize("name", OUTPUTS)
def test_read_only_file_systems_are_named(
    name: str, workplace: Path, disk: Path, command: Callable[..., Any]
) -> None:
    assert mount("-o", "remount,ro", disk) == 0
    ended = command(*words_of(name, disk))
    assert ended.status == 2
    assert "Read-only file system" in ended.err or f"{disk} is not writable" in ended.err
    assert str(disk) in ended.err


def test_read_only_run_can_be_used_but_not_resumed(
    workplace: Path, disk: Path, command: Callable[..., Any]
) -> None:
    shutil.copytree("run", disk / "run", symlinks=True)
    assert mount("-o", "remount,ro", disk) == 0
    for reads in (["detect", "cells", "--out", "found.json"], ["eval"]):
        assert command(*reads, "--checkpoint", disk / "run").status == 0
    for writes in (["train", "--resume", disk / "run", "--steps", 4], ["report", disk / "run"]):
        ended = command(*writes)
        assert ended.status == 2
        assert "Read-only file system" in ended.err


# a process for each command, all of which share the imports; stderr is a pipe, which has no limit
LIMITED = """
import json, os, resource, sys
import torch._dynamo
import spairkit.experiments.compare, spairkit.kernels.cells_op, spairkit.report.page
from spairkit.cli.main import main

for words in json.loads(sys.argv[1]):
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(writes, 2)
        os.dup2(os.open(os.devnull, os.O_RDWR), 1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        try:
            main(words)
        except SystemExit as ended:
            os._exit(ended.code)  # to dismantle torch takes a second
    os.close(writes)
    with open(reads) as said:
        err = said.read()
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), err]), flush=True)
"""


def test_no_output_is_half_written_if_files_are_limited(workplace: Path) -> None:
    """As by `ulimit -f`, which needs no right."""
    Path("out").mkdir()
    children = [words_of(name, Path("out") / name) for name in OUTPUTS]
    for name in OUTPUTS:
        Path("out", name).mkdir()
    ended = subprocess.run(
        [sys.executable, "-c", LIMITED, json.dumps(children)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    for name, line in zip(OUTPUTS, ended.stdout.splitlines(), strict=True):
        status, err = json.loads(line)
        assert status == 2, (name, err)
        assert "File too large" in err.splitlines()[-1]
        left = {path.partition("/")[0] for path in listing(Path("out", name))}
        assert left <= {*KEPT.get(name, []), *(["new"] if name == "train" else [])}
        assert not list(Path("out", name).rglob(".spairkit-tmp-*"))


@pytest.mark.parametrize("name", OUTPUTS)
def test_folders_that_are_files_are_named(
    name: str, workplace: Path, command: Callable[..., Any]
) -> None:
    Path("file").write_text("the user's")
    before = listing(workplace)
    ended = command(*words_of(name, Path("file")))
    assert ended.status == 2
    assert "file" in ended.err
    assert Path("file").read_text() == "the user's"
    assert listing(workplace) == before


@pytest.mark.parametrize("name", ["detect", "viz", "eval", "data look", "config copy"])
def test_files_that_are_folders_are_named(
    name: str, workplace: Path, command: Callable[..., Any]
) -> None:
    words = words_of(name, Path("place"))
    for word in words:
        if word.startswith("place"):
            Path(word).mkdir(parents=True)
    before = listing(workplace)
    ended = command(*words)
    assert ended.status == 2
    assert listing(workplace) == before


def test_second_trainer_is_refused(workplace: Path, command: Callable[..., Any]) -> None:
    before = listing(Path("run"))
    with Run.open(Path("run")).lock():
        ended = command("train", "--resume", "run", "--steps", 4)
    assert ended.status == 2
    assert f"run: process {os.getpid()} on " in ended.err
    assert "is training here; wait for it or stop it" in ended.err
    assert listing(Path("run")) == before


def test_damaged_last_checkpoint_is_trained_again(
    workplace: Path, command: Callable[..., Any]
) -> None:
    shutil.copytree("run", "whole", symlinks=True)
    path = Path("run/last/model.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    ended = command("train", "--resume", "run", "--quiet")
    assert ended.status == 0
    assert "step-3/model.safetensors: damaged" in ended.err
    assert "resuming from step 2 instead" in ended.err
    one, other = (
        load_checkpoint(Path(run, "last"), with_optimiser=True) for run in ("run", "whole")
    )
    assert one.step == other.step == 3
    assert one.optimiser is not None
    assert other.optimiser is not None
    tensors = [(one.model, other.model), (one.optimiser, other.optimiser)]
    assert all(torch.equal(mine[key], theirs[key]) for mine, theirs in tensors for key in theirs)
    records = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    whole = [json.loads(line) for line in Path("whole/metrics.jsonl").read_text().splitlines()]
    assert records == whole
