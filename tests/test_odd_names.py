"""Commands on files whose names are not UTF-8, or hold escapes, mathematics or other scripts."""

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from spairkit.images import is_picture, write_png
from spairkit.report.objects import read_objects

if TYPE_CHECKING:
    from conftest import Ended

LATIN = os.fsdecode(b"n\xfcclei.png")
NAMES = (LATIN, "\x1b[31m\nb.png", "$x^$.png", "核.png", "<b>&.png", "a b'\".png")
QUICKLY = ("--search", "off", "--device", "cpu")


Runner = Callable[..., "Ended"]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_process: Runner) -> Runner:
    """Runs a command in this process, in a folder with `odd/`: images with odd names."""
    monkeypatch.chdir(tmp_path)
    Path("odd").mkdir()
    y, x = torch.meshgrid(torch.arange(96) + 0.5, torch.arange(96) + 0.5, indexing="ij")
    discs = ((y % 32 - 16) ** 2 + (x % 32 - 16) ** 2 < 8**2).float()
    for name in NAMES:
        write_png(Path("odd", name), (0.2 + 0.5 * discs).expand(3, -1, -1))

    def run_command(*arguments: object) -> "Ended":
        ended = in_process(*arguments)
        assert "internal error" not in ended.err
        assert "\x1b" not in ended.out + ended.err
        return ended

    return run_command


def shown(name: str) -> str:
    return os.fsencode(name).decode(errors="backslashreplace").replace("\\xfc", "\\udcfc")


def test_detect_writes_every_name(run: Runner) -> None:
    for format_ in ("csv", "jsonl", "coco"):
        words = ["--format", format_, "--out", f"out.{format_}", *QUICKLY]
        assert run("detect", "odd", *words).status == 0
    with open("out.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert {row[0] for row in rows[1:]} == {f"odd/{shown(name)}" for name in NAMES}
    records = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert {record["image"] for record in records} == {f"odd/{name}" for name in NAMES}
    assert json.loads(Path("out.coco").read_text())


def test_pictures_are_drawn_of_every_name(run: Runner) -> None:
    assert run("viz", "odd", *QUICKLY).status == 0
    for name in NAMES:
        assert is_picture(Path("viz", f"{name.removesuffix('.png')}-spairkit.png"))
    assert run("data", "look", "odd").status == 0
    assert is_picture("odd-look.png")


def test_runs_are_trained_on_every_name(run: Runner) -> None:
    ended = run("train", "--model", "watershed", "--data", "odd", "--out", "run", "--quiet")
    assert ended.status == 0
    found = read_objects(Path("run"))
    assert found is not None
    assert {image.name for image in found.images} == {shown(name) for name in NAMES}
    assert "<b>&.png" not in Path("run/report.html").read_text(encoding="utf-8")
    assert run("report", "run").status == 0
    out = os.fsdecode(b"r\xfcn")
    ended = run("train", "--model", "watershed", "--data", "odd", "--out", out, "--quiet")
    assert ended.status == 0
    assert run("detect", "odd", "--checkpoint", out, "--out", "x.json").status == 0
    os.rename("odd", "$_{$")
    models = ["--models", "watershed,conncomp", "--quiet"]
    ended = run("compare", "--data", "$_{$", *models, "--out", "compared")
    assert ended.status == 0
    assert "Glyph" not in ended.err
    assert is_picture("compared/figure.png")


def test_folders_whose_names_are_not_utf8_are_read_but_not_recorded(run: Runner) -> None:
    folder = os.fsdecode(b"f\xfclder")
    os.rename("odd", folder)
    assert run("detect", folder, "--out", f"{folder}.json", *QUICKLY).status == 0
    assert Path(f"{folder}.json").exists()
    assert run("viz", folder, *QUICKLY).status == 0
    assert run("data", "look", folder).status == 0
    for words in (
        ["train", "--data", folder],
        ["eval", "--data", folder],
        ["compare", "--data", folder],
        ["sweep", "--data", folder],
    ):
        ended = run(*words)
        assert ended.status == 2
        assert ended.err.splitlines()[-1].endswith(
            "f\\udcfclder: this name is not UTF-8, so a config cannot hold it; rename it"
        )
    for words in (
        ["train", "--set", f"data.path={folder}"],
        ["train", "--model", folder],
        ["train", "--preset", folder],
        ["compare", "--models", folder],
        ["compare", "--set", f"a.{folder}=1"],
        ["train", "--config", folder],
        ["eval", "--checkpoint", f"{folder}.json"],
        [folder],
        ["--", folder],
    ):
        ended = run(*words)
        assert ended.status == 2
        assert ended.err.count("\n") == 1
    assert not Path("runs").exists()
