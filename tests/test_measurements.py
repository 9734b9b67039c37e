"""Measurements against loops over pixels; the resolution of files; `detect --table`."""

import csv
import math
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from torch import Tensor

from spairkit import measurements as module
from spairkit.cli import detect as detect_command
from spairkit.cli.main import main
from spairkit.detections import Detections
from spairkit.images import pixel_size, read_image, write_png

BOX_COLUMNS = ("x", "y", "x1", "y1", "x2", "y2", "score")
MASK_COLUMNS = ("area", "equivalent_diameter", "eccentricity")


def scattered(height: int, width: int, number: int, image: Any) -> Detections:
    """Ellipses, some of which hide others or leave the image; boxes do not fit them exactly."""
    generator = torch.Generator().manual_seed(3)
    label_image = torch.zeros(height, width, dtype=torch.int32)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    boxes = torch.zeros(number, 4)
    for i in range(number):
        u, v, a, b, turn = torch.rand(5, generator=generator).tolist()
        dx, dy = x + 0.5 - u * width, y + 0.5 - v * height
        along = dx * math.cos(3 * turn) + dy * math.sin(3 * turn)
        across = dy * math.cos(3 * turn) - dx * math.sin(3 * turn)
        label_image[(along / (2 + 6 * a)) ** 2 + (across / (2 + 3 * b)) ** 2 < 1] = i + 1
        side = torch.tensor([3 + 5 * a, 3 + 4 * b])
        centre = torch.tensor([u * width, v * height])
        boxes[i] = torch.cat([centre - side, centre + side])
    labels = torch.arange(1, number + 1, dtype=torch.int32).flip(0)
    what = torch.rand(number, 2, generator=generator)
    scores = torch.rand(number, generator=generator)
    return Detections(
        boxes.flip(0), scores, what, scores, image=image, label_image=label_image, labels=labels
    )


def by_loops(found: Detections, i: int, channel: Tensor) -> dict[str, float]:
    """The columns of object i in one channel [H, W] in [0, 1], pixel by pixel."""
    assert found.label_image is not None
    assert found.labels is not None
    pixels = found.label_image.tolist()
    x1, y1, x2, y2 = found.boxes[i].tolist()
    margin = max(5.0, max(x2 - x1, y2 - y1) / 2)
    inside, free = [], []
    for row, values in enumerate(pixels):
        for column, value in enumerate(values):
            level = float(channel[row, column])
            if value == int(found.labels[i]):
                inside.append((column + 0.5, row + 0.5, level))
            wide = x1 - margin < column + 1 and column < x2 + margin
            high = y1 - margin < row + 1 and row < y2 + margin
            if value == 0 and wide and high:
                free.append(level)
    if not inside:
        nothing = dict.fromkeys(("eccentricity", "mean", "corrected_mean"), math.nan)
        return nothing | {"area": 0, "sum": 0, "equivalent_diameter": 0}
    n = len(inside)
    mx, my = (sum(item[axis] for item in inside) / n for axis in (0, 1))
    xx = sum((x - mx) ** 2 for x, _, _ in inside) / n + 1 / 12
    yy = sum((y - my) ** 2 for _, y, _ in inside) / n + 1 / 12
    xy = sum((x - mx) * (y - my) for x, y, _ in inside) / n
    least, most = np.linalg.eigvalsh([[xx, xy], [xy, yy]])
    total = sum(level for _, _, level in inside)
    return {
        "area": n,
        "equivalent_diameter": 2 * math.sqrt(n / math.pi),
        "eccentricity": math.sqrt(max(0.0, 1 - least / most)),
        "mean": total / n,
        "sum": total,
        "corrected_mean": total / n - (sum(free) / len(free) if free else math.nan),
    }


