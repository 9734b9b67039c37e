"""`spairkit detect`: boxes, scores and counts for other programs."""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from spairkit.cli import options
from spairkit.cli.console import csv_line, print_document, say, several
from spairkit.cli.detect_files import files_of_images, folders_of, write_files
from spairkit.cli.detect_parts import (
    PathsArgument,
    SchedulerOption,
    ShardOption,
    Where,
    WorkersOption,
    do_parts,
    job_of,
    opened,
    parts_of,
    settings_of,
)
from spairkit.cli.detect_table import measured, table_text
from spairkit.cli.files import check_outputs, local_or_remote_files
from spairkit.cli.streams import Closed
from spairkit.errors import InputError

if TYPE_CHECKING:
    from spairkit.detections import Detections
    from spairkit.parts.kept import KeptParts
    from spairkit.parts.plan import Found, Item, Part

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


_BY_SUFFIX = {".csv": Format.CSV, ".jsonl": Format.JSONL}


def detect(
    paths: PathsArgument,
    checkpoint: options.CheckpointOption = None,
    out: Annotated[
        Path | None,
        options.output_option(
            help="The file to write; of rois, geojson, yolo and labels the folder. Default: "
            "standard output, or nothing with --table or --annotated."
        ),
    ] = None,
    chosen_format: Annotated[
        Format | None,
        options.output_option(
            "--format",
            help="coco: a list of COCO results. csv: a line for each box. "
            "jsonl: a line for each image, with appearance embeddings and the count's posterior. "
            "A file for each image: rois: a ZIP for ImageJ. geojson: for QuPath. yolo: text. "
            "labels: a TIFF, each pixel the number of its object. Default: csv or jsonl if OUT "
            "ends so, else coco.",
        ),
    ] = None,
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
    workers: WorkersOption = 1,
    shard: ShardOption = None,
    scheduler: SchedulerOption = None,
    quiet: options.QuietOption = False,
) -> None:
    """Find objects in images of any size. Boxes are in pixels from the upper left corner.

    Images are numbered from 1 in the order given, those of a folder in the order of their names. A
    single folder with annotations.json keeps its image ids and its category, as COCO's tools
    expect. Files of a folder that cannot be read are skipped. The output is whole or absent: until
    all images are done, results are kept in OUT.parts (without --out, beside the table), and the
    same command goes on after a kill.
    """
    from spairkit.counts import CountPosterior
    from spairkit.parts.kept import kept_parts
    from spairkit.storage.durable import write_text, write_texts

    format_ = chosen_format or _BY_SUFFIX.get(out.suffix.lower() if out else "", Format.COCO)
    main_output = out or table or annotated
    where = Where(workers, shard, scheduler)
    where.check(main_output)
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
    files = local_or_remote_files(paths)  # a file that is no image shows before any work
    each = files_of_images([Path(word) for word in paths], files, folders)
    detector, loaded = opened(files, written, checkpoint, device, box_contrast, search)
    category = next(iter(files.categories), 1)
    if format_ is Format.COCO and len(files.categories) > 1:
        say(
            f"the annotations have {len(files.categories)} categories: results have the first, "
            f"{category}; compare them with useCats = 0"
        )
    describe = _Described(format_, category, table is not None)
    parts = parts_of(files, each.by_name())
    job = job_of(detector, loaded, threshold, count, describe, parts, where)
    settings = settings_of(job, **asdict(describe))
    files_written = [*written.values(), *each.paths()]
    with kept_parts(main_output, settings, files_written, shared=shard is not None) as kept:
        found = do_parts(files, parts, kept, job, detector, where, quiet=quiet)
        if shard is not None:
            say(f"shard {shard}: {several(len(found), 'image')} finished, kept in {kept.folder}")
            return
        text = ""
        if table is not None:
            write_text(table, table_text(found))
        if "--out" in written:
            write_texts(written["--out"], _texts(parts, kept, found, format_))
        elif main_output is None:
            text = "".join(_texts(parts, kept, found, format_))
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


@dataclass(frozen=True)
class _Described:
    """Gives the rows and measurements of an image, and writes its files; see `Describe`."""

    format: Format
    category: int
    table: bool

    def __call__(self, item: "Item", detections: "Detections") -> tuple[list[str], str]:
        write_files(item, detections)
        rows = _rows(item.name, item.number, detections, self.format, self.category)
        return rows, measured(detections) if self.table else ""


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


def _texts(
    parts: "list[Part]", kept: "KeptParts", found: "list[Found]", format_: Format
) -> Iterator[str]:
    """The output file, part by part."""
    rows = (row for part in parts for item in kept[part].found for row in item.rows)
    if format_ is Format.COCO:
        yield "["
        for index, row in enumerate(rows):
            yield f", {row}" if index else row
        yield "]\n"
        return
    if format_ is Format.CSV:
        has_masks = any(item.has_masks for item in found)
        yield csv_line([*_COLUMNS, *(_MASK_COLUMNS if has_masks else ())])
    yield from rows
