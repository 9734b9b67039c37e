"""Commands in poor environments: each works with the same result, or ends in one line.

`test_streams.py` closes and fills standard streams.
"""

import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import termios
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# None: not set. /proc/self/no cannot be made, not even by root
ENVIRONMENTS: dict[str, dict[str, str | None]] = {
    "no HOME": {"HOME": None},
    "HOME that cannot be written": {"HOME": "/proc/self/no"},
    "HOME that is a file": {"HOME": "/dev/null"},
    "TERM=dumb": {"TERM": "dumb"},
    "LANG=C": {
        "LANG": "C",
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONIOENCODING": "ascii",
    },
    "no threads": {"OMP_NUM_THREADS": "0"},
    "threads that are no number": {"OMP_NUM_THREADS": "many"},
    "a GPU that is not there": {"CUDA_VISIBLE_DEVICES": "7"},
    "no folder for temporary files": {"TMPDIR": "/proc/self/no"},
    "caches that cannot be written": {
        "NUMBA_CACHE_DIR": "/proc/self/no",
        "TRITON_CACHE_DIR": "/proc/self/no",
        "MPLCONFIGDIR": "/proc/self/no",
    },
}
BROKEN = {
    "ImportError": "raise ImportError('libx.so: cannot open shared object file')",
    "RuntimeError": "raise RuntimeError('compiled for\\nanother machine')",
}
TRAIN = ["train", "--config", "tiny.toml", "--data", "cells", "--steps", "3", "--out", "né"]
DETECT = ["detect", "cells", "--checkpoint", "run", "--out", "found.json"]
SWEEP = ["sweep", "--config", "tiny.toml", "--data", "cells", "--trials", "1", "--out", "swept"]


def environment(changes: Mapping[str, str | None]) -> dict[str, str]:
    changed: dict[str, str | None] = {**os.environ, "PYTHONPATH": str(ROOT), **changes}
    return {name: value for name, value in changed.items() if value is not None}


def in_terminal(words: list[str], changes: Mapping[str, str | None], columns: int) -> str:
    """What the command prints on a terminal of this width; its status is 0."""
    child, terminal = pty.fork()
    if child == 0:
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 3, columns, 0, 0))
        os.execve(sys.executable, [sys.executable, *words], environment(changes))
    printed = b""
    while True:
        try:
            data = os.read(terminal, 1 << 16)
        except OSError:  # Linux says so when the other end is closed
            break
        if not data:
            break
        printed += data
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, printed.decode()
    return printed.decode()


def weights(run: str) -> bytes:
    return Path(run, "checkpoints", "step-3", "model.safetensors").read_bytes()


def test_everything_poor_at_once_gives_the_same_weights(workplace: Path) -> None:
    """Every environment above in one, on a dumb terminal of 20 columns."""
    together = {name: value for changes in ENVIRONMENTS.values() for name, value in changes.items()}
    before = sorted(path.name for path in workplace.iterdir())
    printed = in_terminal(["-m", "spairkit", *TRAIN], together, columns=20)
    assert "\x1b" not in printed, "a dumb terminal knows no escape sequences"
    assert weights("né") == weights("run")
    assert sorted(path.name for path in workplace.iterdir()) == sorted([*before, "né"])


@pytest.mark.long
@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_each_poor_environment_gives_the_same_weights_and_boxes(name: str, workplace: Path) -> None:
    results = []
    for changes in ({}, ENVIRONMENTS[name]):
        for words in (TRAIN, DETECT):
            ended = subprocess.run(
                [sys.executable, "-m", "spairkit", *words],
                env=environment(changes),
                capture_output=True,
                text=True,
                check=False,
            )
            assert ended.returncode == 0, ended.stderr
        results.append((weights("né"), Path("found.json").read_bytes()))
        os.rename("né", f"né of {len(results)}")
        Path("found.json").unlink()
    assert results[0] == results[1]


# a process that has imported torch makes a child for each broken package, which saves seconds
CHILDREN = """
import json, os, sys
import torch
from spairkit.cli.main import main

ends = {}
for folder, words in json.loads(sys.argv[1]):
    child = os.fork()
    if child == 0:
        sys.path.insert(0, folder)
        try:
            main(words)
        except SystemExit as ended:
            os._exit(ended.code)  # to dismantle torch takes a second
    print(json.dumps(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])), file=sys.stderr)
"""


@pytest.mark.parametrize(
    "kind", ["RuntimeError", pytest.param("ImportError", marks=pytest.mark.long)]
)
def test_broken_packages_are_replaced_or_named(kind: str, workplace: Path) -> None:
    cases = {"numba": DETECT, "triton": TRAIN, "scipy": DETECT, "optuna": SWEEP, "tifffile": DETECT}
    cases["matplotlib"] = [*TRAIN[:-1], "not drawn"]
    for package in cases:
        Path(f"broken-{package}", package).mkdir(parents=True)
        Path(f"broken-{package}", package, "__init__.py").write_text(BROKEN[kind])
    children = [(str(Path(f"broken-{name}").resolve()), words) for name, words in cases.items()]
    ended = subprocess.run(
        [sys.executable, "-c", CHILDREN, json.dumps(children)],
        env=environment({}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=True,
    )
    lines = iter(ended.stderr.splitlines())
    for package in cases:
        said = []
        while not (line := next(lines)).isdigit():
            said.append(line)
        reason = "compiled for another machine" if kind == "RuntimeError" else "libx.so: cannot"
        named = [line for line in said if f"{package} does not work here: {kind}: {reason}" in line]
        works = package in ("numba", "tifffile") or (package, kind) == ("triton", "ImportError")
        assert line == ("0" if works else "2"), said
        if package == "numba":  # plain torch does the same
            assert len(named) == 1
            assert "spairkit uses plain torch instead" in named[0]
        elif not works:
            assert len(named) == 1
            assert said[-1].startswith("spairkit: ")
            assert said[-1].endswith("; reinstall it")
    assert weights("not drawn") == weights("run"), "a training is saved before it is drawn"
    assert not list(workplace.rglob(".spairkit-tmp-*"))
