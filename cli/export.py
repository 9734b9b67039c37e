"""`spairkit export`: a network for other programs."""

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from spairkit.cli import options
from spairkit.cli.console import counted, say
from spairkit.cli.files import check_output
from spairkit.errors import InputError


class Format(StrEnum):
    """Formats of a graph."""

    PT2 = "pt2"
    ONNX = "onnx"


def export(
    run: Annotated[
        Path | None,
        typer.Argument(help="A run or a checkpoint. Default: the newest run, or the packaged one."),
    ] = None,
    out: Annotated[
        Path | None,
        options.output_option(help="The new file. Default: model.pt2 or model.onnx."),
    ] = None,
    format_: Annotated[
        Format | None,
        options.output_option(
            "--format",
            help="pt2: torch.export. onnx: ONNX (extra onnx). Default: by --out, or pt2.",
        ),
    ] = None,
    size: Annotated[
        str | None,
        options.model_option(
            metavar="HxW",
            help="Height and width of prepared images, px. Default: those of the training.",
        ),
    ] = None,
) -> None:
    """Write the network of a SPAIR as a graph, for programs without spairkit.

    The graph has the encoder alone: boxes, scores, embeddings and depths of all cells, for prepared
    images of one size. The search that detect makes is not in it, nor are masks.
    """
    if format_ is None:
        ending = out.suffix.removeprefix(".") if out else Format.PT2
        if ending not in list(Format):
            raise InputError(
                f"--out {out}: a graph ends in .pt2 or .onnx; name one of them, or give --format"
            )
        format_ = Format(ending)
    path = out or Path(f"model.{format_}")
    check_output(path)
    if path.exists():
        raise InputError(f"{path} already exists; name a new file with --out")
    sides = _sides(size) if size else None
    from spairkit.export import PHASES, metadata
    from spairkit.export import export as write_graph

    detector, _ = options.open_detector(run, options.Device.CPU, None, options.Search.OFF)
    data = detector.config.data
    sides = sides or (data.image_height, data.image_width)
    with counted("tracing the network", PHASES, quiet=False) as show_done:
        write_graph(detector, sides, format_.value, path, on_phase=show_done)
    facts = metadata(detector, sides)
    say(
        f"wrote {path}: images [B, 3, {sides[0]}, {sides[1]}] to boxes, scores, embeddings and "
        f"depths of {facts['rows'] * facts['columns']} cells"
    )
    say("the graph is the encoder alone, without search, masks and the preparation of images")


def _sides(text: str) -> tuple[int, int]:
    sides = re.fullmatch(r"([0-9]{1,9})x([0-9]{1,9})", text)
    if sides is None:
        raise InputError(f"--size {text}: give height and width in pixels, as 48x64")
    return int(sides[1]), int(sides[2])
