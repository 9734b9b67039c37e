"""`spairkit count`: the number of objects in each image, and in all."""

import sys
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from spairkit.cli import options
from spairkit.cli.console import (
    csv_line,
    json_text,
    print_document,
    results,
    say,
    several,
    table_of,
)
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
from spairkit.cli.files import check_outputs, local_or_remote_files
from spairkit.cli.streams import Closed
from spairkit.errors import InputError

if TYPE_CHECKING:
    from spairkit.detections import Detections
    from spairkit.parts.plan import Found, Item

_COLUMNS = ("image", "count", "expected", "low", "high", "warning")


class Format(StrEnum):
    """Formats of the output for programs."""

    CSV = "csv"
    JSON = "json"


def count_objects(
    paths: PathsArgument,
    checkpoint: options.CheckpointOption = None,
    out: Annotated[
        Path | None, options.output_option(help="The file to write. Default: standard output.")
    ] = None,
    format_: Annotated[
        Format | None,
        options.output_option("--format", help="Default: csv with --out, else a table to read."),
    ] = None,
    chart: Annotated[
        Path | None,
        options.output_option(
            metavar="FILE.svg", help="Also draw how many images have how many objects."
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
    """Count the objects in images of any size: a row for each image, and the total.

    Count is the number of objects found. With a search, expected is the mean of the count's
    posterior, and low and high are the ends of its 90 % interval. Files of a folder that cannot be
    read are skipped, and are not in the total. With --out, the same command goes on after a kill.
    """
    from spairkit.parts.kept import kept_parts
    from spairkit.storage.durable import write_text

    where = Where(workers, shard, scheduler)
    where.check(out)
    outputs = {"--out": out, "--chart": chart}
    written = {option: path for option, path in outputs.items() if path is not None}
    check_outputs(written)
    if out is None and isinstance(sys.stdout, Closed):
        raise InputError("standard output is closed; name a file with --out")
    if chart is not None and chart.suffix.lower() != ".svg":
        raise InputError(f"--chart {chart}: is drawn as SVG; name a file that ends in .svg")
    files = local_or_remote_files(paths)
    detector, loaded = opened(files, written, checkpoint, device, box_contrast, search)
    parts = parts_of(files, {})
    job = job_of(detector, loaded, threshold, count, _Counted(), parts, where)
    settings = settings_of(job, command="count")
    with kept_parts(out, settings, written.values(), shared=shard is not None) as kept:
        found = do_parts(files, parts, kept, job, detector, where, quiet=quiet)
        if shard is not None:
            say(f"shard {shard}: {several(len(found), 'image')} finished, kept in {kept.folder}")
            return
        rows, total = _rows(found)
        if format_ is Format.JSON:
            text = f"{json_text({'images': rows, 'total': total, 'skipped': files.skipped})}\n"
        else:
            lines = [[row[name] for name in _COLUMNS] for row in (*rows, total)]
            text = "".join(map(csv_line, [_COLUMNS, *lines]))
        if chart is not None:
            from spairkit.report.curves import histogram

            counts = [item.objects for item in found]
            write_text(chart, histogram(counts, x_label="objects in an image", y_label="images"))
        if out is not None:
            write_text(out, text)
    options.say_unfit([f"{item.name}: {item.misfit}" for item in found if item.misfit], len(found))
    if out is None and format_ is None:
        _print_table([*rows, total])
    elif out is None:
        print_document(text)
    if written:
        names = " and ".join(map(str, written.values()))
        say(f"wrote {names}: {several(total['count'], 'object')} in {several(len(found), 'image')}")
    files.conclude()


@dataclass(frozen=True)
class _Counted:
    """A `Describe` of images of which only the count matters."""

    def __call__(self, item: "Item", detections: "Detections") -> tuple[list[str], str]:
        return [], ""


def _rows(found: "list[Found]") -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The row of each image, and that of all; None is what is not known."""
    from spairkit.counts import CountPosterior

    def row(name: str, objects: int, counts: CountPosterior | None) -> dict[str, Any]:
        low, high = (None, None) if counts is None else counts.interval()
        mean = None if counts is None else round(counts.mean, 4)
        return {"image": name, "count": objects, "expected": mean, "low": low, "high": high}

    posteriors = [item.counts() for item in found]
    rows = [
        {**row(item.name, item.objects, counts), "warning": item.misfit}
        for item, counts in zip(found, posteriors, strict=True)
    ]
    known = [counts for counts in posteriors if counts is not None]
    together = CountPosterior.total(known) if len(known) == len(found) else None
    total = row("total", sum(item.objects for item in found), together)
    return rows, {**total, "warning": None}


def _print_table(rows: list[dict[str, Any]]) -> None:
    from rich.text import Text

    from spairkit.names import printable

    table = table_of(("count", "expected", "90 %", "warning"), first="image")
    for row in rows:
        known = row["expected"] is not None
        mean = f"{row['expected']:.1f}" if known else "-"
        interval = f"{row['low']} to {row['high']}" if known else "-"
        if row is rows[-1]:
            table.add_section()
        # a name is text and no markup
        name = Text(printable(row["image"]), overflow="fold")
        table.add_row(name, str(row["count"]), mean, interval, row["warning"] or "")
    results().print(table)
