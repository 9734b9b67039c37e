"""`spairkit viz`: a picture of each image, its boxes, its reconstruction and its objects."""

from collections.abc import Set
from pathlib import Path
from typing import Annotated

import typer

from spairkit.cli import options
from spairkit.cli.console import counted, echo, print_json, several
from spairkit.cli.files import FileId, check_output, file_id, image_files, mirrored, refuse_input
from spairkit.errors import ImageFileError, InputError

_FOLDER = Path("viz")


def viz(
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGE|FOLDER", help="Images or folders.")
    ],
    checkpoint: options.CheckpointOption = None,
    out: Annotated[
        Path | None,
        options.output_option(
            help="The picture to write or, for several images, the folder. Default: "
            "IMAGE-spairkit.png in the current folder, or ./viz."
        ),
    ] = None,
    threshold: options.ThresholdOption = 0.5,
    box_contrast: options.BoxContrastOption = None,
    search: options.SearchOption = None,
    count: options.CountOption = None,
    labels: Annotated[
        bool,
        options.output_option("--labels", help="Write number and confidence beside each object."),
    ] = False,
    device: options.DeviceOption = options.Device.AUTO,
    as_json: options.JsonOption = False,
) -> None:
    """Draw boxes on images, beside their reconstructions and the objects found.

    Pictures of a folder, or of several images, go to the folder viz, which mirrors its subfolders.
    Files of a folder that cannot be read are skipped. No file is overwritten, except an earlier
    picture of the same image.
    """
    from spairkit.frames import frames_of

    one = len(images) == 1 and not images[0].is_dir() and len(frames_of(images[0])) == 1
    _check_out(out, images, one=one)
    files = image_files(images)  # a file that is no image shows before any work
    if out is not None and one:
        refuse_input(out, files.inputs)
        outputs = [out]
    else:
        wanted = (
            [Path(f"{_stem(images[0])}-spairkit.png")]
            if one
            else [
                path.with_name(f"{path.name}-spairkit.png")
                for path in mirrored(images, files.paths, out or _FOLDER)
            ]
        )
        outputs = _free(files.paths, wanted, {file_id(path) for path in files.inputs})
    from spairkit.images import write_picture
    from spairkit.report.drawing import panel
    from spairkit.report.signs import misfit

    detector, _ = options.open_detector(
        checkpoint, device, box_contrast, search, images=files.inputs
    )
    drawn = []
    unfit: list[str] = []
    with counted("images", len(files.paths), quiet=as_json) as show_done:
        detector.on_progress = show_done.search
        for path, output in zip(files.paths, outputs, strict=True):
            try:
                explanation = detector.explain(path, threshold=threshold, count=count)
            except ImageFileError as error:
                files.skip(path, error)
                continue
            output.parent.mkdir(parents=True, exist_ok=True)
            write_picture(output, panel(explanation, labels=labels), path)
            found, counts = explanation.detections, explanation.detections.counts
            if not as_json:
                interval = "" if counts is None else f" ({counts})"
                number = several(len(found), "object")
                echo(f"{path}: {number} found{interval}; picture: {output}")
            if reason := misfit(detector, found):
                unfit.append(f"{path}: {reason}")
            values = {} if counts is None else counts.to_json()
            drawn.append(
                {"image": str(path), "picture": str(output), "count": len(found), **values}
            )
            show_done(len(drawn))
    options.say_unfit(unfit, len(drawn))
    if as_json:
        print_json(
            {
                "checkpoint": detector.name,
                "search": detector.search,
                "calibrated": detector.is_calibrated,
                "pictures": drawn,
            }
        )
    files.conclude()


def _check_out(out: Path | None, images: list[Path], *, one: bool) -> None:
    """Refuses an `--out` that cannot be written, before any work is done."""
    from spairkit.images import is_picture

    if one:
        if out is not None and out.suffix.lower() != ".png":
            raise InputError(f"--out {out}: pictures are PNG; name a file that ends in .png")
        check_output(out or Path("x.png"))
        if out is not None and out.exists() and not is_picture(out):
            refuse_input(out, images)
            raise InputError(f"{out} is no picture by spairkit; name another file with --out")
        return
    if out is not None and out.suffix.lower() == ".png":
        raise InputError(
            "--out names one picture and there are several images; name a folder, or give one image"
        )
    folder = out or _FOLDER
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file; name a folder with --out")
    if not folder.exists():
        check_output(folder)


def _stem(image: Path) -> str:
    """The name of a picture of an image: `cells-03` of the frame `cells.tif/03`."""
    from spairkit.frames import file_of

    file, frame = file_of(image)
    return file.stem if frame is None else f"{file.stem}-{image.name}"


def _free(paths: list[Path], wanted: list[Path], inputs: Set[FileId | None]) -> list[Path]:
    """The file of each picture: the wanted one, or numbered where that is another file."""
    from spairkit.images import shows

    def is_taken(output: Path, path: Path) -> bool:
        return output.exists() and (file_id(output) in inputs or not shows(output, path))

    taken: list[Path] = []
    for path, output in zip(paths, wanted, strict=True):
        number, free = 1, output
        while free in taken or is_taken(free, path):
            number += 1
            free = output.with_stem(f"{output.stem}-{number}")
        taken.append(free)
    return taken
