"""`spairkit track`: objects linked over the frames of a stack or a folder."""

import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spairkit.cli import options
from spairkit.cli.console import csv_line, print_document, say, several
from spairkit.cli.detect_parts import Where, do_parts, job_of, opened, parts_of, settings_of
from spairkit.cli.files import check_outputs, image_files
from spairkit.cli.streams import Closed
from spairkit.errors import InputError

if TYPE_CHECKING:
    from spairkit.detections import Detections
    from spairkit.parts.plan import Found, Item
    from spairkit.tracking import Tracks

_COLUMNS = ("track", "frame", "image", "x", "y", "x1", "y1", "x2", "y2", "score")


def track(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="STACK|FOLDER", help="A stack, a folder of frames, or frames."),
    ],
    checkpoint: options.CheckpointOption = None,
    out: Annotated[
        Path | None,
        options.output_option(help="The CSV file to write. Default: standard output."),
    ] = None,
    picture: Annotated[
        Path | None,
        options.output_option(
            metavar="FILE.png", help="Also draw the paths of all tracks over the last frame."
        ),
    ] = None,
    reach: Annotated[
        float | None,
        typer.Option(
            metavar="PX",
            min=0.001,
            help="Largest step from one frame to the next. Default: from the steps themselves.",
        ),
    ] = None,
    gap: Annotated[
        int, typer.Option(min=0, max=1000, help="Frames that an object may be missed for.")
    ] = 2,
    threshold: options.ThresholdOption = 0.5,
    box_contrast: options.BoxContrastOption = None,
    search: options.SearchOption = None,
    count: options.CountOption = None,
    device: options.DeviceOption = options.Device.AUTO,
    quiet: options.QuietOption = False,
) -> None:
    """Find the objects of each frame, and link them to tracks by position and appearance.

    The table has a row for each object: its track (from 1), frame (from 0), image, centre, box and
    score. Frames of a folder are in the order of the numbers in their names. Files that cannot be
    read are skipped. With --out, the same command goes on after a kill.
    """
    from spairkit.images import as_image, write_picture
    from spairkit.parts.kept import kept_parts
    from spairkit.storage.durable import write_text

    outputs = {"--out": out, "--picture": picture}
    written = {option: path for option, path in outputs.items() if path is not None}
    check_outputs(written)
    if out is None and isinstance(sys.stdout, Closed):
        raise InputError("standard output is closed; name a file with --out")
    if picture is not None and picture.suffix.lower() != ".png":
        raise InputError(f"--picture {picture}: is drawn as PNG; name a file that ends in .png")
    files = image_files(paths)
    _refuse_other_sizes(files.paths)
    detector, loaded = opened(files, written, checkpoint, device, box_contrast, search)
    parts = parts_of(files, {})
    job = job_of(detector, loaded, threshold, count, _Kept(), parts, Where())
    with kept_parts(out, settings_of(job, command="track"), written.values()) as kept:
        items = do_parts(files, parts, kept, job, detector, Where(), quiet=quiet)
        finished = {item.number: item for item in items}
        frames = list(zip(files.paths, files.numbers, strict=True))
        if len(paths) == 1:
            frames.sort(key=_order)
        found = [finished.get(number) for _, number in frames]
        tracks, text = _tracked(found, [path for path, _ in frames], reach, gap)
        if picture is not None:
            last = max(i for i, item in enumerate(found) if item is not None)
            from spairkit.report.trails import draw_tracks

            objects = _detections(found[last])
            write_picture(picture, draw_tracks(as_image(frames[last][0]), objects, tracks))
        if out is not None:
            write_text(out, text)
        else:
            print_document(text)
    seen = [item for item in found if item is not None]
    options.say_unfit([f"{item.name}: {item.misfit}" for item in seen if item.misfit], len(seen))
    if not quiet or written:
        names = f"wrote {' and '.join(map(str, written.values()))}: " if written else ""
        say(f"{names}{_summary(tracks, len(found))}")
    files.conclude()


def _refuse_other_sizes(paths: list[Path]) -> None:
    """Raises InputError for one frame, and if frames differ in size: places then do not compare."""
    from spairkit.images import image_size

    if len(paths) < 2:
        raise InputError(f"{paths[0]}: is one frame; name a folder or a stack of several")
    first = image_size(paths[0])
    for path in paths[1:]:
        size = image_size(path)
        if size != first:
            raise InputError(
                f"{path}: has {size[0]}x{size[1]} pixels (height x width) and {paths[0]} "
                f"{first[0]}x{first[1]}; name the frames of one film"
            )


def _order(frame: tuple[Path, int]) -> list[tuple[int, str]]:
    """Sorts by names, numbers in them by their values: frame 9 is before frame 10."""
    parts = re.split(r"(\d+)", frame[0].as_posix())
    return [(int(part), "") if part.isdecimal() else (0, part) for part in parts]


@dataclass(frozen=True)
class _Kept:
    """A `Describe` that keeps what tracks are made of."""

    def __call__(self, item: "Item", detections: "Detections") -> tuple[list[str], str]:
        fields = ("boxes", "scores", "what")
        return [], json.dumps({name: getattr(detections, name).tolist() for name in fields})


def _detections(item: "Found | None") -> "Detections":
    """The objects of a frame; none of one that was skipped."""
    import torch

    from spairkit.detections import Detections

    kept: dict[str, Any] = json.loads(item.measured) if item is not None else {}
    scores = torch.tensor(kept.get("scores", []), dtype=torch.float32)
    boxes = torch.tensor(kept.get("boxes", []), dtype=torch.float32).reshape(-1, 4)
    what = torch.tensor(kept.get("what", []), dtype=torch.float32)
    return Detections(
        boxes, scores, what if len(scores) else torch.zeros(0, 0), torch.zeros(len(scores))
    )


def _tracked(
    found: "list[Found | None]", paths: list[Path], reach: float | None, gap: int
) -> tuple["Tracks", str]:
    """The tracks, and the table."""
    from spairkit.tracking import track as linked

    objects = [_detections(item) for item in found]
    tracks = linked(objects, reach=reach, gap=gap)
    lines = [csv_line(_COLUMNS)]
    for number, t, row, x, y in zip(
        tracks.number.tolist(),
        tracks.frame.tolist(),
        tracks.row.tolist(),
        tracks.x.tolist(),
        tracks.y.tolist(),
        strict=True,
    ):
        box = objects[t].boxes[row].tolist()
        score = float(objects[t].scores[row])
        values = [format(value, ".7g") for value in (x, y, *box, score)]
        lines.append(csv_line([number, t, str(paths[t]), *values]))
    return tracks, "".join(lines)


def _summary(tracks: "Tracks", frames: int) -> str:
    """The numbers of tracks, and how far they reach."""
    import numpy as np

    lengths = np.bincount(tracks.number)[1:]
    typical = f" of {math.floor(np.median(lengths))} objects (median)" if len(lengths) else ""
    way = "at the speed of the last step" if tracks.predicted else "from where they were"
    return (
        f"{several(len(tracks), 'track')}{typical} in {several(frames, 'frame')}; objects are "
        f"looked for within {tracks.reach:.1f} px {way} (--reach)"
    )
