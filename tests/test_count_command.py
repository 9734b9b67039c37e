"""`spairkit count`: its rows, total, chart and partial results, against `detect`."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

import spairkit
from spairkit.cli import count as count_command
from spairkit.cli.main import main
from spairkit.images import write_png

Command = Callable[..., Any]
WORDS = ("--checkpoint", "run", "--threshold", "0.01", "--search", "refine", "--quiet")


@pytest.fixture
def cells(workplace: Path) -> Path:
    """A folder of images without annotations, one of which cannot be read."""
    Path("cells/annotations.json").unlink()
    Path("cells/9.png").write_bytes(b"no image")
    return Path("cells")


def detected(command: Command) -> list[dict[str, Any]]:
    command("detect", "cells", *WORDS, "--format", "jsonl", "--out", "found.jsonl")
    return [json.loads(line) for line in Path("found.jsonl").read_text().splitlines()]


def distribution_of_total() -> dict[int, float]:
    """The probability of each number of objects in all images, by enumeration."""
    detector = spairkit.load("run", search="refine", device="cpu")
    together = {0: 1.0}
    for n in range(4):
        counts = detector.detect(f"cells/{n}.png", threshold=0.01).counts
        assert counts is not None
        more: dict[int, float] = {}
        for before, p in together.items():
            for i, q in enumerate(counts.probabilities.tolist()):
                place = before + counts.least + i
                more[place] = more.get(place, 0.0) + p * q
        together = more
    return together


def test_rows_are_those_of_detect_and_the_total_is_of_all(cells: Path, command: Command) -> None:
    found = detected(command)
    ended = command("count", "cells", *WORDS, "--format", "json")
    assert "skipped 1 of 5: cells/9.png" in ended.err
    values = json.loads(ended.out)
    assert len(values["images"]) == len(found) == 4
    for row, item in zip(values["images"], found, strict=True):
        assert (row["image"], row["count"]) == (item["image"], item["count"])
        assert row["expected"] == round(item["count_mean"], 4)
        assert [row["low"], row["high"]] == item["count_interval"]
    total = values["total"]
    assert total["count"] == sum(item["count"] for item in found)
    assert total["expected"] == pytest.approx(sum(item["count_mean"] for item in found), abs=1e-4)
    together = distribution_of_total()
    length = total["high"] - total["low"] + 1
    held = {k: sum(together.get(k + i, 0.0) for i in range(length)) for k in together}
    assert held[total["low"]] == pytest.approx(max(held.values()))
    assert held[total["low"]] >= 0.9 - 1e-9
    shorter = (sum(together.get(k + i, 0.0) for i in range(length - 1)) for k in together)
    assert max(shorter) < 0.9, "no shorter interval holds as much"
    assert len(values["skipped"]) == 1
    printed = command("count", "cells", *WORDS, "--format", "csv").out
    lines = list(csv.DictReader(io.StringIO(printed)))
    assert [line["image"] for line in lines] == [*(row["image"] for row in found), "total"]
    for line, row in zip(lines, [*values["images"], total], strict=True):
        for name in ("count", "expected", "low", "high"):
            assert float(line[name]) == row[name]
        assert line["warning"] == (row["warning"] or "")
    command("count", "cells", *WORDS, "--out", "counts.csv")
    assert Path("counts.csv").read_text() == printed


def test_table_on_the_terminal(cells: Path, command: Command) -> None:
    row, *_ = json.loads(command("count", "cells", *WORDS, "--format", "json").out)["images"]
    lines = command("count", "cells", *WORDS).out.strip().splitlines()
    assert lines[0].split() == ["image", "count", "expected", "90", "%", "warning"]
    first = next(line.split() for line in lines if "cells/0.png" in line)
    interval = [str(row["low"]), "to", str(row["high"])]
    assert first[1:6] == [str(row["count"]), f"{row['expected']:.1f}", *interval]
    assert lines[-1].split()[0] == "total"


def test_without_search_there_are_no_intervals(cells: Path, command: Command) -> None:
    off = ("count", "cells", "--checkpoint", "run", "--search", "off")
    values = json.loads(command(*off, "--format", "json").out)
    for row in (*values["images"], values["total"]):
        assert row["expected"] is row["low"] is row["high"] is None
    assert " - " in command(*off).out
    line = command(*off, "--format", "csv").out.splitlines()[-1]
    assert line == f"total,{values['total']['count']},,,,"


def test_warnings_name_images_that_the_model_does_not_fit(
    cells: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spairkit.report.signs._FEWEST", 0)
    monkeypatch.setattr("spairkit.report.signs._COVERED", -1.0)
    ended = command("count", "cells", *WORDS, "--format", "json")
    rows = json.loads(ended.out)["images"]
    assert all("they paint the background" in row["warning"] for row in rows)
    assert "warning: this model does not fit cells/0.png" in ended.err


def test_chart_has_a_bar_for_each_number(cells: Path, command: Command) -> None:
    ended = command("count", "cells", *WORDS, "--out", "counts.json", "--chart", "counts.svg")
    assert "wrote counts.json and counts.svg: " in ended.err
    assert ended.out == ""
    root = ElementTree.parse("counts.svg").getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "objects in an image" in Path("counts.svg").read_text()


def test_count_goes_on_where_it_was_stopped(
    cells: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["count", "cells", *WORDS, "--out", "counts.csv"]
    command(*words)
    whole = Path("counts.csv").read_bytes()
    Path("counts.csv").unlink()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(count_command, "_rows", full)
        with pytest.raises(SystemExit):
            main(words)
    assert not Path("counts.csv").exists()
    assert "4 images finished before, 0 left" in command(*words).err
    assert Path("counts.csv").read_bytes() == whole


def test_names_of_files_are_no_formulas_of_the_terminal(workplace: Path, command: Command) -> None:
    write_png("[red]a\x1b[2J.png", torch.zeros(3, 24, 24))
    out = command("count", "[red]a\x1b[2J.png", *WORDS).out
    assert "[red]a\\x1b[2J.png" in out
    assert "\x1b" not in out


def test_outputs_are_checked_before_any_work(cells: Path, command: Command) -> None:
    words = ("count", "cells", *WORDS)
    assert "name a file that ends in .svg" in command(*words, "--chart", "a.png").err
    same = command(*words, "--out", "a.svg", "--chart", "./a.svg").err
    assert "--chart a.svg: is the output of --out too" in same
    assert "--out cells/0.png: is an input" in command(*words, "--out", "cells/0.png").err
    assert "--chart no/a.svg: there is no folder" in command(*words, "--chart", "no/a.svg").err
