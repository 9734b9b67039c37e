"""`kill -9` of real commands at random moments: nothing is lost, nothing goes back, and the end is
the same to the bit.
"""

import json
import os
import random
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

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


class Process(Protocol):
    """A command that runs; `subprocess.Popen` is one."""

    def poll(self) -> int | None: ...
    def kill(self) -> None: ...
    def communicate(self) -> tuple[Any, bytes]: ...
    @property
    def returncode(self) -> int | Any: ...


def started(words: Words) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-m", "spairkit", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


# makes a process for each line of stdin, one after the other; all share the imports
NURSERY = """
import json, os, sys
import torch._dynamo
import spairkit.kernels.cells_op, spairkit.report.page, spairkit.training.loop
from spairkit.cli.main import main

for line in sys.stdin:
    words, environment, log = json.loads(line)
    child = os.fork()
    if child == 0:
        os.environ.update(environment)
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        os.dup2(0, 1)
        main(words)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Child:
    """A command in a process that a nursery has forked."""

    def __init__(self, nursery: "subprocess.Popen[bytes]", log: Path) -> None:
        assert nursery.stdout is not None
        self.ends, self.log = nursery.stdout, log
        self.pid = int(self.ends.readline())
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self.ends], [], [], 0)[0]:
            self.returncode = int(self.ends.readline())
        return self.returncode

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def communicate(self) -> tuple[None, bytes]:
        """What it has printed on stderr, when it has ended."""
        if self.returncode is None:
            self.returncode = int(self.ends.readline())
        return None, self.log.read_bytes()


class Ranks:
    """Two processes that train together; they are killed together."""

    def __init__(self, children: list[Child]) -> None:
        self.children = children

    @property
    def returncode(self) -> int | None:
        """That of the first rank."""
        return self.children[0].returncode

    def poll(self) -> int | None:
        return self.children[0].poll()

    def kill(self) -> None:
        for child in self.children:
            child.kill()

    def communicate(self) -> tuple[None, bytes]:
        return None, b"".join(child.communicate()[1] for child in self.children)


@contextmanager
def nursery(folder: Path, ranks: int) -> Iterator[Callable[[Words], Process]]:
    """A function that starts a command in one process, or in two that train together."""
    command = [sys.executable, "-c", NURSERY]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    nurseries = [subprocess.Popen(command, env=environment, **pipes) for _ in range(ranks)]

    def start(words: Words) -> Process:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children = []
        for rank, each in enumerate(nurseries):
            # what torchrun sets
            job = {"WORLD_SIZE": ranks, "RANK": rank, "LOCAL_RANK": rank, "MASTER_PORT": port}
            job |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "kills"}
            log = folder / f"log of rank {rank}"
            line = [words, {name: str(value) for name, value in job.items()}, str(log)]
            assert each.stdin is not None
            each.stdin.write(json.dumps(line).encode() + b"\n")
            children.append((each, log))
        processes = [Child(each, log) for each, log in children]
        return processes[0] if ranks == 1 else Ranks(processes)

    try:
        yield start
    finally:
        for each in nurseries:
            each.kill()
            each.communicate()


def finish(process: Process) -> None:
    _, said = process.communicate()
    assert process.returncode in (0, 3), said.decode()  # so little training may have failed


def kill_at_random(
    start: Callable[[], Process], reached: Callable[[], int], anew: Callable[[], None], kills: int
) -> None:
    """Kills a command at random moments after it has made a step, and asserts that none is lost.

    Args:
        start: the command, to begin or to go on.
        reached: how far it is.
        anew: removes what was made, called when the command has ended by itself.
        kills: how often.
    """
    rng = random.Random(0)
    killed = 0
    while killed < kills:
        before = reached()
        process = start()
        deadline = time.monotonic() + 60
        while process.poll() is None and reached() <= before and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        _, said = process.communicate()
        assert process.returncode in (-9, 0, 3), said.decode()
        assert b"damaged" not in said
        assert reached() >= before
        if process.returncode == -9:
            killed += 1
        else:
            anew()


@pytest.mark.parametrize(
    ("ranks", "kills"),
    [
        (1, 2),
        pytest.param(1, 200, marks=pytest.mark.long),
        pytest.param(2, 20, marks=pytest.mark.long),
    ],
)
@pytest.mark.timeout(7200)
def test_killed_training_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int, kills: int
) -> None:
    """A checkpoint is written at every step."""
    monkeypatch.chdir(tmp_path)
    often = ["--set", "train.validation_every=1", "--steps", str(8 + 4 * kills)]
    new = ["train", *settings(), *often, "--set", "search.mode=off", "--device", "cpu"]
    new += ["--set", "train.batch_size=4"]

    def command() -> Words:
        if Path("cut/config.toml").exists():
            return ["train", "--resume", "cut", "--device", "cpu"]
        return [*new, "--out", "cut"]

    def reached() -> int:
        return max([0, *(step for step, _ in checkpoints_of(Path("cut")))])

    with nursery(tmp_path, ranks) as start:
        finish(start([*new, "--out", "whole"]))
        kill_at_random(lambda: start(command()), reached, lambda: shutil.rmtree("cut"), kills)
        finish(start(command()))
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
    finish(started([*words, "--out", "whole"]))

    def runs(folder: str) -> list[Path]:
        pattern = "runs/*" if command == "compare" else "trial-*"
        return sorted(run for run in Path(folder).glob(pattern) if (run / "config.toml").exists())

    def reached() -> int:
        return sum(max([0, *(step for step, _ in checkpoints_of(run))]) for run in runs("cut"))

    cut = [*words, "--out", "cut"]
    kill_at_random(lambda: started(cut), reached, lambda: shutil.rmtree("cut"), 20)
    finish(started(cut))
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
