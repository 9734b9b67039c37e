"""`spairkit viz`: a picture of an image, its boxes, its reconstruction and its objects."""

from pathlib import Path
from typing import Annotated

import typer

from spairkit.cli import options
from spairkit.cli.console import print_json, several
from spairkit.errors import InputError


def viz(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="PNG, JPEG, ...")],
    checkpoint: options.CheckpointOption = None,
    out: Annotated[
        Path | None,
        options.output_option(
            help="The picture to write. Default: <image>-spairkit.png in this folder."
        ),
    ] = None,
    threshold: options.ThresholdOption = 0.5,
    box_contrast: options.BoxContrastOption = None,
    count: options.CountOption = None,
    device: options.DeviceOption = options.Device.AUTO,
    as_json: options.JsonOption = False,
) -> None:
    """Draw boxes on an image, beside its reconstruction and the objects found."""
    outputs = _outputs(images, out)
    for output in outputs:
        options.check_output(output)
    from spairkit.images import read_image, write_png
    from spairkit.report.drawing import panel

    pictures = [read_image(path) for path in images]  # a damaged file shows before any work
    detector = options.open_detector(checkpoint, device, box_contrast)
    drawn = []
    for path, image, output in zip(images, pictures, outputs, strict=True):
        explanation = detector.explain(image, threshold=threshold, count=count)
        write_png(output, panel(explanation))
        found = len(explanation.detections)
        if not as_json:
            typer.echo(f"{path}: {several(found, 'object')} found; picture: {output}")
        drawn.append({"image": str(path), "picture": str(output), "count": found})
    if as_json:
        print_json({"checkpoint": detector.name, "pictures": drawn})


def _outputs(images: list[Path], out: Path | None) -> list[Path]:
    """The file of each picture. Raises InputError if two share one, or if it is an image."""
    if out is not None and len(images) > 1:
        raise InputError(
            "--out names one picture and there are several images; remove it, or give one image"
        )
    outputs = [out or Path(f"{image.stem}-spairkit.png") for image in images]
    for index, output in enumerate(outputs):
        if output in outputs[:index]:
            raise InputError(f"two images are called {images[index].stem}; run viz once for each")
        if output.exists() and any(image.exists() and output.samefile(image) for image in images):
            raise InputError(f"{output} is one of the images; name another file with --out")
    return outputs
