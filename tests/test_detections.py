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
from pycocotools import mask as coco_masks

from spairkit.counts import CountPosterior
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


@pytest.fixture
def masked(two: Detections) -> Detections:
    """Two objects with labels 7 and 4, and the pixels of a third."""
    label_image = torch.zeros(9, 6, dtype=torch.int32)
    label_image[2:8, 1:4] = 7
    label_image[0:3, 0:3] = 4
    label_image[8, 5] = 2
    return replace(
        two,
        label_image=label_image,
        labels=torch.tensor([7, 4], dtype=torch.int32),
        image=np.tile(np.arange(6, dtype=np.uint8) * 51, (9, 1)),  # 0, .2, .4 ... 1 by column
        counts=CountPosterior.independent(torch.tensor([1.0, 1.0, 0.5])),
    )


def test_masks_number_objects_by_row(masked: Detections) -> None:
    masks = masked.masks
    assert masks.dtype == torch.int32
    assert masks[7].tolist() == [0, 1, 1, 1, 0, 0]
    assert masks[2].tolist() == [2, 2, 2, 1, 0, 0]
    assert masks[8].tolist() == [0] * 6, "objects that are not here have no pixels"
    assert masked[[1, 0]].masks[2].tolist() == [1, 1, 1, 2, 0, 0]
    assert masked[1].masks[2].tolist() == [1, 1, 1, 0, 0, 0]
    assert masked[[]].masks.sum() == 0


def test_area_and_intensity_are_those_of_the_mask(masked: Detections) -> None:
    assert masked.area.tolist() == [16, 9]
    assert masked[1].area.tolist() == [9]
    torch.testing.assert_close(masked.intensity, torch.tensor([0.4125, 0.2]))
    torch.testing.assert_close(masked[[1, 0]].intensity, torch.tensor([0.2, 0.4125]))
    with pytest.raises(ValueError, match="have no image"):
        _ = replace(masked, image=None).intensity
    with pytest.raises(ValueError, match="as large as the masks"):
        _ = replace(masked, image=np.zeros((6, 9), np.uint8)).intensity


def test_selection_keeps_masks_and_drops_the_count(masked: Detections) -> None:
    chosen = masked[masked.scores > 0.6]
    assert chosen.label_image is masked.label_image
    assert chosen.labels is not None
    assert chosen.labels.tolist() == [7]
    assert masked.counts is not None
    assert chosen.counts is None


@pytest.mark.parametrize("name", ["masks", "area", "intensity"])
def test_models_without_masks_say_so(two: Detections, name: str) -> None:
    with pytest.raises(ValueError, match="have no masks: this model finds boxes only"):
        getattr(two, name)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"labels": None}, "both be given, or neither"),
        ({"label_image": None}, "both be given, or neither"),
        ({"labels": torch.zeros(3, dtype=torch.int32)}, r"\[H, W\] and \[2\], got \[9, 6\] and"),
        ({"label_image": torch.zeros(9, dtype=torch.int32)}, r"got \[9\] and \[2\]"),
        ({"labels": torch.zeros(2)}, "must be int32, got torch.int32 and torch.float32"),
    ],
)
def test_masks_that_do_not_fit_are_refused(
    masked: Detections, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        replace(masked, **fields)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools
def test_coco_results_have_masks(masked: Detections, two: Detections) -> None:
    results = json.loads(json.dumps(masked.to_coco(7)))
    for result, box, label, area in zip(results, two.to_coco(7), [7, 4], [16, 9], strict=True):
        assert masked.label_image is not None
        decoded = coco_masks.decode(result.pop("segmentation"))
        assert decoded.tolist() == (masked.label_image == label).int().tolist()
        assert result.pop("area") == area
        assert result == box


def test_json_has_area_intensity_and_count(masked: Detections) -> None:
    values = json.loads(json.dumps(masked.to_json(), allow_nan=False))
    assert values["area"] == [16, 9]
    assert values["intensity"] == pytest.approx([0.4125, 0.2])
    assert (values["count"], values["count_mean"], values["count_interval"]) == (2, 2.5, [2, 3])
    assert set(values) == {
        *("count", "count_mean", "count_interval"),
        *("boxes", "scores", "what", "depth", "area", "intensity"),
    }
    assert "intensity" not in replace(masked, image=None).to_json()
    assert "count_mean" not in masked[0].to_json()
    absent = replace(masked, labels=torch.tensor([3, 4], dtype=torch.int32)).to_json()
    assert (absent["area"], absent["intensity"][0]) == ([0, 9], None)


def test_supervision_gets_masks(masked: Detections) -> None:
    supervision = pytest.importorskip("supervision")
    theirs = masked.to_supervision()
    assert isinstance(theirs, supervision.Detections)
    assert theirs.mask.dtype == bool
    assert theirs.mask.sum((1, 2)).tolist() == masked.area.tolist()
    assert (theirs.mask[1] == (masked.masks == 2).numpy()).all()
    assert masked[[]].to_supervision().mask.shape == (0, 9, 6)


def test_repr_gives_the_interval_of_the_count(masked: Detections) -> None:
    assert (
        repr(masked) == "Detections(2 objects, scores 0.50 to 0.75, 2.5 expected, 2 to 3 at 90 %)"
    )
    assert repr(masked[0]) == "Detections(1 object, scores 0.75 to 0.75)"
    counts = CountPosterior.independent(torch.tensor([0.5]))
    assert (
        repr(replace(NONE, counts=counts)) == "Detections(0 objects, 0.5 expected, 0 to 1 at 90 %)"
    )


def test_plot_draws_outlines_and_the_interval(masked: Detections) -> None:
    axes = masked.plot(ax=Figure().add_subplot())
    assert axes.get_title() == "2 found, 2.5 expected, 2 to 3 at 90 %"
    image, overlay = axes.images
    assert overlay.get_extent() == image.get_extent() == [0, 6, 9, 0]
    alpha = np.asarray(overlay.get_array())[..., 3]
    scale = alpha.shape[0] // 9
    assert alpha.shape == (9 * scale, 6 * scale)
    assert (alpha[2 * scale - 1, 3 * scale : 4 * scale] > 0).all(), "above the first object"
    assert (alpha[3 * scale - 1, scale : 3 * scale] > 0).all(), "where both touch"
    assert (alpha[5 * scale, scale + 1 : 4 * scale - 1] == 0).all(), "its inside"
    assert (alpha[8 * scale :, 4 * scale :] == 0).all(), "the third object is not here"
    assert len(masked[0].plot(ax=Figure().add_subplot()).images) == 2
    assert len(replace(NONE, image=masked.image).plot(ax=Figure().add_subplot()).images) == 1
