"""Selecting, drawing and exporting detections."""

import base64
import io
import json
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from spairkit.detections import Detections, Truth


@pytest.fixture
def two() -> Detections:
    return Detections(
        boxes=torch.tensor([[1.0, 2.0, 4.0, 8.0], [-1.5, 0.0, 3.0, 3.5]]),
        scores=torch.tensor([0.75, 0.5]),
        what=torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]),
        depth=torch.tensor([-1.0, 2.0]),
    )


NONE = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, 3), torch.zeros(0))


def test_length_is_the_count(two: Detections) -> None:
    assert (len(two), len(NONE)) == (2, 0)
    assert len(Truth(torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64))) == 3


def test_coco_boxes_are_corner_and_size(two: Detections) -> None:
    assert two.to_coco(7) == [
        {"image_id": 7, "category_id": 1, "bbox": [1.0, 2.0, 3.0, 6.0], "score": 0.75},
        {"image_id": 7, "category_id": 1, "bbox": [-1.5, 0.0, 4.5, 3.5], "score": 0.5},
    ]
    assert NONE.to_coco(7) == []


def test_json_contains_every_field(two: Detections) -> None:
    back = json.loads(json.dumps(two.to_json()))
    assert back.pop("count") == 2
    for name, value in back.items():
        torch.testing.assert_close(torch.tensor(value), getattr(two, name))
    assert set(back) == {"boxes", "scores", "what", "depth"}
    assert json.loads(json.dumps(NONE.to_json()))["boxes"] == []


def test_supervision_gets_boxes_scores_and_one_class(
    two: Detections, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "supervision", SimpleNamespace(Detections=SimpleNamespace))
    given = vars(two.to_supervision())
    assert given.keys() == {"xyxy", "confidence", "class_id"}
    assert given["xyxy"].tolist() == two.boxes.tolist()
    assert given["confidence"].tolist() == [0.75, 0.5]
    assert given["class_id"].tolist() == [0, 0]


def test_missing_supervision_is_named(two: Detections, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "supervision", None)  # as if it were not installed
    with pytest.raises(ImportError, match="supervision"):
        two.to_supervision()


def test_supervision_accepts_exported_detections(two: Detections) -> None:
    supervision = pytest.importorskip("supervision")
    theirs = two.to_supervision()
    assert isinstance(theirs, supervision.Detections)
    assert len(theirs) == 2
    kept = theirs[theirs.confidence > 0.6]
    assert kept.xyxy.tolist() == two[two.scores > 0.6].boxes.tolist()
    assert len(NONE.to_supervision()) == 0


@pytest.mark.parametrize(
    ("index", "rows"),
    [
        (torch.tensor([False, True]), [1]),
        (np.array([True, False]), [0]),
        ([1, 0], [1, 0]),
        ([], []),
        (torch.tensor([1]), [1]),
        (slice(None, 1), [0]),
        (-1, [1]),
        (np.int64(1), [1]),
        (torch.tensor(0), [0]),
        (torch.tensor([-1, 0], dtype=torch.int32), [1, 0]),
        (np.array([1], np.uint32), [1]),
        (slice(None, None, -1), [1, 0]),
    ],
)
def test_index_selects_rows_of_every_field(two: Detections, index: Any, rows: list[int]) -> None:
    found = two[index]
    assert len(found) == len(rows)
    for name in ("boxes", "scores", "what", "depth"):
        assert getattr(found, name).tolist() == getattr(two, name)[rows].tolist()


@pytest.mark.parametrize("index", [2, -3, [5], torch.tensor([True, False, True])])
def test_index_out_of_range_is_refused(two: Detections, index: Any) -> None:
    with pytest.raises(IndexError):
        two[index]


def test_detections_can_be_iterated(two: Detections) -> None:
    assert [len(one) for one in two] == [1, 1]


def test_repr_gives_count_and_scores(two: Detections) -> None:
    assert repr(two) == "Detections(2 objects, scores 0.50 to 0.75)"
    assert repr(two[0]) == "Detections(1 object, scores 0.75 to 0.75)"
    assert repr(NONE) == "Detections(0 objects)"


def test_plot_draws_every_box_on_the_image(two: Detections) -> None:
    axes = Figure().add_subplot()
    image = np.zeros((10, 12), np.uint8)
    assert two.plot(image, ax=axes) is axes
    corners = [path.get_extents().extents.tolist() for path in axes.collections[0].get_paths()]
    assert corners == two.boxes.tolist()
    assert axes.images[0].get_extent() == [0, 12, 10, 0]
    assert axes.get_title() == "2 found"
    outside = replace(two, boxes=torch.tensor([[-5.0, -5, 30, 30], [0, 0, 1, 1]]))
    axes = outside.plot(image, ax=Figure().add_subplot())
    assert (axes.get_xlim(), axes.get_ylim()) == ((0, 12), (10, 0))
    with pytest.raises(ValueError, match="have no image"):
        two.plot(ax=axes)


def test_notebooks_show_the_picture(two: Detections) -> None:
    assert two._repr_html_() == "<p>Detections(2 objects, scores 0.50 to 0.75)</p>"
    html = replace(two, image=np.zeros((10, 12), np.uint8))._repr_html_()
    data = base64.b64decode(html.split("base64,")[1].split('"')[0])
    picture = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    distance = abs(picture.astype(int) - [255, 127, 14]).sum(-1)
    assert (distance < 30).sum() > 100, "boxes in tab:orange"


@pytest.mark.parametrize(
    "index", ["boxes", None, 0.5, torch.zeros(1, 1).long(), (0, 1), True, torch.ones(2).byte()]
)
def test_other_indices_are_refused(two: Detections, index: Any) -> None:
    with pytest.raises(IndexError):
        two[index]


def test_notebooks_show_text_if_the_image_file_is_gone(two: Detections) -> None:
    html = replace(two, image="absent.png")._repr_html_()
    assert html == "<p>Detections(2 objects, scores 0.50 to 0.75)</p>"
