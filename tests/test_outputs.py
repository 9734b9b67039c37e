"""No output takes the place of an input: every command, and every name that a file can have."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from spairkit.images import is_picture, list_images, write_picture, write_png
from spairkit.storage.runs import pretrained

if TYPE_CHECKING:
    from conftest import Ended

QUICKLY = ("--search", "off", "--device", "cpu")
CASES = Path(__file__).parent


Runner = Callable[..., "Ended"]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_process: Runner) -> Runner:
    """Runs a command in this process, in a folder with `cells/`: annotated images."""
    monkeypatch.chdir(tmp_path)
    Path("cells/sub").mkdir(parents=True)
    y, x = torch.meshgrid(torch.arange(96) + 0.5, torch.arange(96) + 0.5, indexing="ij")
    discs = ((y % 32 - 16) ** 2 + (x % 32 - 16) ** 2 < 8**2).float()
    for name in ("a.png", "b.png", "sub/c.png"):
        write_png(f"cells/{name}", (0.2 + 0.5 * discs).expand(3, -1, -1))
    boxes = [[32 * i + 8, 32 * j + 8, 16, 16] for i in range(3) for j in range(3)]
    truth = {
        "images": [{"id": 1, "file_name": "a.png", "width": 96, "height": 96}],
        "annotations": [
            {"id": n, "image_id": 1, "category_id": 1, "bbox": box, "area": 256, "iscrowd": 0}
            for n, box in enumerate(boxes, start=1)
        ],
        "categories": [{"id": 1, "name": "disc"}],
    }
    Path("cells/annotations.json").write_text(json.dumps(truth))

    return in_process


def contents(folder: Path = Path()) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def linked(name: str, file: Path) -> str:
    os.symlink(file.resolve(), name)
    return name


def hard_linked(name: str, file: Path) -> str:
    os.link(file, name)
    return name


def otherwise(name: str, file: Path) -> str:
    """Another path of the file."""
    return f"{file.parent}/../{file.parent.name}/{file.name}"


NAMES = [linked, hard_linked, otherwise]


@pytest.mark.parametrize("named", NAMES)
@pytest.mark.parametrize("target", ["cells/a.png", "cells/sub/c.png", "cells/annotations.json"])
@pytest.mark.parametrize("command", [("detect", "cells"), ("eval", "--data", "cells")])
def test_data_are_not_overwritten(
    run: Runner, named: Callable[[str, Path], str], target: str, command: tuple[str, ...]
) -> None:
    out = named("out", Path(target))
    before = contents()
    ended = run(*command, "--out", out, *QUICKLY)
    assert ended.status == 2
    reasons = "is an input (", "holds annotations;"
    assert ended.err.splitlines()[-1].startswith(
        tuple(f"spairkit: --out {out}: {reason}" for reason in reasons)
    )
    assert contents() == before


@pytest.mark.parametrize("command", [("detect", "cells"), ("eval", "--data", "cells")])
@pytest.mark.parametrize("name", ["model.safetensors", "manifest.json"])
def test_checkpoints_are_not_overwritten(run: Runner, command: tuple[str, ...], name: str) -> None:
    source = next(pretrained().rglob("manifest.json")).parent
    Path("model").mkdir()
    for path in source.iterdir():
        Path("model", path.name).write_bytes(path.read_bytes())
    os.symlink(f"model/{name}", "out")
    before = contents()
    ended = run(*command, "--checkpoint", "model", "--out", "out", *QUICKLY)
    assert ended.status == 2
    assert f"--out out: is an input ({Path('model', name).resolve()})" in ended.err
    assert contents() == before


def test_images_that_are_skipped_are_not_overwritten_either(run: Runner) -> None:
    Path("cells/annotations.json").unlink()
    Path("cells/z.png").write_bytes(b"hardly an image")
    ended = run("detect", "cells", "--out", "cells/z.png", *QUICKLY)
    assert ended.status == 2
    assert Path("cells/z.png").read_bytes() == b"hardly an image"


@pytest.mark.parametrize("named", NAMES)
@pytest.mark.parametrize("command", ["viz", "data look"])
def test_pictures_that_are_inputs_are_not_overwritten(
    run: Runner, named: Callable[[str, Path], str], command: str
) -> None:
    """A picture that spairkit has drawn may be an image to look at."""
    Path("drawn").mkdir()
    write_picture("drawn/ours.png", torch.rand(3, 96, 96))
    out = named("out.png", Path("drawn/ours.png"))
    before = contents()
    options = QUICKLY if command == "viz" else ()
    ended = run(*command.split(), "drawn/ours.png", "--out", out, *options)
    assert ended.status == 2
    assert f"--out {out}: is an input (drawn/ours.png)" in ended.err
    assert contents() == before


def test_numbered_pictures_pass_over_inputs(run: Runner) -> None:
    assert run("viz", "cells/a.png", *QUICKLY).status == 0
    ours = Path("a-spairkit.png").read_bytes()
    words = ["viz", "cells/a.png", "a-spairkit.png", "--out", "."]
    ended = run(*words, *QUICKLY)
    assert ended.status == 0
    assert Path("a-spairkit.png").read_bytes() == ours
    os.mkdir("viz")
    os.link("a-spairkit.png", "viz/a-spairkit.png")
    ended = run("viz", "cells/a.png", "a-spairkit.png", *QUICKLY)
    assert Path("a-spairkit.png").read_bytes() == ours
    assert Path("viz/a-spairkit.png").read_bytes() == ours


def test_only_our_pictures_are_overwritten(run: Runner) -> None:
    """The mark counts where it stands as ours do, and not anywhere in a file."""
    marks = PngInfo()
    marks.add_text("Comment", "made with tEXtSoftware\0spairkit")
    marks.add_text("Software", "spairkit-like editor")
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save("theirs.png", pnginfo=marks)
    before = Path("theirs.png").read_bytes()
    assert not is_picture("theirs.png")
    ended = run("viz", "cells/a.png", "--out", "theirs.png", *QUICKLY)
    assert ended.status == 2
    assert "theirs.png is no picture by spairkit" in ended.err
    assert Path("theirs.png").read_bytes() == before


@pytest.mark.parametrize("out", ["/dev/null", "pipe"])
def test_outputs_that_are_no_files_are_refused_before_the_work(run: Runner, out: str) -> None:
    os.mkfifo("pipe")
    for words in (["detect", "cells"], ["eval", "--data", "cells"]):
        ended = run(*words, "--out", out)
        assert ended.status == 2
        assert ended.err == f"spairkit: --out {out}: is not a regular file; name another\n"


@pytest.mark.parametrize("command", ["train", "compare", "sweep"])
def test_folders_that_hold_files_receive_no_run(run: Runner, command: str) -> None:
    before = contents()
    ended = run(command, "--data", "cells", "--out", "cells", "--quiet")
    assert ended.status == 2
    assert "cells: not empty; name another folder (--out)" in ended.err
    assert contents() == before


def test_config_and_data_make_write_new_files_only(run: Runner) -> None:
    assert run("config", "copy", "mine.toml").status == 0
    os.symlink("mine.toml", "link.toml")
    before = contents()
    for words in (
        ["config", "copy", "mine.toml", "--config", "mine.toml"],
        ["config", "copy", "link.toml", "--config", "mine.toml"],
        ["data", "make", "cells"],
        ["data", "make", "mine.toml"],
    ):
        ended = run(*words)
        assert ended.status == 2
        assert "already exists; name a new" in ended.err
        assert contents() == before


def test_ledger_is_appended_to_ledgers_only(run: Runner) -> None:
    run("config", "copy", "mine.toml")
    before = contents()
    bench = ["bench", "--operator", "render", "--objects", "16", "--batch", "1", "--seconds", "0"]
    for name in ("mine.toml", "cells/a.png"):
        ended = run(*bench, "--ledger", name)
        assert ended.status == 2
        assert f"--ledger {name}: holds no figures of spairkit bench; name another" in ended.err
        assert contents() == before
    Path("old.jsonl").write_text('{"benchmark": "train"}\n')
    assert run(*bench, "--ledger", "old.jsonl").status == 0
    assert Path("old.jsonl").read_text().startswith('{"benchmark": "train"}\n{')


def test_pictures_are_no_images_of_their_folder(
    run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = list_images("cells")
    monkeypatch.chdir("cells")
    Path("annotations.json").unlink()
    assert run("viz", "a.png", *QUICKLY).status == 0
    assert run("viz", ".", *QUICKLY).status == 0
    assert run("data", "look", ".").status == 0
    compared = ["--models", "watershed,conncomp", "--set", "conncomp.model.threshold=0.3"]
    assert run("compare", "--data", ".", *compared, "--quiet").status == 0
    assert run("train", "--model", "watershed", "--data", ".", "--quiet").status in (0, 3)
    assert Path("runs/compare-1/figure.png").exists()
    monkeypatch.chdir("..")
    assert list_images("cells") == images


def test_folder_whose_training_was_killed_at_once_can_be_trained_into(run: Runner) -> None:
    """A kill can come before the config stands; half of it is left then."""
    kill = (
        "import os, sys\n"
        "from spairkit.storage import durable\n"
        "durable._flush_folder = os.replace = lambda *_: os.kill(os.getpid(), 9)\n"
        "from spairkit.cli.main import main\n"
        "main(sys.argv[1:])\n"
    )
    words = ["train", "--model", "watershed", "--data", "cells", "--quiet", "--out", "run"]
    done = subprocess.run([sys.executable, "-c", kill, *words], check=False, capture_output=True)
    assert done.returncode == -9
    assert os.listdir("run")
    assert not Path("run/config.toml").exists()
    ended = run(*words)
    assert ended.status in (0, 3)
    assert not [path for path in Path("run").rglob("*") if "tmp" in path.name]
    assert run(*words).status == 2, "it holds a run now"


@pytest.mark.parametrize("command", ["detect", "count", "track"])
@pytest.mark.parametrize("name", ["annotations.json", "spairkit-corrections.json"])
def test_annotations_are_kept_though_only_an_image_is_named(
    run: Runner, command: str, name: str
) -> None:
    place = Path("cells") / name
    place.write_text("by hand")
    linked("link.json", place)
    for out in (place, Path("link.json")):
        ended = run(command, "cells/a.png", "cells/b.png", "--out", out, *QUICKLY)
        assert ended.status == 2
        assert ended.err == f"spairkit: --out {out}: holds annotations; name another file\n"
    assert place.read_text() == "by hand"
