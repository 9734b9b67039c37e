"""The encoder of a SPAIR as a graph for other programs: torch.export (.pt2) or ONNX.

    export(detector, (48, 48), "onnx", Path("model.onnx"))

The graph is for prepared images of one size, in batches of any size. It holds what the encoder
guesses, without the search. docs/export.md has a program that runs it without spairkit.
"""

import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from spairkit import __version__
from spairkit.detector import Detector
from spairkit.errors import InputError
from spairkit.models import cell_scan
from spairkit.models.spair import SPAIR
from spairkit.models.wavefront import even_waves
from spairkit.storage.durable import write_bytes

Format = Literal["pt2", "onnx"]

OUTPUTS = ("boxes", "scores", "embeddings", "depth")
METADATA = "spairkit"
"""Name of the metadata, JSON: a property of an ONNX model, and a file in a .pt2."""

PHASES = 2
"""Of `export`: tracing and converting."""

MAX_SIDE = 4096
"""Of the prepared images of a graph, px."""

_OPSET = 18
"""The last of ONNX in which a loop's `GridSample` has the name of its mode that torch writes."""

_PACKAGES = ("onnx", "onnxscript")


class _Encoder(nn.Module):
    def __init__(self, network: SPAIR) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        boxes, logits, what, depth = cell_scan.scan_cells(self.network, images)
        return boxes, logits.sigmoid(), what, depth


def export(
    detector: Detector,
    size: tuple[int, int],
    format_: Format,
    path: Path,
    *,
    on_phase: Callable[[int, str], None] = lambda done, phase: None,
) -> None:
    """Writes the encoder of a SPAIR as a graph.

    The input is `images` [B, 3, H, W] float32 in [0, 1], prepared as the metadata say. The outputs,
    a row for each cell in raster order, are `boxes` [B, K, 4] xyxy in pixels of the prepared image,
    `scores` [B, K] in [0, 1], `embeddings` [B, K, A] and `depth` [B, K]. Latents are their means.

    Args:
        detector: on the CPU.
        size: height and width of the prepared images, from a cell to `MAX_SIDE` px.
        path: replaced if it exists.
        on_phase: called with the number of phases done, of `PHASES`, and what begins.

    Raises:
        InputError: the network is no SPAIR, the size is out of range, a package is missing, or the
            file cannot be written.
        ValueError: the format is unknown.
    """
    if format_ not in get_args(Format):
        raise ValueError(f"format_ must be pt2 or onnx, got {format_!r}")
    network = detector.network
    if not isinstance(network, SPAIR):
        raise InputError(f"{detector.config.model.kind} cannot be exported; only SPAIR can")
    if not all(network.config.cell <= side <= MAX_SIDE for side in size):
        height, width = size
        raise InputError(
            f"size {height}x{width}: sides must be from {network.config.cell} (a cell) to "
            f"{MAX_SIDE} px; cut larger images into parts"
        )
    require(format_)
    if not cell_scan.has_scan:
        warnings.warn(
            f"torch {torch.__version__} lacks torch._higher_order_ops.scan: the graph repeats the "
            "loop over cells for each wave, so it is larger and takes longer to write",
            RuntimeWarning,
            stacklevel=2,
        )
    text = json.dumps(metadata(detector, size))
    data = io.BytesIO()
    with _quiet():
        on_phase(0, "tracing the network")
        program = traced(network, size)
        on_phase(1, "converting the graph")
        if format_ == "pt2":
            torch.export.save(program, data, extra_files={METADATA: text})
        else:
            converted = torch.onnx.export(
                program,
                input_names=["images"],
                output_names=OUTPUTS,
                opset_version=_OPSET,
                dynamo=True,
                verbose=False,
            )
            assert converted is not None
            model = converted.model_proto
            model.metadata_props.add(key=METADATA, value=text)
            data.write(model.SerializeToString())
    write_bytes(path, data.getvalue())


def require(format_: Format) -> None:
    """Raises InputError if a package that the format needs is missing."""
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if format_ == "onnx" and missing:
        raise InputError(
            f"ONNX needs {' and '.join(missing)}, not installed: run pip install '.[onnx]' in "
            "spairkit's folder"
        )


def metadata(detector: Detector, size: tuple[int, int]) -> dict[str, Any]:
    """What a program has to know to use the graph: sizes, names, and the preparation of images."""
    network = detector.network
    assert isinstance(network, SPAIR)
    rows, columns = network.grid(*size)
    return {
        "spairkit": __version__,
        "height": size[0],
        "width": size[1],
        "rows": rows,
        "columns": columns,
        "cell": network.config.cell,
        "input": "images [B, 3, height, width], RGB, float32 in [0, 1], prepared",
        "outputs": {
            "boxes": "[B, rows * columns, 4] x1, y1, x2, y2 in pixels of the prepared image",
            "scores": "[B, rows * columns] probability of presence; objects have more than 0.5",
            "embeddings": "[B, rows * columns, A] appearance",
            "depth": "[B, rows * columns] lower is nearer",
        },
        "prepare": asdict(detector.config.prepare),
        "search": "not in the graph, which holds the encoder alone; in this run it is "
        f"{detector.config.search.mode!r}",
    }


def traced(network: SPAIR, size: tuple[int, int]) -> torch.export.ExportedProgram:
    """The encoder for images of one size and batches of any, on the CPU: `OUTPUTS` of `images`."""
    network = deepcopy(network).requires_grad_(False)
    del network.decoder  # of no use in the graph
    encoder = _Encoder(network).eval()
    images = torch.zeros(2, 3, *size)
    even_waves(*network.grid(*size))  # fills its cache; see `scan_cells`
    with torch.no_grad():
        batch = {"images": {0: torch.export.Dim.DYNAMIC}}
        program = torch.export.export(encoder, (images,), dynamic_shapes=batch)
    program.example_inputs = None  # or they would be written too
    return program


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch says of its own insides and of packages that are not needed."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
