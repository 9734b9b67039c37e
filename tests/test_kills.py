"""`kill -9` of real commands at random moments: nothing is lost, nothing goes back, and the end is
the same to the bit.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spairkit.storage.checkpoints import checkpoints_of

DATA = {"image_height": 24, "image_width": 28, "validation_images": 4, "test_images": 4}
MODEL = {
    "backbone_channels": [4],
    "features": 8,
    "hidden": 8,
    "passthrough": 4,
    "what": 4,
    "encoder_hidden": [8],
    "decoder_hidden": [8],
}
Words = list[str]


def settings(scope: str = "") -> Words:
    """`--set` words of a SPAIR of a few weights."""
    tables: dict[str, dict[str, Any]] = {"data": DATA, f"{scope}model": MODEL}
    return [
        word
        for table, values in tables.items()
        for key, value in values.items()
        for word in ("--set", f"{table}.{key}={value}")
    ]


def started(words: Words) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-m", "spairkit", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def finished(words: Words) -> None:
    process = started(words)
    _, said = process.communicate()
    assert process.returncode in (0, 3), said.decode()  # so little training may have failed


def kill_at_random(
    command: Callable[[], Words], reached: Callable[[], int], anew: Callable[[], None], kills: int
) -> None:
    """Kills a command at random moments after it has made a step, and asserts that none is lost.

    Args:
        command: its words, to begin or to go on.
        reached: how far it is.
        anew: removes what was made, called when the command has ended by itself.
        kills: how often.
    """
    rng = random.Random(0)
    for _ in range(kills):
        before = reached()
        process = started(command())
        deadline = time.monotonic() + 60
        while process.poll() is None and reached() <= before and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        _, said = process.communicate()
        assert process.returncode in (-9, 0, 3), said.decode()
        assert b"damaged" not in said
        assert reached() >= before
        if process.returncode != -9:
            anew()


@pytest.mark.parametrize("kills", [2, pytest.param(200, marks=pytest.mark.long)])
@pytest.mark.timeout(7200)
def test_killed_training_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kills: int
) -> None:
    monkeypatch.chdir(tmp_path)
    often = ["--set", "train.validation_every=1", "--steps", str(20 + 4 * kills)]
    new = ["train", *settings(), *often, "--set", "search.mode=off", "--device", "cpu"]
    finished([*new, "--out", "whole"])

    def command() -> Words:
        if Path("cut/config.toml").exists():
            return ["train", "--resume", "cut", "--device", "cpu"]
        return [*new, "--out", "cut"]

    def reached() -> int:
        return max([0, *(step for step, _ in checkpoints_of(Path("cut")))])

    kill_at_random(command, reached, lambda: shutil.rmtree("cut"), kills)
    finished(command())
    kept = [step for step, _ in checkpoints_of(Path("whole"))]
    assert [step for step, _ in checkpoints_of(Path("cut"))] == kept
    files = [f"checkpoints/step-{s}/{n}.safetensors" for s in kept for n in ("model", "optimiser")]
    for name in ("config.toml", "metrics.jsonl", "test.json", "data.json", *files):
        assert Path("cut", name).read_bytes() == Path("whole", name).read_bytes(), name
    assert not list(Path("cut").rglob(".spairkit-tmp-*"))


@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("command", ["compare", "sweep"])
def test_killed_comparisons_and_sweeps_end_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """With a worker, which ends with its parent before the next start."""
    monkeypatch.chdir(tmp_path)
    if command == "compare":
        words = ["compare", "--models", "spair,conncomp", "--objects", "1", "--seeds", "3"]
        words += ["--budget", "300", "--search", "off", *settings("spair.")]
    else:
        Path("space.toml").write_text("model.beta = [1.0, 1.5, 2.0, 3.0]\n")
        words = ["sweep", "--space", "space.toml", "--trials", "4", *settings()]
        words += ["--set", "train.validation_every=5", "--set", "train.steps=300"]
    words += ["--workers", "2", "--device", "cpu"]
    finished([*words, "--out", "whole"])

    def runs(folder: str) -> list[Path]:
        pattern = "runs/*" if command == "compare" else "trial-*"
        return sorted(run for run in Path(folder).glob(pattern) if (run / "config.toml").exists())

    def reached() -> int:
        return sum(max([0, *(step for step, _ in checkpoints_of(run))]) for run in runs("cut"))

    kill_at_random(lambda: [*words, "--out", "cut"], reached, lambda: shutil.rmtree("cut"), 20)
    finished([*words, "--out", "cut"])
    names = [run.relative_to("whole") for run in runs("whole")]
    assert [run.relative_to("cut") for run in runs("cut")] == names
    for name in names:
        (step, path), *_ = checkpoints_of(Path("whole", name))
        (other_step, other), *_ = checkpoints_of(Path("cut", name))
        assert step == other_step
        model = "model.safetensors"
        assert (path / model).read_bytes() == (other / model).read_bytes(), name
    if command == "sweep":
        texts = (Path(name, "sweep.json").read_text() for name in ("whole", "cut"))
        trials = [json.loads(text)["trials"] for text in texts]
        one, two = ([(t["number"], t["values"], t["figure"]) for t in found] for found in trials)
        assert one == two
