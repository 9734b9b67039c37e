"""The forms in which detections leave the library."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

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


def test_json_holds_every_field(two: Detections) -> None:
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


def test_supervision_is_asked_for_by_name(two: Detections, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "supervision", None)  # as where it is not installed
    with pytest.raises(ImportError, match="supervision"):
        two.to_supervision()
