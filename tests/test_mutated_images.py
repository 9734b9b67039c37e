"""Damaged images through the whole command: a result, or one line and status 2, and no more."""

import io
import json
import random
import resource
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from spairkit import images
from spairkit.cli.main import main

pytestmark = pytest.mark.filterwarnings("default::UserWarning")  # the command prints them

_GREATEST_GROWTH = 1 << 20  # KiB
_MOST_SECONDS = 1.0


def whole_files() -> list[bytes]:
    """Small images of every format that is read, in several layouts."""
    rng = np.random.default_rng(0)
    colour = rng.integers(0, 256, (24, 32, 3)).astype(np.uint8)
    grey, deep = colour[..., 0], colour[..., 0].astype(np.uint16) * 256
    files = []
    for form in ("PNG", "JPEG", "BMP", "PPM"):
        for array in (colour, grey):
            data = io.BytesIO()
            Image.fromarray(array).save(data, format=form)
            files.append(data.getvalue())
    for form in ("PNG", "PPM"):
        data = io.BytesIO()
        Image.fromarray(deep).save(data, format=form)
        files.append(data.getvalue())
    layouts: list[tuple[NDArray[Any], dict[str, Any]]] = [
        (colour, {"photometric": "rgb", "planarconfig": "contig"}),
        (grey, {"compression": "lzw", "predictor": True}),
        (deep, {"compression": "adobe_deflate", "byteorder": ">"}),
        (deep.astype(np.float32), {"tile": (16, 16), "compression": "packbits"}),
        (np.stack([grey] * 3), {"photometric": "minisblack"}),
    ]
    for array, options in layouts:
        data = io.BytesIO()
        tifffile.imwrite(data, array, **options)
        files.append(data.getvalue())
    return files


def mutated(whole: bytes, rng: random.Random) -> bytes:
    """With some bytes changed, most of them in the header, or the end cut off."""
    data = bytearray(whole)
    for _ in range(rng.choice((1, 1, 2, 8))):
        data[rng.randrange(len(data) if rng.random() < 0.4 else min(len(data), 200))] = (
            rng.randrange(256)
        )
    return bytes(data[: rng.choice((len(data), len(data), rng.randrange(len(data))))])


def check(folder: Path, capfd: pytest.CaptureFixture[str], number: int) -> float:
    """The longest time of a command, seconds of this process."""
    rng = random.Random(0)
    files = whole_files()
    path, out = folder / "image", folder / "found.json"
    path.write_bytes(files[0])
    run(path, out)  # what is loaded and compiled once
    capfd.readouterr()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    statuses: Counter[int] = Counter()
    longest = 0.0
    for n in range(number):
        path.write_bytes(mutated(files[n % len(files)], rng))
        out.unlink(missing_ok=True)
        start = time.process_time()
        status = run(path, out)
        longest = max(longest, time.process_time() - start)
        printed, err = capfd.readouterr()
        lines = err.splitlines()
        lines = [line for line in lines if not line.startswith(("no run under", "warning: "))]
        told = [line for line in lines if "holds several pages" in line]
        assert printed == ""
        assert all(line.isprintable() for line in lines), lines
        lost = [line for line in lines if f": {path}/" in line]  # a frame of a stack
        if status == 0 or lost:
            assert status == (2 if lost else 0), err
            assert len(lost) < 2, lines
            assert next(line for line in lines if line not in told).startswith("wrote ")
            assert isinstance(json.loads(out.read_text()), list)
        else:
            assert status == 2, err
            assert len(lines) - len(told) == 1, lines
            assert lines[-1].startswith(f"spairkit: {path}: ")
        has_results = status == 0 or bool(lost)
        assert sorted(folder.iterdir()) == sorted([path, *([out] if has_results else [])])
        statuses[status] += 1
    assert min(statuses[0], statuses[2]) > number / 10, statuses
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < _GREATEST_GROWTH, f"{grown} KiB more"
    return longest


def run(path: Path, out: Path) -> int:
    with warnings.catch_warnings(), pytest.raises(SystemExit) as ended:
        main(["detect", str(path), "--out", str(out), "--search", "off"])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_mutated_images_give_a_result_or_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(images, "_told_of_pages", [])
    check(tmp_path, capfd, 60)


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_2000_mutated_images_give_a_result_or_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(images, "_told_of_pages", [])
    longest = check(tmp_path, capfd, 2000)
    assert longest < _MOST_SECONDS
