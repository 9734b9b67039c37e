"""Damaged configs through the whole command: settings within their bounds, or one line."""

import json
import random
import resource
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spairkit import presets
from spairkit.config_values import from_toml, to_dict, to_toml
from spairkit.storage.runs import fixed_differences

_GREATEST_GROWTH = 1 << 20  # KiB
_MOST_SECONDS = 1.0
_PIECES = [
    b"-", b"e99", b"nan", b"inf", b"[", b"]", b'"', b"'''", b"\n", b"true", b"=", b"{", b"}", b".",
    b"\x00", b"\xff", b"\xef\xbb\xbf", b"\x1b[2J", b"9" * 400, b"[" * 3000, b"a." * 3000,
    b"[[a]]\n", b"[train]\n", b"1979-05-27T07:32:00Z", b"0x7fffffffffffffffffff", b"\\u0000",
]  # fmt: skip


def mutated(whole: bytes, rng: random.Random) -> bytes:
    """With bytes changed, cut out or moved, or pieces of TOML put in."""
    data = bytearray(whole)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at, way = rng.randrange(len(data) + 1), rng.randrange(8)
        digits = [place for place, byte in enumerate(data) if byte in b"0123456789"]
        if way >= 5 and digits:
            data[rng.choice(digits)] = rng.choice(b"0123456789")
        elif way == 0:
            data[at : at + 1] = bytes([rng.randrange(256)])
        elif way == 1:
            del data[at : at + rng.choice((1, 10, 100))]
        elif way == 2:
            data[at:at] = rng.choice(_PIECES)
        elif way == 3:  # another value
            lines = bytes(data).split(b"\n")
            chosen = rng.randrange(len(lines))
            lines[chosen] = lines[chosen].split(b"=")[0] + b"= " + rng.choice(_PIECES)
            data = bytearray(b"\n".join(lines))
        else:
            lines = bytes(data).split(b"\n")
            rng.shuffle(lines)
            data = bytearray(b"\n".join(lines))
    return bytes(data)


def check(command: Callable[..., Any], number: int) -> float:
    """The longest time of a command, seconds of this process."""
    rng, longest = random.Random(0), 0.0
    run, file = Path("run/config.toml"), Path("mutated.toml")
    quick = presets.resolve("quick")
    whole = to_toml(quick).encode()
    tables = to_dict(quick).items()
    settings = [
        (t, k, v) for t, table in tables if isinstance(table, dict) for k, v in table.items()
    ]
    words = [f"{table}.{key}={json.dumps(value)}".encode() for table, key, value in settings]
    whole_run = run.read_bytes()
    config = from_toml(whole_run.decode())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    statuses: dict[str, Counter[int]] = {"file": Counter(), "set": Counter(), "run": Counter()}

    def timed(kind: str, *words: object) -> Any:
        nonlocal longest
        start = time.process_time()
        ended = command(*words)
        longest = max(longest, time.process_time() - start)
        statuses[kind][ended.status] += 1
        return ended

    for n in range(number):
        if n % 5 < 3:
            file.write_bytes(mutated(whole, rng))
            ended = timed("file", "config", "show", "--config", file)
            if ended.status == 2:
                assert command("train", "--config", file, "--out", "new").status == 2
        elif n % 5 == 3:
            word = mutated(rng.choice(words), rng).decode("latin-1").replace("\0", "")
            ended = timed("set", "config", "show", f"--set={word}")
            if ended.status == 2:
                assert command("train", f"--set={word}", "--out", "new").status == 2
        else:
            changed = mutated(whole_run, rng)
            run.write_bytes(changed)
            if timed("run", "train", "--resume", "run", "--quiet").status == 0:
                assert not fixed_differences(from_toml(changed.decode()), config)
            run.write_bytes(whole_run)
            continue
        if ended.status == 0:
            assert to_toml(from_toml(ended.out)) == ended.out
        assert not Path("new").exists(), "a refused training leaves nothing"
    assert (
        min(statuses["file"][0], statuses["set"][0], *(ends[2] for ends in statuses.values())) > 0
    )
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < _GREATEST_GROWTH, f"{grown} KiB more"
    return longest


def test_mutated_configs_are_read_or_refused(workplace: Path, command: Callable[..., Any]) -> None:
    check(command, 200)


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_500_mutated_configs_are_read_or_refused(
    workplace: Path, command: Callable[..., Any]
) -> None:
    longest = check(command, 500)
    assert longest < _MOST_SECONDS
