"""Damaged and forged checkpoints through the whole command: no damage is taken, nothing is left."""

import json
import random
import resource
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from spairkit.storage.checkpoints import sealed

_GREATEST_GROWTH = 1 << 20  # KiB
_MOST_SECONDS = 1.0
_VALUES: list[Any] = [
    None, True, -1, 0, 1, 2, 64, 4096, 10**9, 10**30, 1e-300, 1e308, "", "x", "\x1b[2J", "../../x",
    "é" * 300, [], {}, [4096] * 8, [[]], {"a": {"b": 1}}, "air", "conncomp", "full", "normal",
]  # fmt: skip


def damaged(whole: bytes, rng: random.Random) -> bytes:
    """Other bytes than `whole`: some changed, inserted or cut out, or the end cut off."""
    data = bytearray(whole)
    digits = [at for at, byte in enumerate(whole) if byte in b"0123456789"]
    while data == whole:
        for _ in range(rng.choice((1, 1, 2, 8))):
            at, way = rng.randrange(len(whole)), rng.randrange(9)
            if way > 5:  # another number, which a manifest may well hold
                data[rng.choice(digits) % len(data)] = rng.choice(b"0123456789")
            elif way < 3:
                data[at : at + 1] = bytes([rng.randrange(256)])
            elif way == 3:
                data[at:at] = rng.randbytes(rng.choice((1, 8, 100)))
            elif way == 4:
                del data[at : at + rng.choice((1, 8, 100))]
            else:
                del data[max(at, 1) :]
    return bytes(data)


def leaves(table: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    for key, value in table.items():
        yield table, key
        if isinstance(value, dict):
            yield from leaves(value)


def forged(folder: Path, rng: random.Random) -> None:
    """Changes values of the manifest, or bytes of the model, with hashes that are right."""
    path, model = folder / "manifest.json", folder / "model.safetensors"
    manifest = json.loads(path.read_text())
    if rng.random() < 0.5:
        for _ in range(rng.choice((1, 2))):
            table, key = rng.choice(list(leaves(manifest)))
            table[key] = rng.choice(_VALUES)
    else:
        whole = model.read_bytes()
        header = whole[: 8 + int.from_bytes(whole[:8], "little")]
        model.write_bytes(damaged(header, rng) + whole[len(header) :])
        data = model.read_bytes()
        record = {"size": len(data), "sha256": sha256(data).hexdigest()}
        manifest["files"]["model.safetensors"] = record
    path.write_bytes(sealed(manifest))


def relabelled(folder: Path, rng: random.Random) -> None:
    """Changes what the manifest says of the machine, which harms nothing."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["environment"]["machine"] = rng.choice(["x", 0, None])
    path.write_bytes(sealed(manifest))


class Case:
    """A run with a single checkpoint, put back to whole before each change."""

    def __init__(self, workplace: Path, command: Callable[..., Any]) -> None:
        shutil.rmtree("run/checkpoints/step-1", ignore_errors=True)
        shutil.rmtree("run/checkpoints/step-2")
        self.folder, self.command = Path("run/checkpoints/step-3"), command
        self.whole = {path: path.read_bytes() for path in self.folder.iterdir()}
        self.statuses: Counter[int] = Counter()
        self.longest = 0.0

    def detect(self) -> int:
        words = ["cells/0.png", "--checkpoint", self.folder, "--search", "off"]
        status = self.timed("detect", *words, "--out", "found.json")
        if status == 0:
            assert isinstance(json.loads(Path("found.json").read_text()), list)
        Path("found.json").unlink(missing_ok=status == 2)
        return status

    def resume(self) -> int:
        return self.timed("train", "--resume", "run", "--steps", 4, "--quiet")

    def timed(self, *words: object) -> int:
        before = snapshot()
        start = time.process_time()
        ended = self.command(*words)
        self.longest = max(self.longest, time.process_time() - start)
        if ended.status == 2:
            assert snapshot() == before
        return int(ended.status)

    def put_back(self) -> None:
        for path, data in self.whole.items():
            path.write_bytes(data)


def snapshot() -> dict[Path, bytes]:
    """Every file of the current folder, but for the lock of the run and its owner."""
    paths = [path for path in Path().rglob("*") if path.name not in (".lock", ".owner")]
    return {path: path.read_bytes() for path in paths if path.is_file()}


def check(workplace: Path, command: Callable[..., Any], number: int) -> float:
    """The longest time of a command, seconds of this process."""
    rng, case = random.Random(0), Case(workplace, command)
    assert case.detect() == 0
    before, case.longest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0.0
    for n in range(number):
        path = sorted(case.whole)[n % 3]
        path.write_bytes(damaged(case.whole[path], rng))
        status = case.resume() if path.name == "optimiser.safetensors" else case.detect()
        assert status == 2, f"a damaged {path.name} was taken"
        case.put_back()
    statuses: Counter[int] = Counter()
    for n in range(number // 2):
        (forged if n % 5 else relabelled)(case.folder, rng)
        statuses[case.detect()] += 1
        case.put_back()
    assert set(statuses) == {0, 2}
    assert min(statuses.values()) > number / 50, statuses
    assert case.detect() == 0
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < _GREATEST_GROWTH, f"{grown} KiB more"
    return case.longest


def test_damaged_checkpoints_are_refused_and_forged_ones_do_no_harm(
    workplace: Path, command: Callable[..., Any]
) -> None:
    check(workplace, command, 60)


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_2000_damaged_checkpoints_are_refused(workplace: Path, command: Callable[..., Any]) -> None:
    longest = check(workplace, command, 2000)
    assert longest < _MOST_SECONDS
