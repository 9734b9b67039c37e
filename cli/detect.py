"""`spairkit detect`: boxes, scores and counts for other programs."""

import csv
import io
import json
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spairkit.cli.console import counted, say, several
from spairkit.cli.options import (
    BoxContrastOption,
    CheckpointOption,
    CountOption,
    Device,
    DeviceOption,
    QuietOption,
    ThresholdOption,
    check_output,
    choose_checkpoint,
    choose_device,
    told_counts,
    with_box_contrast,
)
from spairkit.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from spairkit.detections import Detections


class Format(StrEnum):
    """How the boxes are written."""

    COCO = "coco"
    CSV = "csv"
    JSONL = "jsonl"


def detect(
    paths: Annotated[list[Path], typer.Argument(metavar="IMAGE|FOLDER...", help="What to read.")],
    checkpoint: CheckpointOption = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="The file to write or replace, else standard output."),
    ] = None,
    format_: Annotated[
        Format,
        typer.Option(
            "--format",
            help="coco: a list of COCO results. csv: a line for each box. "
            "jsonl: a line for each image, with appearance codes.",
        ),
    ] = Format.COCO,
    threshold: ThresholdOption = 0.5,
    box_contrast: BoxContrastOption = None,
    count: CountOption = None,
    device: DeviceOption = Device.AUTO,
    quiet: QuietOption = False,
) -> None:
    """Find objects in images of any size. Boxes are pixels from the upper left corner.

    Images are numbered from 1 as they come, a folder's by name.

    Those of a single folder with annotations.json have its ids, as COCO's tools expect.
    """
    for path in paths:
        if not path.exists():
            raise InputError(f"{path}: no such image or folder")
    if out is not None:
        check_output(out)
    from spairkit.images import stretched
    from spairkit.models.loading import from_checkpoint
    from spairkit.storage.checkpoints import load_checkpoint

    images = _images(paths)  # one that is no picture shows before any work
    chosen = choose_device(device)
    loaded = with_box_contrast(load_checkpoint(choose_checkpoint(checkpoint)), box_contrast)
    detector = from_checkpoint(loaded, chosen)
    counts, data = told_counts(count, detector.config), loaded.config.data
    found: list[tuple[str, int, Detections]] = []
    with counted("images", None, quiet=quiet) as show_done:
        for name, number, image in images:
            batch = stretched(image, black=data.black, white=data.white)[None].to(chosen)
            found.append((name, number, detector.detect(batch, threshold, counts=counts)[0]))
            show_done(len(found))
    text = _WRITERS[format_](found)
    if out is None:
        typer.echo(text, nl=False)
        return
    from spairkit.storage.durable import write_text

    write_text(out, text)
    objects = several(sum(len(detections) for _, _, detections in found), "object")
    say(f"wrote {out}: {objects} in {several(len(found), 'image')}")


def _images(paths: list[Path]) -> "Iterator[tuple[str, int, Tensor]]":
    """Name, id and pixels of each image. What is no picture is refused before the first is read.

    Raises:
        InputError: a folder has no picture in it, a file is none, or annotations are wrong.
    """
    from spairkit.images import image_size, list_images, read_image

    if len(paths) == 1 and (paths[0] / "annotations.json").exists():
        return _annotated(paths[0])
    files = [file for path in paths for file in (list_images(path) if path.is_dir() else [path])]
    for file in files:
        image_size(file)
    return ((str(file), number, read_image(file)) for number, file in enumerate(files, start=1))


def _annotated(folder: Path) -> "Iterator[tuple[str, int, Tensor]]":
    from spairkit.config import DataConfig
    from spairkit.data.folder import ImageFolder

    images = ImageFolder(DataConfig(name="folder", path=str(folder)), "test")
    return ((str(folder / name), number, image) for name, number, image, _ in images.images())


def _coco(found: "list[tuple[str, int, Detections]]") -> str:
    rows = [row for _, number, detections in found for row in detections.to_coco(number)]
    return f"{json.dumps(rows)}\n"


def _csv(found: "list[tuple[str, int, Detections]]") -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "image_id", "x1", "y1", "x2", "y2", "score"])
    for name, number, detections in found:
        rows = zip(detections.boxes.tolist(), detections.scores.tolist(), strict=True)
        writer.writerows([name, number, *box, score] for box, score in rows)
    return text.getvalue()


def _jsonl(found: "list[tuple[str, int, Detections]]") -> str:
    return "".join(
        f"{json.dumps({'image': name, 'image_id': number, **detections.to_json()})}\n"
        for name, number, detections in found
    )


_WRITERS = {Format.COCO: _coco, Format.CSV: _csv, Format.JSONL: _jsonl}
