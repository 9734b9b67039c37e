"""`spairkit detect`: boxes, scores and counts for other programs."""

import csv
import io
import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spairkit.cli import options
from spairkit.cli.console import counted, say, several
from spairkit.errors import InputError

if TYPE_CHECKING:
    from spairkit.detections import Detections


class Format(StrEnum):
    """Formats of the output."""

    COCO = "coco"
    CSV = "csv"
    JSONL = "jsonl"


def detect(
    paths: Annotated[list[Path], typer.Argument(metavar="IMAGE|FOLDER", help="Images or folders.")],
    checkpoint: options.CheckpointOption = None,
    out: Annotated[
        Path | None, options.output_option(help="The file to write. Default: standard output.")
    ] = None,
    format_: Annotated[
        Format,
        options.output_option(
            "--format",
            help="coco: a list of COCO results. csv: a line for each box. "
            "jsonl: a line for each image, with appearance embeddings.",
        ),
    ] = Format.COCO,
    threshold: options.ThresholdOption = 0.5,
    box_contrast: options.BoxContrastOption = None,
    count: options.CountOption = None,
    device: options.DeviceOption = options.Device.AUTO,
    quiet: options.QuietOption = False,
) -> None:
    """Find objects in images of any size. Boxes are in pixels from the upper left corner.

    Images are numbered from 1 in the order given, those of a folder in the order of their names. A
    single folder with annotations.json keeps its image ids, as COCO's tools expect.
    """
    for path in paths:
        if not path.exists():
            raise InputError(f"{path}: no such image or folder")
    if out is not None:
        options.check_output(out)
    files = _files(paths)  # a file that is no image shows before any work
    if out is not None and out.exists() and any(out.samefile(path) for path, _ in files):
        raise InputError(f"--out {out}: is one of the images; name another file")
    detector = options.open_detector(checkpoint, device, box_contrast)
    many = detector.detect_many((path for path, _ in files), threshold=threshold, count=count)
    found: list[tuple[str, int, Detections]] = []
    with counted("images", len(files), quiet=quiet) as show_done:
        for (path, number), detections in zip(files, many, strict=True):
            found.append((str(path), number, detections))
            show_done(len(found))
    text = _text(found, format_)
    if out is None:
        typer.echo(text, nl=False)
        return
    from spairkit.storage.durable import write_text

    write_text(out, text)
    objects = several(sum(len(detections) for _, _, detections in found), "object")
    say(f"wrote {out}: {objects} in {several(len(found), 'image')}")


def _files(paths: list[Path]) -> list[tuple[Path, int]]:
    """The image files, checked, and their ids; a folder's annotations give ids to its files."""
    from spairkit.config import DataConfig
    from spairkit.data.folder import ANNOTATIONS, ImageFolder
    from spairkit.images import image_size, list_images

    if len(paths) == 1 and (paths[0] / ANNOTATIONS).exists():
        return ImageFolder(DataConfig(name="folder", path=str(paths[0])), "test").files()
    files = [file for path in paths for file in (list_images(path) if path.is_dir() else [path])]
    for file in files:
        image_size(file)
    return [(file, number) for number, file in enumerate(files, start=1)]


def _text(found: "list[tuple[str, int, Detections]]", format_: Format) -> str:
    """The output file, from the name, the id and the objects of each image."""
    if format_ is Format.COCO:
        results = [row for _, number, detections in found for row in detections.to_coco(number)]
        return f"{json.dumps(results)}\n"
    if format_ is Format.JSONL:
        return "".join(
            f"{json.dumps({'image': name, 'image_id': number, **detections.to_json()})}\n"
            for name, number, detections in found
        )
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "image_id", "x1", "y1", "x2", "y2", "score"])
    for name, number, detections in found:
        rows = zip(detections.boxes.tolist(), detections.scores.tolist(), strict=True)
        writer.writerows([name, number, *box, score] for box, score in rows)
    return text.getvalue()
