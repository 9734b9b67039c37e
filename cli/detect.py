"""`spairkit detect`: boxes, scores and counts for other programs."""

import json
import sys
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spairkit import __version__
from spairkit.cli import options
from spairkit.cli.console import counted, csv_line, print_document, say, several
from spairkit.cli.detect_files import files_of_images, folders_of
from spairkit.cli.detect_table import measured, table_text
from spairkit.cli.files import ImageFiles, check_outputs, image_files, refuse_input
from spairkit.cli.partial import Finished, Partial, partial_of
from spairkit.cli.streams import Closed
from spairkit.errors import InputError

if TYPE_CHECKING:
    from spairkit.detections import Detections
    from spairkit.detector import Detector
    from spairkit.storage.checkpoints import Checkpoint

_COLUMNS = ("image", "image_id", "x1", "y1", "x2", "y2", "score")
_MASK_COLUMNS = ("area", "intensity")


class Format(StrEnum):
    """Formats of the output."""

    COCO = "coco"
    CSV = "csv"
    JSONL = "jsonl"
    ROIS = "rois"
    GEOJSON = "geojson"
    YOLO = "yolo"
    LABELS = "labels"


def detect(
    paths: Annotated[list[Path], typer.Argument(metavar="IMAGE|FOLDER", help="Images or folders.")],
    checkpoint: options.CheckpointOption = None,
    out: Annotated[
        Path | None,
        options.output_option(
            help="The file to write; of rois, geojson, yolo and labels the folder. Default: "
            "standard output, or nothing with --table or --annotated."
        ),
    ] = None,
    format_: Annotated[
        Format,
        options.output_option(
            "--format",
            help="coco: a list of COCO results. csv: a line for each box. "
            "jsonl: a line for each image, with appearance embeddings and the count's posterior. "
            "A file for each image: rois: a ZIP for ImageJ. geojson: for QuPath. yolo: text. "
            "labels: a TIFF, each pixel the number of its object.",
        ),
    ] = Format.COCO,
    table: Annotated[
        Path | None,
        options.output_option(
            metavar="FILE",
            help="Also write measurements as CSV, a row for each object: size, shape, intensities, "
            "cluster.",
        ),
    ] = None,
    annotated: Annotated[
        Path | None,
        options.output_option(
            metavar="FOLDER", help="Also draw each image with its objects, as PNG."
        ),
    ] = None,
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
    expect. Files of a folder that cannot be read are skipped. The output is whole or absent: until
    all images are done, results are kept in OUT.partial (without --out, beside the table), and the
    same command goes on after a kill.
    """
    from spairkit.counts import CountPosterior
    from spairkit.storage.durable import write_text

    folders = folders_of(format_.value, out, annotated)
    outputs = {"--out": out, "--table": table}
    written = {
        option: path
        for option, path in outputs.items()
        if path is not None and option not in folders
    }
    check_outputs(written, {option: folder for option, (folder, _) in folders.items()})
    if not (written or folders) and isinstance(sys.stdout, Closed):
        raise InputError("standard output is closed; name a file with --out")
    files = image_files(paths)  # a file that is no image shows before any work
    for option, path in written.items():
        refuse_input(path, files.inputs, option)
    each = files_of_images(paths, files, folders)
    detector, loaded = options.open_detector(
        checkpoint, device, box_contrast, search, refuse_failed=True
    )
    for option, path in written.items():
        refuse_input(path, loaded.files, option)
    category = next(iter(files.categories), 1)
    if format_ is Format.COCO and len(files.categories) > 1:
        say(
            f"the annotations have {len(files.categories)} categories: results have the first, "
            f"{category}; compare them with useCats = 0"
        )
    key = {
        **settings_of(detector, loaded, threshold, count),
        "format": format_.value,
        "category": category,
        "table": table is not None,
        "annotated": annotated is not None,
    }

    def rows(path: Path, number: int, detections: "Detections") -> list[str]:
        each.write(path, detections)  # before the image counts as finished
        return _rows(str(path), number, detections, format_, category)

    def measure(detections: "Detections") -> str:
        return "" if table is None else measured(detections)

    with partial_of(out or table or annotated, key) as partial:
        each.forget_lost(partial)
        detect_images(
            files, detector, partial, threshold, count, rows=rows, measure=measure, quiet=quiet
        )
        found = [partial.finished[n] for n in files.numbers if n in partial.finished]
        text = _text(found, format_)
        if table is not None:
            write_text(table, table_text(found))
        if "--out" in written:
            write_text(written["--out"], text)
    options.say_unfit([f"{item.name}: {item.misfit}" for item in found if item.misfit], len(found))
    posteriors = [counts for item in found if (counts := item.counts())]
    expected = f" ({CountPosterior.total(posteriors)})" if len(posteriors) == len(found) else ""
    objects = several(sum(item.objects for item in found), "object")
    summary = f"{objects} in {several(len(found), 'image')}{expected}"
    if named := [str(path) for path in (out, table, annotated) if path is not None]:
        say(f"wrote {' and '.join(named)}: {summary}")
    else:
        print_document(text)
        if not quiet:
            say(summary)
    files.conclude()


def settings_of(
    detector: "Detector", loaded: "Checkpoint", threshold: float, count: int | None
) -> dict[str, Any]:
    """What the objects depend on besides the images: the key of a partial result."""
    return {
        "version": __version__,
        "checkpoint": loaded.sha256,
        "search": detector.search,
        "box_contrast": detector.box_contrast,
        "threshold": threshold,
        "count": count,
        "device": detector.device.type,
    }


def detect_images(
    files: ImageFiles,
    detector: "Detector",
    partial: Partial,
    threshold: float,
    count: int | None,
    *,
    rows: Callable[[Path, int, "Detections"], list[str]] = lambda *_: [],
    measure: Callable[["Detections"], str] = lambda _: "",
    quiet: bool,
) -> None:
    """Finds the objects of the images that are not finished, and adds them to `partial`."""
    from spairkit.data.files import sha256_of
    from spairkit.report.signs import misfit

    left: list[tuple[Path, int]] = []
    for path, number in zip(files.paths, files.numbers, strict=True):
        before = partial.finished.pop(number, None)
        if before is not None and (before.name, before.sha256) == (str(path), sha256_of(path)):
            partial.finished[number] = before
        else:
            left.append((path, number))
    done = len(files.paths) - len(left)
    if done:
        say(f"{several(done, 'image')} finished before, {len(left)} left")
    batch: list[Finished] = []

    def sources() -> Iterator[Path]:
        for path, _ in left:
            # the next image is asked for when a batch is over, and never in the middle of one
            partial.add(batch)
            batch.clear()
            yield path

    many = detector.detect_many(
        sources(), threshold=threshold, count=count, on_unreadable=files.skip
    )
    numbered = iter(left)
    with counted("images", len(files.paths), quiet=quiet) as show_done:
        detector.on_progress = show_done.search
        for detections in many:
            path, number = next(pair for pair in numbered if pair[0] is detections.image)
            counts = detections.counts
            batch.append(
                Finished(
                    name=str(path),
                    number=number,
                    sha256=sha256_of(path),
                    rows=rows(path, number, detections),
                    objects=len(detections),
                    has_masks=detections.label_image is not None,
                    least_count=None if counts is None else counts.least,
                    count_probabilities=[] if counts is None else counts.probabilities.tolist(),
                    count_is_shared=counts is not None and counts.is_shared,
                    misfit=misfit(detector, detections),
                    measured=measure(detections),
                )
            )
            done += 1
            show_done(done)
    partial.add(batch)


def _rows(
    name: str, number: int, detections: "Detections", format_: Format, category: int
) -> list[str]:
    """The COCO results, the lines of CSV or the line of JSON of one image, as text."""
    if format_ is Format.COCO:
        return [json.dumps(result) for result in detections.to_coco(number, category)]
    if format_ not in (Format.CSV, Format.JSONL):
        return []  # it has a file of its own
    values = detections.to_json()
    if format_ is Format.JSONL:
        return [f"{json.dumps({'image': name, 'image_id': number, **values})}\n"]
    columns = [values["scores"], *(values[name] for name in _MASK_COLUMNS if name in values)]
    boxes = zip(values["boxes"], *columns, strict=True)
    return [csv_line([name, number, *box, *others]) for box, *others in boxes]


def _text(found: list[Finished], format_: Format) -> str:
    """The output file."""
    rows = [row for item in found for row in item.rows]
    if format_ is Format.COCO:
        return f"[{', '.join(rows)}]\n"
    has_masks = any(item.has_masks for item in found)
    header = [*_COLUMNS, *(_MASK_COLUMNS if has_masks else ())]
    return "".join([csv_line(header), *rows] if format_ is Format.CSV else rows)
