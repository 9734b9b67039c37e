"""Each format, read back by the tool that it is for."""

import io
import json
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import roifile
import shapely
import tifffile
import torch

from spairkit import formats
from spairkit.detections import Detections
from spairkit.errors import InputError
from spairkit.images import read_pixels, write_png

HEIGHT, WIDTH = 40, 60


def detections(number: int) -> Detections:
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(number, 2, 2, generator=generator) * torch.tensor([WIDTH, HEIGHT])
    boxes = torch.cat([corners.amin(1), corners.amax(1) + 1], dim=1)
    scores = torch.linspace(0.5, 1, number)
    return Detections(boxes, scores, torch.zeros(number, 2), torch.zeros(number))


@pytest.fixture
def masked() -> Detections:
    """A whole object, one with a hole, one in two pieces, one without a pixel."""
    image = torch.zeros(HEIGHT, WIDTH, dtype=torch.int32)
    image[2:9, 3:11] = 4
    image[20:30, 5:20], image[22:25, 8:12] = 2, 0
    image[5:8, 30:40] = image[12:19, 50:60] = 9
    labels = torch.tensor([4, 2, 9, 3], dtype=torch.int32)
    return replace(detections(4), label_image=image, labels=labels)


@pytest.fixture
def boxed() -> Detections:
    """Objects without masks, of which two leave the image."""
    boxes = torch.tensor([[1.5, 2.0, 9.25, 8.0], [-4.0, 30.0, 8.0, 50.0], [70.0, 1.0, 80.0, 9.0]])
    return replace(detections(3), boxes=boxes)


def test_shapely_finds_the_area_of_each_mask(masked: Detections, tmp_path: Path) -> None:
    masked.save(tmp_path / "found.geojson")
    collection = json.loads((tmp_path / "found.geojson").read_text())
    assert collection == masked.to_geojson()
    shapes = [shapely.from_geojson(json.dumps(f["geometry"])) for f in collection["features"]]
    assert all(shape.is_valid for shape in shapes)
    assert [shape.area for shape in shapes[:3]] == masked.area[:3].tolist()
    assert [shape.geom_type for shape in shapes] == [
        "Polygon",
        "Polygon",
        "MultiPolygon",
        "Polygon",
    ]
    assert [len(shape.interiors) for shape in shapes[:2]] == [0, 1]
    masks = masked.masks.numpy()
    for number, shape in enumerate(shapes[:3], start=1):
        inside = shapely.contains_xy(shape, *np.mgrid[0.5:WIDTH, 0.5:HEIGHT])
        assert (inside == (number == masks.T)).all()
    assert shapes[3].bounds == pytest.approx(masked.boxes[3].tolist()), "its box"


def test_features_are_detections_of_qupath(boxed: Detections) -> None:
    features = boxed.to_geojson()["features"]
    assert [f["type"] for f in features] == ["Feature"] * 3
    for feature, score in zip(features, boxed.scores.tolist(), strict=True):
        properties = {"objectType": "detection", "measurements": {"score": score}}
        assert feature["properties"] == properties
    bounds = [shapely.from_geojson(json.dumps(f["geometry"])).bounds for f in features]
    assert bounds == [tuple(box) for box in boxed.boxes.tolist()]


def test_roifile_reads_outlines_holes_and_pieces(masked: Detections, tmp_path: Path) -> None:
    path = tmp_path / "found.zip"
    masked.save(path)
    rois = roifile.roiread(path)
    assert isinstance(rois, list)
    assert [roi.name for roi in rois] == ["0001", "0002", "0003", "0004"]
    assert [roi.properties["score"] for roi in rois] == pytest.approx(masked.scores, abs=1e-6)
    for roi, area in zip(rois[:3], masked.area.tolist(), strict=False):
        # by the even-odd rule, as ImageJ fills a composite
        lines = roi.coordinates(multi=True)
        assert not roi.composite or all((line[0] == line[-1]).all() for line in lines), "closed"
        rings = [shapely.Polygon(line) for line in lines]
        whole = rings[0]
        for ring in rings[1:]:
            whole = whole.symmetric_difference(ring)
        assert whole.area == area
        assert whole.bounds == (roi.left, roi.top, roi.right, roi.bottom)
    assert [roi.composite for roi in rois] == [False, True, True, False]
    assert rois[0].roitype == roifile.ROI_TYPE.TRACED
    x1, y1, x2, y2 = masked.boxes[3].tolist()
    rectangle = rois[3].xd, rois[3].yd, rois[3].widthd, rois[3].heightd
    assert rectangle == pytest.approx((x1, y1, x2 - x1, y2 - y1))
    masked.save(tmp_path / "again.zip")
    assert (tmp_path / "again.zip").read_bytes() == path.read_bytes()


