"""The images of `detect`, `count` and `track` by parts: here, in processes or on a cluster."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spairkit import __version__
from spairkit.cli import options
from spairkit.cli.console import Counter, counted, say, several
from spairkit.cli.files import ImageFiles, refuse_input
from spairkit.errors import ImageFileError, InputError

if TYPE_CHECKING:
    from spairkit.detector import Detector
    from spairkit.parts.kept import KeptParts
    from spairkit.parts.plan import Found, Part, Result
    from spairkit.parts.work import Describe, Job
    from spairkit.storage.checkpoints import Checkpoint


def _shard(text: str | None) -> str | None:
    if text is None or ((place := _shard_of(text)) and 1 <= place[0] <= place[1]):
        return text
    raise typer.BadParameter(f"must be I/N, such as 2/8 for the second of eight (got {text})")


def _shard_of(text: str) -> tuple[int, int] | None:
    match = re.fullmatch(r"(\d{1,7})/(\d{1,7})", text, re.ASCII)
    return (int(match[1]), int(match[2])) if match else None


PathsArgument = Annotated[
    list[str],
    typer.Argument(metavar="IMAGE|FOLDER|URL", help="Images or folders, or URLs of them."),
]
WorkersOption = Annotated[
    int,
    options.machine_option(
        min=1, max=1024, help="Number of processes on this machine, a CPU thread or a GPU each."
    ),
]
ShardOption = Annotated[
    str | None,
    options.machine_option(
        metavar="I/N",
        callback=_shard,
        help="Do the I-th of N shares of the images, and write no output: for N processes that see "
        "the same folder. The same command without it then writes the output.",
    ),
]
SchedulerOption = Annotated[
    str | None,
    options.machine_option(
        metavar="ADDRESS", help="Let the workers of a Dask cluster do the work: tcp://HOST:PORT."
    ),
]


@dataclass(frozen=True)
class Where:
    """Which processes do which parts."""

    workers: int = 1
    shard: str | None = None
    scheduler: str | None = None

    def check(self, out: Path | None) -> None:
        """Raises InputError if options exclude each other, or a shard has nothing to keep."""
        if self.scheduler is not None and (self.workers > 1 or self.shard is not None):
            raise InputError(
                "--scheduler uses the workers of the cluster; remove --workers and --shard"
            )
        if self.shard is not None and out is None:
            raise InputError("--shard keeps its results beside the output; name it, with --out")

    def share_of(self, parts: "Sequence[Part]") -> "list[Part]":
        """The parts of this shard; all without one."""
        place = None if self.shard is None else _shard_of(self.shard)
        return list(parts if place is None else parts[place[0] - 1 :: place[1]])


def opened(
    files: ImageFiles,
    written: Mapping[str, Path],
    checkpoint: Path | None,
    device: options.Device,
    box_contrast: float | None,
    search: options.Search | None,
) -> "tuple[Detector, Checkpoint]":
    """The detector, and its checkpoint; ends with status 3 if its training failed.

    Args:
        files: the images.
        written: the output files by option, none of which may be an image or a file of the
            checkpoint.
        checkpoint, device, box_contrast, search: the options of these names.
    """
    for option, path in written.items():
        refuse_input(path, files.inputs, option)
    detector, loaded = options.open_detector(
        checkpoint, device, box_contrast, search, images=files.inputs, refuse_failed=True
    )
    for option, path in written.items():
        refuse_input(path, loaded.files, option)
    return detector, loaded


def job_of(
    detector: "Detector",
    loaded: "Checkpoint",
    threshold: float,
    count: int | None,
    describe: "Describe",
    parts: "Sequence[Part]",
    where: Where,
) -> "Job":
    """What processes need to compute the parts.

    Each part has one CPU thread, so that results do not depend on the number of processes. A single
    part has all.
    """
    import torch

    from spairkit.parts.work import Job

    return Job(
        checkpoint=str(loaded.path),
        sha256=loaded.sha256,
        device="cuda" if detector.device.type == "cuda" else "cpu",
        search=detector.search,
        box_contrast=detector.box_contrast,
        threshold=threshold,
        count=count,
        threads=1 if len(parts) > 1 else torch.get_num_threads(),
        describe=describe,
        folder="" if where.scheduler is None else os.getcwd(),
    )


def settings_of(job: "Job", **more: Any) -> dict[str, Any]:
    """What results depend on besides the images."""
    return {
        "version": __version__,
        "checkpoint": job.sha256,
        "search": job.search,
        "box_contrast": job.box_contrast,
        "threshold": job.threshold,
        "count": job.count,
        "device": job.device,
        **more,
    }


def parts_of(files: ImageFiles, written: "dict[str, tuple[str, ...]]") -> "list[Part]":
    """The parts of the images; `written` has the files that are written for each image alone."""
    from spairkit.parts.plan import Item, planned

    columns = zip(files.names, files.numbers, files.pixels, strict=True)
    items: Iterator[Item] = (Item(name, n, px, written.get(name, ())) for name, n, px in columns)
    return planned(items)


def do_parts(
    files: ImageFiles,
    parts: "list[Part]",
    kept: "KeptParts",
    job: "Job",
    detector: "Detector",
    where: Where,
    *,
    quiet: bool,
) -> "list[Found]":
    """Computes the parts that are not kept yet, or those of a shard; the images without rows.

    Raises:
        InputError: as the parts do, or no image can be read.
    """
    own = where.share_of(parts)
    known: dict[Part, Result] = {}  # without rows, which may be large
    left = []
    for part in own:
        before = kept.unchanged(part)
        if before is None:
            left.append(part)
        else:
            known[part] = before.without_rows()
    total, images = sum(map(len, own)), sum(map(len, left))
    if known:
        say(f"{several(total - images, 'image')} finished before, {images} left")
    elif kept.has_others() and where.shard is None:
        say(f"{kept.folder} is of other images or settings: starting anew")
    try:
        # a thread waits for the disk meanwhile
        with counted("images", total, quiet=quiet) as show_done, ThreadPoolExecutor(1) as disk:
            writes = disk.submit(lambda: None)
            for part, result in _results(left, total - images, job, detector, where, show_done):
                writes.result()
                writes = disk.submit(kept.add, part, result)
                known[part] = result.without_rows()
            writes.result()
    except BaseException:
        if kept.images and kept.folder is not None:
            said = several(kept.images, "image")
            say(f"{said} finished, kept in {kept.folder}; the same command goes on")
        raise
    found: list[Found] = []
    for part in own:
        result = known.pop(part)
        for name, reason in result.skipped:
            files.skip(name if files.urls else Path(name), ImageFileError(reason))
        found += result.found
    return found


def _results(
    parts: "list[Part]",
    done: int,
    job: "Job",
    detector: "Detector",
    where: Where,
    show_done: Counter,
) -> "Iterator[tuple[Part, Result]]":
    """The results of parts as they are done; their progress is shown, after `done` images."""

    def show(more: int) -> None:
        nonlocal done
        done += more
        show_done(done)

    if where.scheduler is not None:
        from spairkit.parts.cluster import on_cluster

        for part, result in on_cluster(job, parts, where.scheduler):
            show(len(part))
            yield part, result
    elif (workers := min(where.workers, len(parts))) > 1:
        from spairkit.parts.processes import in_processes

        yield from in_processes(job, parts, workers, on_images=show, say=say)
    else:
        from spairkit.parts.work import Worker

        worker = Worker(job, detector)
        detector.on_progress = show_done.search
        for part in parts:
            yield part, worker.result(part, lambda: show(1))
