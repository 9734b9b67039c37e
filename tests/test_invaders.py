"""Frames of Space Invaders: boxes against pixels, and the folder that `data make` writes."""

import json
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from spairkit.cli.main import main
from spairkit.config import DataConfig
from spairkit.data.folder import ImageFolder
from spairkit.data.invaders import HEIGHT, NAMES, WIDTH, frames
from spairkit.detections import Truth

ALIEN, SHIELD, SHIP, SHOT, DIGIT = range(len(NAMES))


@pytest.fixture(scope="module")
def taken() -> list[tuple[Tensor, Truth]]:
    """Frames of some games."""
    pytest.importorskip("ale_py")
    return list(islice(frames(3), 120))


def test_boxes_hold_every_lit_pixel_and_are_tight(taken: list[tuple[Tensor, Truth]]) -> None:
    for image, truth in taken:
        assert image.shape == (3, HEIGHT, WIDTH)
        assert image.dtype == torch.uint8
        left = image.amax(0) > 0
        for x1, y1, x2, y2 in truth.boxes.int().tolist():
            lit = image[:, y1:y2, x1:x2].amax(0) > 0
            assert lit[0].any()
            assert lit[-1].any()
            assert lit[:, 0].any()
            assert lit[:, -1].any()
            left[y1:y2, x1:x2] = False
        assert not left.any()


def test_sprites_of_one_colour_lie_apart(taken: list[tuple[Tensor, Truth]]) -> None:
    """Each alien is one blob of its colour; a box holds no part of another one."""
    for image, truth in taken:
        colour = torch.tensor([134, 134, 29], dtype=torch.uint8)[:, None, None]
        drawn = (image == colour).all(0).numpy()
        _, number = ndimage.label(ndimage.binary_dilation(drawn, np.ones((3, 3))), np.ones((3, 3)))
        aliens = truth.boxes[truth.labels == ALIEN]
        assert number == len(aliens)
        assert int(drawn.sum()) == sum(
            int(drawn[y1:y2, x1:x2].sum()) for x1, y1, x2, y2 in aliens.int().tolist()
        )
        sides = aliens[:, 2:] - aliens[:, :2]
        assert (sides <= torch.tensor([8.0, 10.0])).all()


def test_all_kinds_appear_in_believable_numbers(taken: list[tuple[Tensor, Truth]]) -> None:
    counts = torch.stack([torch.bincount(truth.labels, minlength=5) for _, truth in taken])
    most = counts.amax(0).tolist()
    assert most[ALIEN] == 36
    assert most[SHIELD] == 3
    assert most[SHIP] == most[DIGIT] == 1
    assert 1 <= most[SHOT] <= 4
    assert counts[:, ALIEN].min() < 36, "some are shot"


def test_frames_are_a_function_of_the_seed(taken: list[tuple[Tensor, Truth]]) -> None:
    again = list(islice(frames(3), 5))
    for (image, truth), (first, known) in zip(again, taken, strict=False):
        assert torch.equal(image, first)
        assert torch.equal(truth.boxes, known.boxes)
    other = list(islice(frames(4), 5))
    assert not all(torch.equal(a[0], b[0]) for a, b in zip(again, other, strict=True))


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main([*words])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_data_make_writes_a_folder_to_train_on(tmp_path: Path) -> None:
    pytest.importorskip("ale_py")
    folder = tmp_path / "frames"
    words = ("--data", "invaders", "--count", "3", "--set", "data.seed=3")
    assert run("data", "make", str(folder), *words) == 0
    content = json.loads((folder / "annotations.json").read_text())
    assert [entry["name"] for entry in content["categories"]] == list(NAMES)
    read = ImageFolder(DataConfig(name="folder", path=str(folder)), "test")
    images = list(read.images())
    assert len(images) == 3
    for (_, _, image, truth), (frame, known) in zip(images, frames(3), strict=False):
        assert torch.equal((image * 255).round().byte(), frame)
        assert truth is not None
        assert torch.equal(truth.boxes, known.boxes)
        assert torch.equal(truth.labels, known.labels + 1)


def test_missing_package_is_named_and_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ale_py", None)
    assert run("data", "make", str(tmp_path / "frames"), "--data", "invaders") == 2
    said = capsys.readouterr().err
    assert "need ale-py, which is not installed: run pip install '.[atari]'" in said
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [("--set", "data.max_objects=3"), ("--preset", "laptop"), ("--set", "train.seed=3")],
)
def test_other_settings_are_refused(
    tmp_path: Path, words: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("data", "make", str(tmp_path / "frames"), "--data", "invaders", *words) == 2
    assert "--data invaders has one setting, data.seed" in capsys.readouterr().err


def test_training_asks_for_a_folder_of_frames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("train", "--data", "invaders") == 2
    assert "spairkit data make FOLDER --data invaders" in capsys.readouterr().err