def test_rois_reach_beyond_16_bits() -> None:
    image = torch.zeros(2, 70_000, dtype=torch.int32)
    image[:, 68_000:68_010] = 1
    boxes, scores = torch.zeros(1, 4), torch.ones(1)
    data = formats.rois(boxes, scores, (image, torch.ones(1, dtype=torch.int32)))
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        roi = roifile.ImagejRoi.frombytes(archive.read("0001.roi"))
    assert shapely.Polygon(roi.coordinates()).bounds == (68_000, 0, 68_010, 2)


def test_missing_roifile_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "roifile", None)
    with pytest.raises(InputError, match=r"need roifile, .* pip install '.\[formats\]'"):
        detections(1).save(tmp_path / "found.zip")
    assert not list(tmp_path.iterdir())


def test_yolo_lines_are_boxes_clipped_to_the_image(boxed: Detections) -> None:
    boxed = replace(boxed, image=torch.zeros(3, HEIGHT, WIDTH))
    rows = np.loadtxt(boxed.to_yolo().splitlines())
    assert rows[:, 0].tolist() == [0, 0], "the third lies outside"
    assert rows[:, 5] == pytest.approx(boxed.scores[:2].numpy())
    centre, size = rows[:, 1:3] * (WIDTH, HEIGHT), rows[:, 3:5] * (WIDTH, HEIGHT)
    corners = np.concatenate([centre - size / 2, centre + size / 2], axis=1)
    assert corners == pytest.approx(np.array([[1.5, 2, 9.25, 8], [0, 30, 8, 40]]), abs=1e-4)
    with pytest.raises(ValueError, match="have no image"):
        replace(boxed, image=None).to_yolo()


def test_supervision_loads_yolo(masked: Detections, tmp_path: Path) -> None:
    supervision = pytest.importorskip("supervision")
    write_png(tmp_path / "a.png", torch.zeros(3, HEIGHT, WIDTH))
    masked.save(tmp_path / "a.txt")
    (tmp_path / "data.yaml").write_text("names: [object]\n")
    folder = str(tmp_path)
    loaded = supervision.DetectionDataset.from_yolo(folder, folder, f"{folder}/data.yaml")
    [(_, _, found)] = loaded
    edges = torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT])
    clipped = masked.boxes.clamp(min=0).minimum(edges)
    assert found.xyxy == pytest.approx(clipped.numpy(), abs=1e-3)


def test_tifffile_reads_the_numbers_of_objects(masked: Detections, tmp_path: Path) -> None:
    masked.save(tmp_path / "found.tif")
    read = tifffile.imread(tmp_path / "found.tif")
    assert read.dtype == np.uint16
    assert (read == masked.masks.numpy()).all()
    assert (read_pixels(tmp_path / "found.tif").numpy() == read).all(), "our own reader too"


@pytest.mark.parametrize(("objects", "dtype"), [(65_535, np.uint16), (65_536, np.uint32)])
def test_more_objects_have_32_bits(objects: int, dtype: type) -> None:
    masks = torch.tensor([[0, objects]], dtype=torch.int32)
    read = tifffile.imread(io.BytesIO(formats.label_tiff(masks, objects)))
    assert read.dtype == dtype
    assert read.tolist() == [[0, objects]]


@pytest.mark.parametrize("suffix", [".zip", ".geojson", ".txt", ".tif"])
def test_no_object_is_a_file_too(tmp_path: Path, suffix: str) -> None:
    empty = torch.zeros(HEIGHT, WIDTH, dtype=torch.int32)
    labels = torch.zeros(0, dtype=torch.int32)
    none = replace(detections(0), label_image=empty, labels=labels)
    none.save(tmp_path / f"found{suffix}")
    readers: dict[str, Callable[[Path], object]] = {
        ".zip": lambda path: zipfile.ZipFile(path).namelist(),
        ".geojson": lambda path: json.loads(path.read_text())["features"],
        ".txt": lambda path: list(path.read_text()),
        ".tif": lambda path: tifffile.imread(path).nonzero()[0].tolist(),
    }
    assert readers[suffix](tmp_path / f"found{suffix}") == []


def test_other_suffixes_and_absent_masks_are_refused(boxed: Detections, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must end in one of \.zip, .*, got 'found\.xml'"):
        boxed.save("found.xml")
    with pytest.raises(ValueError, match="no masks"):
        boxed.save(tmp_path / "found.tif")
    assert not list(tmp_path.iterdir())
