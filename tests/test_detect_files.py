"""Files of each image that `detect` writes: names, inputs, kills, overlays."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from spairkit.cli import detect as detect_command
from spairkit.detections import Detections
from spairkit.detector import Detector
from spairkit.images import is_picture, write_png
from spairkit.parts import plan

if TYPE_CHECKING:
    from conftest import Ended

Runner = Callable[..., "Ended"]
NAMES = ("a.bmp", "a.png", "b.c.png", "sub/a.png", "sub/d.png")
QUICKLY = ("--search", "off", "--device", "cpu", "--quiet", "--threshold", "0.01")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_process: Runner) -> Runner:
    """Runs a command in this process, in a folder with cells/: images of two sizes, some nested."""
    monkeypatch.chdir(tmp_path)
    Path("cells/sub").mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for i, name in enumerate(NAMES):
        size = 48 + 2 * (i > 2)
        image = (torch.rand(3, size, size, generator=generator) > 0.9).float()
        write_png(f"cells/{name}", image)  # formats are told by content
    return in_process


class Stop(Exception):
    """Stands for a kill."""


def files(folder: str) -> dict[str, bytes]:
    found = (path for path in Path(folder).rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def test_the_suffix_of_the_output_chooses_its_format(run: Runner) -> None:
    for suffix in ("csv", "jsonl"):
        run("detect", "cells", "--format", suffix, "--out", f"said.{suffix}", *QUICKLY)
        run("detect", "cells", "--out", f"unsaid.{suffix}", *QUICKLY)
        text = Path(f"unsaid.{suffix}").read_text()
        assert text == Path(f"said.{suffix}").read_text()
        assert text.startswith({"csv": "image,", "jsonl": "{"}[suffix])
    run("detect", "cells", "--format", "coco", "--out", "said.csv", *QUICKLY)
    assert json.loads(Path("said.csv").read_text())


@pytest.mark.parametrize(
    ("format_", "suffix"),
    [("rois", ".zip"), ("geojson", ".geojson"), ("yolo", ".txt"), ("labels", ".tif")],
)
def test_each_image_has_a_file(run: Runner, format_: str, suffix: str) -> None:
    ended = run("detect", "cells", "--format", format_, "--out", "found", *QUICKLY)
    assert ended.status == 0
    assert ended.out == ""
    assert ended.err.splitlines()[-1].startswith("wrote found: ")
    names = ["a.bmp", "a.png", "b.c", "sub/a", "sub/d"]  # two keep a suffix, to differ
    written = files("found")
    assert sorted(written) == [f"{name}{suffix}" for name in names]
    assert sorted(path.name for path in Path().iterdir()) == ["cells", "found"]
    if format_ == "geojson":
        coco = json.loads(run("detect", "cells", *QUICKLY).out)
        for number, name in enumerate(names, start=1):
            features = json.loads(written[f"{name}.geojson"])["features"]
            scores = [item["score"] for item in coco if item["image_id"] == number]
            assert [f["properties"]["measurements"]["score"] for f in features] == scores
            assert scores


def test_each_frame_of_a_stack_has_a_file(run: Runner) -> None:
    frames = (torch.rand(3, 48, 50, generator=torch.Generator().manual_seed(1)) > 0.9).float()
    tifffile.imwrite("stack.tif", (frames * 255).byte().numpy(), photometric="minisblack")
    words = ["detect", "stack.tif", "cells", "--format", "yolo", "--out", "found"]
    assert run(*words, "--annotated", "drawn", *QUICKLY).status == 0
    names = [name for name in files("found") if name.startswith("stack")]
    assert sorted(names) == [f"stack.tif/{number}.txt" for number in (1, 2, 3)]
    assert len({files("found")[name] for name in names}) == 3
    assert len(files("drawn")) == 8


def test_overlays_are_pictures_of_each_image(run: Runner) -> None:
    words = ["detect", "cells", "--annotated", "drawn", "--table", "objects.csv"]
    assert run(*words, *QUICKLY).status == 0
    assert sorted(files("drawn")) == ["a.bmp.png", "a.png.png", "b.c.png", "sub/a.png", "sub/d.png"]
    for name in files("drawn"):
        assert is_picture(f"drawn/{name}")
    drawn = np.asarray(Image.open("drawn/b.c.png"))
    plain = np.asarray(Image.open("cells/b.c.png"))
    assert drawn.shape == (384, 384, 3), "enlarged eight times"
    differ = (drawn != plain.repeat(8, 0).repeat(8, 1)).any(-1).mean()
    assert 0 < differ < 0.5


def test_kill_loses_no_file_and_repeats_none(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "MAX_IMAGES", 3)
    words = ["detect", "cells", "--format", "geojson", *QUICKLY]
    assert run(*words, "--annotated", "whole-drawn", "--out", "whole").status == 0
    plain = Detections.save
    saved: list[str] = []

    def save(self: Detections, path: Path) -> None:
        if len(saved) == 4:
            saved.append("stopped")
            raise Stop
        saved.append(str(self.image))
        plain(self, path)

    monkeypatch.setattr(Detections, "save", save)
    assert run(*words, "--annotated", "drawn", "--out", "found").status == 1
    assert saved == [f"cells/{name}" for name in NAMES[:4]] + ["stopped"]
    assert Path("found.parts").exists()
    assert run(*words, "--annotated", "drawn", "--out", "found").status == 0
    assert saved[5:] == [f"cells/{name}" for name in NAMES[3:]], "the part that was stopped"
    assert files("found") == files("whole")
    assert files("drawn") == files("whole-drawn")
    assert not Path("found.parts").exists()


def test_lost_files_are_written_again(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "MAX_IMAGES", 1)
    words = ["detect", "cells", "--format", "yolo", "--out", "found", "--annotated", "drawn"]
    words += ["--table", "objects.csv"]

    def full(*_: object) -> None:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(detect_command, "table_text", full)
        assert run(*words, *QUICKLY).status == 1, "all images are finished"
    written = files("found"), files("drawn")
    os.remove("found/a.png.txt")
    os.remove("drawn/sub/d.png")
    ended = run(*words, *QUICKLY)
    assert "3 images finished before, 2 left" in ended.err
    assert [set(now) for now in (files("found"), files("drawn"))] == [set(old) for old in written]


def test_inputs_are_not_overwritten(run: Runner) -> None:
    before = files("cells")
    Path("found").mkdir()
    os.link("cells/b.c.png", "found/b.c.txt")
    for out, reason in [
        ("cells", "--out cells: holds images to read"),
        ("cells/sub", "--out cells/sub: holds images to read"),
        ("found", "--out: found/b.c.txt is an input (cells/b.c.png)"),
        ("cells/a.png", "--out cells/a.png: is a file; name a folder"),
        ("no/such", "--out no/such: there is no folder no"),
        (".", "--out .: name a folder"),
    ]:
        ended = run("detect", "cells", "--format", "yolo", "--out", out, *QUICKLY)
        assert ended.status == 2
        assert ended.err.splitlines()[-1].startswith(f"spairkit: {reason}")
        ended = run("detect", "cells", "--annotated", "cells", *QUICKLY)
        assert ended.status == 2
        assert files("cells") == before
    ended = run("detect", "cells", "--format", "labels", "--out", "cells/found", *QUICKLY)
    assert "would be taken for images" in ended.err
    ended = run("detect", "cells", "--out", "new", "--annotated", "new", *QUICKLY)
    assert ended.err == "spairkit: --out new: is the output of --annotated too; name another file\n"
    ended = run("detect", "cells", "--format", "rois", *QUICKLY)
    assert (
        ended.err == "spairkit: --format rois writes a file for each image: name a folder, --out\n"
    )
    ended = run("detect", "cells", "--format", "labels", "--out", "cells.tif", *QUICKLY)
    assert ended.status == 2
    assert ended.err.endswith("name the folder, such as cells\n")
    assert sorted(path.name for path in Path().iterdir()) == ["cells", "found"]


def test_label_images_need_masks(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = Detector.detect_batch

    def unmasked(self: Detector, *arguments: object) -> list[Detections]:
        found = batch(self, *arguments)  # type: ignore[arg-type]
        return [Detections(item.boxes, item.scores, item.what, item.depth) for item in found]

    monkeypatch.setattr(Detector, "detect_batch", unmasked)
    words = ["detect", "cells", "--out", "found", *QUICKLY, "--format"]
    ended = run(*words, "labels")
    assert ended.status == 2
    assert ended.err.splitlines()[-1] == (
        "spairkit: found/a.bmp.tif: this model finds boxes only; a label image needs masks"
    )
    assert not Path("found").exists()
    for format_ in ("rois", "geojson", "yolo"):
        assert run(*words, format_).status == 0, "boxes"


def test_pandas_reads_the_csv(run: Runner) -> None:
    pandas = pytest.importorskip("pandas")
    assert run("detect", "cells", "--format", "csv", "--out", "found.csv", *QUICKLY).status == 0
    coco = json.loads(run("detect", "cells", *QUICKLY).out)
    frame = pandas.read_csv("found.csv")
    assert frame.score.tolist() == pytest.approx([item["score"] for item in coco])
    assert frame.area.tolist() == [item["area"] for item in coco]
