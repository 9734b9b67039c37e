"""`spairkit viz`: a picture of what a model sees in an image."""

from pathlib import Path
from typing import Annotated

import typer

from spairkit.cli.console import print_json, several
from spairkit.cli.options import (
    BoxContrastOption,
    CheckpointOption,
    CountOption,
    Device,
    DeviceOption,
    JsonOption,
    ThresholdOption,
    check_output,
    choose_checkpoint,
    choose_device,
    told_counts,
    with_box_contrast,
)
from spairkit.errors import InputError


def viz(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="PNG, JPEG, ...")],
    checkpoint: CheckpointOption = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="The picture to write or replace, else <image>-spairkit.png in this folder.",
        ),
    ] = None,
    threshold: ThresholdOption = 0.5,
    box_contrast: BoxContrastOption = None,
    count: CountOption = None,
    device: DeviceOption = Device.AUTO,
    json: JsonOption = False,
) -> None:
    """Draw boxes on an image, beside its reconstruction and the objects found."""
    outputs = _outputs(images, out)
    for output in outputs:
        check_output(output)
    from spairkit.images import read_pixels, stretched, to_colour, write_png
    from spairkit.models.loading import from_checkpoint
    from spairkit.report.drawing import panel
    from spairkit.storage.checkpoints import load_checkpoint

    pictures = [read_pixels(path) for path in images]  # one that is damaged shows before any work
    loaded = with_box_contrast(load_checkpoint(choose_checkpoint(checkpoint)), box_contrast)
    data, chosen = loaded.config.data, choose_device(device)
    detector = from_checkpoint(loaded, chosen)
    counts = told_counts(count, detector.config)
    drawn = []
    for path, pixels, output in zip(images, pictures, outputs, strict=True):
        image = stretched(to_colour(pixels), black=data.black, white=data.white).contiguous()
        batch = image[None].to(chosen)
        found = detector.detect(batch, threshold, counts=counts)[0]
        objects = detector.appearance(batch, threshold, counts=counts)[0].cpu()
        reconstruction = detector.reconstruct(batch, counts=counts)[0].cpu()
        write_png(output, panel(image, found, reconstruction, objects))
        if not json:
            typer.echo(f"{path}: {several(len(found), 'object')} found; picture: {output}")
        drawn.append({"image": str(path), "picture": str(output), "count": len(found)})
    if json:
        print_json({"checkpoint": str(loaded.path), "pictures": drawn})


def _outputs(images: list[Path], out: Path | None) -> list[Path]:
    """Where each picture goes. Raises InputError where one would take another's place."""
    if out is not None and len(images) > 1:
        raise InputError("--out names one picture; leave it out, or give one image at a time")
    outputs = [out or Path(f"{image.stem}-spairkit.png") for image in images]
    for index, output in enumerate(outputs):
        if output in outputs[:index]:
            raise InputError(f"two of the images are called {images[index].stem}; draw them apart")
        if output.exists() and any(image.exists() and output.samefile(image) for image in images):
            raise InputError(f"{output}: is one of the images; name another picture with --out")
    return outputs
