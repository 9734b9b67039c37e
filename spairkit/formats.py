"""The objects of one image as a file of another tool: GeoJSON, YOLO, ImageJ's ROIs, a label image.

Objects are drawn as the polygons of their masks, and as boxes if they have none. docs/formats.md
says which file is for which tool.
"""

import io
import json
import zipfile
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor

from spairkit.errors import InputError
from spairkit.polygons import Polygon, polygons

SUFFIXES = {"rois": ".zip", "geojson": ".geojson", "yolo": ".txt", "labels": ".tif"}
"""The suffix of each format's files."""

_MAX_16_BITS = 65535
_MOVE, _LINE, _CLOSE = 0, 1, 4  # of ImageJ's paths
_DATE = (1980, 1, 1, 0, 0, 0)  # of the files in a ZIP, so that equal objects make equal bytes

Masks = tuple[Tensor, Tensor]
"""A label image [H, W] int32, and the label [n] int32 of each object, from 1."""


def require(format_: str) -> None:
    """Raises InputError if a package that the format needs is missing."""
    if format_ == "rois":
        try:
            import roifile  # noqa: F401
        except ModuleNotFoundError:
            raise InputError(
                "ImageJ's ROIs need roifile, which is not installed: run pip install "
                "'.[formats]' in spairkit's folder"
            ) from None


def geojson(
    boxes: Tensor,  # [n, 4] xyxy, px
    scores: Tensor,  # [n]
    masks: Masks | None,
) -> dict[str, Any]:
    """A FeatureCollection with a detection of QuPath for each object; its score is a measurement.

    Coordinates are pixels from the upper left corner. The geometry is a Polygon, or a MultiPolygon
    of a mask in pieces.
    """
    features = []
    for box, score, pieces in _objects(boxes, scores, masks):
        if pieces:
            parts = [[_closed(ring.tolist()) for ring in piece] for piece in pieces]
        else:
            x1, y1, x2, y2 = box
            parts = [[_closed([[x1, y1], [x2, y1], [x2, y2], [x1, y2]])]]
        geometry = (
            {"type": "Polygon", "coordinates": parts[0]}
            if len(parts) == 1
            else {"type": "MultiPolygon", "coordinates": parts}
        )
        properties = {"objectType": "detection", "measurements": {"score": score}}
        features.append({"type": "Feature", "geometry": geometry, "properties": properties})
    return {"type": "FeatureCollection", "features": features}


def geojson_file(boxes: Tensor, scores: Tensor, masks: Masks | None) -> bytes:
    """`geojson` as a file."""
    return f"{json.dumps(geojson(boxes, scores, masks))}\n".encode()


def yolo(
    boxes: Tensor,  # [n, 4] xyxy, px
    scores: Tensor,  # [n]
    size: tuple[int, int],
) -> str:
    """A line for each object: class 0, x and y of the centre, width, height, score.

    Boxes are clipped to the image, and in shares of its width and height. One that lies outside
    has no line.

    Args:
        size: height and width of the image, px.
    """
    height, width = size
    corners = boxes.double().numpy().reshape(-1, 4) / (width, height, width, height)
    x1, y1, x2, y2 = corners.clip(0, 1).T
    columns = [(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1, scores.double().numpy()]
    inside = (x2 > x1) & (y2 > y1)
    rows = np.stack(columns, axis=1)[inside].tolist()
    return "".join(f"0 {' '.join(f'{value:.7g}' for value in row)}\n" for row in rows)


def rois(boxes: Tensor, scores: Tensor, masks: Masks | None) -> bytes:
    """A ZIP with a ROI of ImageJ for each object, numbered from 1; its score is a property.

    A mask is a traced outline or, with holes or in pieces, a composite; a box is a rectangle.
    Equal objects make equal bytes.

    Raises:
        InputError: the package roifile is missing.
    """
    require("rois")
    data = io.BytesIO()
    digits = max(4, len(str(len(boxes))))
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        objects = enumerate(_objects(boxes, scores, masks), start=1)
        for number, (box, score, pieces) in objects:
            name = f"{number:0{digits}}"
            roi = _roi(pieces, box)
            roi.name, roi.props = name, f"score: {score:.6g}\n"
            entry = zipfile.ZipInfo(f"{name}.roi", _DATE)
            archive.writestr(entry, roi.tobytes(), zipfile.ZIP_DEFLATED)
    return data.getvalue()


def label_tiff(masks: Tensor, objects: int) -> bytes:  # [H, W] int32
    """A TIFF of the numbers of the objects, 0 on the background.

    Of 16 bits, or of 32 for more than 65,535 objects; compressed by deflate.
    """
    from tifffile import imwrite  # only where one is written: a broken tifffile stops nothing else

    data = io.BytesIO()
    pixels = masks.numpy().astype(np.uint16 if objects <= _MAX_16_BITS else np.uint32)
    imwrite(data, pixels, photometric="minisblack", compression="zlib", metadata=None)
    return data.getvalue()


def _objects(
    boxes: Tensor, scores: Tensor, masks: Masks | None
) -> Iterator[tuple[list[float], float, list[Polygon]]]:
    """Box, score and polygons of each object."""
    drawn = [[] for _ in boxes] if masks is None else polygons(*masks)
    return zip(boxes.tolist(), scores.tolist(), drawn, strict=True)


def _closed(points: list[list[float]]) -> list[list[float]]:
    return [*points, points[0]]


def _roi(pieces: list[Polygon], box: list[float]) -> Any:
    from roifile import ROI_OPTIONS, ROI_TYPE, ImagejRoi

    if not pieces:
        x1, y1, x2, y2 = box
        return ImagejRoi(
            roitype=ROI_TYPE.RECT,
            options=ROI_OPTIONS.SUB_PIXEL_RESOLUTION,
            left=round(x1),
            top=round(y1),
            right=round(x2),
            bottom=round(y2),
            xd=x1,
            yd=y1,
            widthd=x2 - x1,
            heightd=y2 - y1,
        )
    rings = [ring for piece in pieces for ring in piece]
    if len(rings) == 1:
        roi = ImagejRoi.frompoints(rings[0], name="")  # of subpixels where int16 is too short
        roi.roitype = ROI_TYPE.TRACED
        roi.right, roi.bottom = roi.right - 1, roi.bottom - 1  # the corner, not the pixel beyond
        return roi
    path: list[float] = []
    for ring in rings:
        for point, xy in enumerate(ring.tolist()):
            path += [_LINE if point else _MOVE, *xy]
        path.append(_CLOSE)
    corners = np.concatenate(rings)
    (left, top), (right, bottom) = corners.min(0).tolist(), corners.max(0).tolist()
    return ImagejRoi(
        roitype=ROI_TYPE.RECT,
        left=left,
        top=top,
        right=right,
        bottom=bottom,
        shape_roi_size=len(path),
        multi_coordinates=np.array(path, np.float32),
    )
