"""`spairkit viz`: a picture of an image, its boxes, its reconstruction and its objects."""

from pathlib import Path
from typing import Annotated

import typer

from spairkit.cli import options
from spairkit.cli.console import counted, print_json, several
from spairkit.errors import InputError


def viz(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", help="PNG, JPEG, ...")],
    checkpoint: options.CheckpointOption = None,
    out: Annotated[
        Path | None,
        options.output_option(
            help="The picture to write. Default: IMAGE-spairkit.png in the current folder."
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
    """Draw boxes on an image, beside its reconstruction and the objects found."""
    outputs = _outputs(images, out)
    for output in outputs:
        options.check_output(output)
    from spairkit.images import image_size, write_png
    from spairkit.report.drawing import panel

    for path in images:
        image_size(path)  # a file that is no image shows before any work
    detector = options.open_detector(checkpoint, device, box_contrast, search)
    drawn = []
    with counted("images", len(images), quiet=as_json) as show_done:
        detector.on_progress = show_done.search
        for path, output in zip(images, outputs, strict=True):
            explanation = detector.explain(path, threshold=threshold, count=count)
            write_png(output, panel(explanation, labels=labels))
            found, counts = explanation.detections, explanation.detections.counts
            if not as_json:
                interval = "" if counts is None else f" ({counts})"
                number = several(len(found), "object")
                typer.echo(f"{path}: {number} found{interval}; picture: {output}")
            values = {} if counts is None else counts.to_json()
            drawn.append(
                {"image": str(path), "picture": str(output), "count": len(found), **values}
            )
            show_done(len(drawn))
    if as_json:
        print_json(
            {
                "checkpoint": detector.name,
                "search": detector.search,
                "calibrated": detector.is_calibrated,
                "pictures": drawn,
            }
        )


def _outputs(images: list[Path], out: Path | None) -> list[Path]:
    """The file of each picture. Raises InputError if two share one, or if it is an image."""
    if out is not None and len(images) > 1:
        raise InputError(
            "--out names one picture and there are several images; remove it, or give one image"
        )
    if out is not None and out.suffix.lower() != ".png":
        raise InputError(f"--out {out}: pictures are PNG; name a file that ends in .png")
    for image in images:
        if image.is_dir():
            raise InputError(f"{image}: is a folder; name image files, such as {image}/*.png")
    outputs = [out or Path(f"{image.stem}-spairkit.png") for image in images]
    for index, output in enumerate(outputs):
        if output in outputs[:index]:
            raise InputError(
                f"{images[outputs.index(output)]} and {images[index]} would both write {output}; "
                "draw them one at a time with --out"
            )
        if output.exists() and any(image.exists() and output.samefile(image) for image in images):
            raise InputError(f"{output} is one of the images; name another file with --out")
    return outputs