@pytest.mark.parametrize("strip", [1, 1000, 1 << 20], ids=["rows", "bands", "whole"])
@pytest.mark.parametrize("colours", [1, 3])
def test_columns_equal_loops(colours: int, strip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_STRIP_PIXELS", strip)
    image = torch.rand(colours, 60, 70, generator=torch.Generator().manual_seed(1)).expand(
        3, -1, -1
    )
    found = scattered(60, 70, 14, image)
    assert found.label_image is not None
    found.label_image[found.label_image == 5] = 0  # an object without a pixel
    columns = found.measurements()
    ends = ("",) if colours == 1 else ("_red", "_green", "_blue")
    for end, channel in zip(ends, image, strict=False):
        for i in range(len(found)):
            for name, value in by_loops(found, i, channel).items():
                full = name if name in MASK_COLUMNS else name + end
                assert columns[full][i] == pytest.approx(value, rel=1e-6, abs=1e-7, nan_ok=True)
    names = [f"{name}{end}" for name in module.INTENSITIES for end in ends]
    assert list(columns) == [*BOX_COLUMNS, *MASK_COLUMNS, *names]
    x1, y1, x2, y2 = found.boxes.double().numpy().T
    assert columns["x"].tolist() == ((x1 + x2) / 2).tolist()
    assert columns["y2"].tolist() == y2.tolist()
    assert columns["y"].tolist() == ((y1 + y2) / 2).tolist()


def test_shapes_that_are_known_by_hand() -> None:
    label_image = torch.zeros(40, 40, dtype=torch.int32)
    label_image[2, 2] = 1  # one pixel
    label_image[10, 10:14] = 2  # 4 x 1
    label_image[20:26, 20:26] = 3  # square
    boxes = torch.tensor([[2, 2, 3, 3], [10, 10, 14, 11], [20, 20, 26, 26]]).float()
    ones = torch.ones(3)
    image = torch.full((3, 40, 40), 0.25)
    image[:, 20:26, 20:26] = 0.75
    found = Detections(
        boxes, ones, torch.zeros(3, 0), ones, image, label_image, torch.arange(1, 4).int()
    )
    columns = found.measurements()
    assert columns["area"].tolist() == [1, 4, 36]
    assert columns["eccentricity"] == pytest.approx([0, math.sqrt(1 - 1 / 16), 0], abs=1e-7)
    assert columns["sum"].tolist() == [0.25, 1, 27]
    assert columns["corrected_mean"] == pytest.approx([0, 0, 0.5], abs=1e-9)
    far = scattered(30, 30, 3, torch.ones(3, 30, 31))
    with pytest.raises(ValueError, match="as large as the masks"):
        far.measurements()


def test_without_masks_or_objects_columns_stay() -> None:
    boxes = torch.tensor([[1.0, 2.0, 5.0, 8.0]])
    found = Detections(boxes, torch.ones(1), torch.zeros(1, 0), torch.zeros(1))
    columns = found.measurements()
    assert columns["x"].tolist() == [3]
    assert all(np.isnan(columns[name]).all() for name in (*MASK_COLUMNS, *module.INTENSITIES))
    none = scattered(20, 20, 2, torch.ones(3, 20, 20))[[]].measurements()
    assert list(none) == list(columns)
    assert all(column.shape == (0,) for column in none.values())


def test_dataframe(monkeypatch: pytest.MonkeyPatch) -> None:
    found = scattered(60, 70, 14, torch.rand(3, 60, 70))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pandas", None)  # as if it were not installed
        with pytest.raises(ImportError, match="pandas"):
            found.to_dataframe()
    pytest.importorskip("pandas")
    frame = found.to_dataframe()
    assert list(frame.columns) == [*found.measurements(), "cluster"]
    assert frame["area"].tolist() == found.area.tolist()
    assert set(frame["cluster"]) <= set(range(1, 7))
    bare = Detections(found.boxes, found.scores, found.what[:, :0], found.depth).to_dataframe()
    assert len(bare) == 14
    assert bare["cluster"].isna().all()


GREY = np.arange(600, dtype=np.uint8).reshape(20, 30)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"resolution": (1e4, 2e4), "resolutionunit": "CENTIMETER"}, (1, 0.5)),
        ({"resolution": (25400, 25400), "resolutionunit": "INCH"}, (1, 1)),
        ({"resolution": (2, 4), "imagej": True, "metadata": {"unit": "um"}}, (0.5, 0.25)),
        ({"resolution": (2, 4), "imagej": True, "metadata": {"unit": "\\u00B5m"}}, (0.5, 0.25)),
        ({"resolution": (2, 4), "imagej": True, "metadata": {"unit": "mm"}}, (500, 250)),
        ({"resolution": (2, 4), "imagej": True, "metadata": {"unit": "pixel"}}, None),
        ({"resolution": (72, 72), "resolutionunit": "INCH"}, None),
        ({"resolution": (2, 4), "resolutionunit": "NONE"}, None),
        ({"resolution": (0, 300), "resolutionunit": "INCH"}, None),
        ({}, None),
    ],
)
def test_resolution_of_tiffs(options: dict[str, Any], expected: object, tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", GREY, **options)
    size = pixel_size(tmp_path / "a.tif")
    assert size == (None if expected is None else pytest.approx(expected, rel=1e-6))
    assert read_image(tmp_path / "a.tif").shape == (3, 20, 30)


def test_damaged_resolution_costs_no_pixel(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, GREY, resolution=(7919, 7919), resolutionunit="INCH")
    whole = path.read_bytes()
    stored = struct.pack("<II", 7919, 1)
    assert stored in whole
    path.write_bytes(whole.replace(stored, struct.pack("<II", 7919, 0)))
    assert pixel_size(path) is None
    assert read_image(path).shape == (3, 20, 30)


def test_resolution_turns_with_the_image(tmp_path: Path) -> None:
    turned = [(274, 3, 1, 6, True)]
    unit: dict[str, Any] = {"resolution": (1e4, 2e4), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(tmp_path / "a.tif", GREY, extratags=turned, **unit)
    assert pixel_size(tmp_path / "a.tif") == pytest.approx((0.5, 1))


def test_resolution_of_other_files(tmp_path: Path) -> None:
    picture = Image.fromarray(GREY)
    picture.save(tmp_path / "a.png", dpi=(50_800, 101_600))
    assert pixel_size(tmp_path / "a.png") == pytest.approx((0.5, 0.25))
    for name in ("screen.png", "screen.jpg"):
        picture.save(tmp_path / name, dpi=(72, 72))
        assert pixel_size(tmp_path / name) is None
    picture.save(tmp_path / "paper.jpg", dpi=(300, 300))
    assert pixel_size(tmp_path / "paper.jpg") is None


def test_columns_in_micrometres(tmp_path: Path) -> None:
    unit: dict[str, Any] = {"resolution": (1e4, 2e4), "resolutionunit": "CENTIMETER"}  # 1 x 0.5 µm
    tifffile.imwrite(tmp_path / "a.tif", GREY, **unit)
    found = scattered(20, 30, 5, tmp_path / "a.tif")
    columns = found.measurements()
    assert columns["x_um"] == pytest.approx(columns["x"])
    assert columns["y_um"] == pytest.approx(columns["y"] / 2)
    assert columns["width_um"] == pytest.approx(columns["x2"] - columns["x1"])
    assert columns["height_um"] == pytest.approx((columns["y2"] - columns["y1"]) / 2)
    assert columns["area_um2"] == pytest.approx(columns["area"] / 2)
    expected = np.sqrt(columns["area"] / 2 * 4 / np.pi)
    assert columns["equivalent_diameter_um"] == pytest.approx(expected)
    assert columns["mean"] == pytest.approx(found.intensity.double().numpy(), rel=1e-6)


def table(path: str) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_table_of_a_folder(workplace: Path, command: Callable[..., Any]) -> None:
    unit: dict[str, Any] = {"resolution": (1e4, 1e4), "resolutionunit": "CENTIMETER"}
    grey = (read_image("cells/1.png")[0] * 255).byte().numpy()
    Path("cells/annotations.json").unlink()
    tifffile.imwrite("cells/5.tif", grey, **unit)
    words = ["detect", "cells", "--checkpoint", "run", "--threshold", "0", "--quiet"]
    ended = command(*words, "--format", "csv", "--out", "found.csv", "--table", "objects.csv")
    assert "wrote found.csv and objects.csv: " in ended.err
    rows, boxes = table("objects.csv"), table("found.csv")
    assert len(rows) == len(boxes) > 0
    for row, box in zip(rows, boxes, strict=True):
        assert (row["image"], row["image_id"]) == (box["image"], box["image_id"])
        for name in ("x1", "y1", "x2", "y2", "score", "area"):
            assert float(row[name]) == pytest.approx(float(box[name]), rel=1e-6)
        assert int(row["cluster"]) in range(1, 7)
        levels = [float(row[f"mean_{colour}"] or "nan") for colour in module.COLOURS]
        assert np.mean(levels) == pytest.approx(float(box["intensity"] or "nan"), 1e-5, nan_ok=True)
        has_unit = row["image"].endswith(".tif")
        assert (row["x_um"] == row["x"]) if has_unit else (row["x_um"] == row["area_um2"] == "")
        assert not has_unit or levels[0] == pytest.approx(levels[2], nan_ok=True)
    alone = command(*words, "--table", "again.csv")
    assert alone.out == "", "standard output is for results that are asked for"
    assert Path("again.csv").read_bytes() == Path("objects.csv").read_bytes()
    command("detect", "cells/5.tif", *words[2:], "--table", "grey.csv")
    assert {"mean", "sum", "corrected_mean"} < set(table("grey.csv")[0])


def test_table_goes_on_where_it_was_stopped(
    workplace: Path, command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["detect", "cells", "--checkpoint", "run", "--threshold", "0", "--table", "objects.csv"]
    command(*words)
    whole = Path("objects.csv").read_bytes()
    Path("objects.csv").unlink()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(detect_command, "table_text", full)
        with pytest.raises(SystemExit):
            main(words)
    assert not Path("objects.csv").exists()
    assert Path("objects.csv.parts").exists()
    assert "4 images finished before, 0 left" in command(*words).err
    assert Path("objects.csv").read_bytes() == whole
    assert not Path("objects.csv.parts").exists()


def test_table_without_masks(workplace: Path, command: Callable[..., Any]) -> None:
    write_png("dots.png", torch.zeros(3, 24, 24).index_fill(2, torch.tensor([5, 6, 7]), 1.0))
    options = ("--model", "conncomp", "--data", "cells", "--out", "plain", "--quiet")
    command("train", *options)
    command("detect", "dots.png", "--checkpoint", "plain", "--table", "objects.csv", "--quiet")
    for row in table("objects.csv"):
        assert row["area"] == row["mean"] == row["eccentricity"] == ""
        assert float(row["x"]) == pytest.approx((float(row["x1"]) + float(row["x2"])) / 2)
    assert table("objects.csv")


def test_table_takes_no_other_place(workplace: Path, command: Callable[..., Any]) -> None:
    before = Path("cells/0.png").read_bytes()
    words = ("detect", "cells", "--checkpoint", "run")
    assert "--table cells/0.png: is an input" in command(*words, "--table", "cells/0.png").err
    assert Path("cells/0.png").read_bytes() == before
    same = command(*words, "--out", "a.csv", "--table", "./a.csv")
    assert "--table a.csv: is the output of --out too" in same.err
    assert "--table no/a.csv: there is no folder" in command(*words, "--table", "no/a.csv").err


@pytest.mark.parametrize(
    ("metadata", "size"),
    [
        ({"PhysicalSizeX": 0.25, "PhysicalSizeY": 0.5}, (0.25, 0.5)),
        (
            {
                "PhysicalSizeX": 325.0,
                "PhysicalSizeXUnit": "nm",
                "PhysicalSizeY": 1e-3,
                "PhysicalSizeYUnit": "mm",
            },
            (0.325, 1.0),
        ),
        ({"PhysicalSizeX": 0.25}, None),
        (
            {"PhysicalSizeX": 1, "PhysicalSizeY": 1}
            | {"PhysicalSizeXUnit": "pixel", "PhysicalSizeYUnit": "pixel"},
            None,
        ),
    ],
)
def test_pixel_size_of_ome(
    tmp_path: Path, metadata: dict[str, Any], size: tuple[float, float] | None
) -> None:
    stack = np.zeros((3, 6, 8), np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", stack, ome=True, metadata={"axes": "TYX", **metadata})
    found = pixel_size(tmp_path / "a.tif" / "2")
    assert found == (None if size is None else pytest.approx(size))
