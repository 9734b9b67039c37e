"""`spairkit detect`: boxes, scores and counts for other programs."""

import csv
import io
import json
import sys
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spairkit.cli import options
from spairkit.cli.console import counted, print_document, say, several
from spairkit.cli.files import image_files
from spairkit.cli.streams import Closed
from spairkit.errors import InputError

if TYPE_CHECKING:
    from spairkit.detections import Detections

_COLUMNS = ("image", "image_id", "x1", "y1", "x2", "y2", "score")
_MASK_COLUMNS = ("area", "intensity")


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
            "jsonl: a line for each image, with appearance embeddings and the count's posterior.",
        ),
    ] = Format.COCO,
    threshold: options.ThresholdOption = 0.5,
    box_contrast: options.BoxContrastOption = None,
    search: options.SearchOption = None,
    count: options.CountOption = None,
    device: options.DeviceOption = options.Device.AUTO,
    quiet: options.QuietOption = False,
) -> None:
    """Find objects in images of any size. Boxes are in pixels from the upper left corner.

    Images are numbered from 1 in the order given, those of a folder in the order of their names. A
    single folder with annotations.json keeps its image ids and its category, as COCO's tools
    expect. Files of a folder that cannot be read are skipped.
    """
    from spairkit.counts import CountPosterior
    from spairkit.report.signs import misfit
    from spairkit.storage.durable import write_text

    if out is not None:
        options.check_output(out)
    elif isinstance(sys.stdout, Closed):
        raise InputError("standard output is closed; name a file with --out")
    files = image_files(paths)  # a file that is no image shows before any work
    if out is not None and out.exists() and any(out.samefile(path) for path in files.paths):
        raise InputError(f"--out {out}: is one of the images; name another file")
    detector = options.open_detector(checkpoint, device, box_contrast, search)
    category = next(iter(files.categories), 1)
    if format_ is Format.COCO and len(files.categories) > 1:
        say(
            f"the annotations have {len(files.categories)} categories: results have the first, "
            f"{category}; compare them with useCats = 0"
        )
    many = detector.detect_many(
        files.paths, threshold=threshold, count=count, on_unreadable=files.skip
    )
    rows: list[str] = []
    has_masks, objects, images = False, 0, 0
    unfit: list[str] = []
    posteriors: list[CountPosterior] = []
    numbered = zip(files.paths, files.numbers, strict=True)
    with counted("images", len(files.paths), quiet=quiet) as show_done:
        detector.on_progress = show_done.search
        for detections in many:
            path, number = next(pair for pair in numbered if pair[0] is detections.image)
            # masks are not kept
            rows += _rows(str(path), number, detections, format_, category)
            has_masks |= detections.label_image is not None
            objects += len(detections)
            images += 1
            if reason := misfit(detector, detections):
                unfit.append(f"{path}: {reason}")
            posteriors += [] if detections.counts is None else [detections.counts]
            show_done(images)
    files.say_skipped()
    options.say_unfit(unfit, images)
    text = _text(rows, format_, has_masks)
    expected = f" ({CountPosterior.total(posteriors)})" if len(posteriors) == images else ""
    summary = f"{several(objects, 'object')} in {several(images, 'image')}{expected}"
    if out is None:
        print_document(text)
        if not quiet:
            say(summary)
        return
    write_text(out, text)
    say(f"wrote {out}: {summary}")


def _rows(
    name: str, number: int, detections: "Detections", format_: Format, category: int
) -> list[str]:
    """The COCO results, the lines of CSV or the line of JSON of one image, as text."""
    if format_ is Format.COCO:
        return [json.dumps(result) for result in detections.to_coco(number, category)]
    values = detections.to_json()
    if format_ is Format.JSONL:
        return [f"{json.dumps({'image': name, 'image_id': number, **values})}\n"]
    columns = [values["scores"], *(values[name] for name in _MASK_COLUMNS if name in values)]
    boxes = zip(values["boxes"], *columns, strict=True)
    return [_csv_line([name, number, *box, *others]) for box, *others in boxes]


def _text(rows: list[str], format_: Format, has_masks: bool) -> str:
    """The output file."""
    if format_ is Format.COCO:
        return f"[{', '.join(rows)}]\n"
    header = [*_COLUMNS, *(_MASK_COLUMNS if has_masks else ())]
    return "".join([_csv_line(header), *rows] if format_ is Format.CSV else rows)


def _csv_line(values: Iterable[object]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(values)
    return line.getvalue()
