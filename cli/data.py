"""`spairkit data`: the datasets, and scenes as image files."""

import json
from collections.abc import Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spairkit.cli import options
from spairkit.cli.console import counted, print_json, say, several
from spairkit.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from spairkit.config import DataConfig
    from spairkit.detections import Truth

app = typer.Typer(no_args_is_help=True, help="List datasets, or write scenes as image files.")

_ABOUT = {
    "digits": "scenes of UCI optical digits, which ship with spairkit",
    "mnist": "scenes of MNIST digits; --data FILE, or --set data.path=FILE (npz or IDX)",
    "emnist": "scenes of EMNIST digits; --data FILE, or --set data.path=FILE (npz or IDX)",
    "folder": "your own images: --data FOLDER; eval needs an annotations.json (COCO) in it",
}
_INVADERS = "invaders"
_ABOUT_INVADERS = "frames of Space Invaders, for `data make` only; needs the extra atari"
_BATCH_SIZE = 64


@app.command("list")
def list_(as_json: options.JsonOption = False) -> None:
    """List the datasets."""
    from spairkit.data.datasets import dataset_names

    about = {name: _ABOUT.get(name, "") for name in dataset_names()}
    about[_INVADERS] = _ABOUT_INVADERS
    if as_json:
        print_json(about)
    else:
        typer.echo("\n".join(f"{name:<10}{text}" for name, text in about.items()))


@app.command()
def look(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Images, or one image.")],
    out: Annotated[
        Path | None,
        options.output_option(help="The picture to write. Default: FOLDER-look.png here."),
    ] = None,
    as_json: options.JsonOption = False,
    quiet: options.QuietOption = False,
) -> None:
    """Measure the objects of a folder, as `train` does first, and draw them. Needs no model.

    The picture shows what a watershed finds with these measurements.
    """
    if not folder.exists():
        raise InputError(f"{folder}: no such folder or image")
    if out is not None and out.suffix.lower() != ".png":
        raise InputError(f"--out {out}: pictures are PNG; name a file that ends in .png")
    whole = folder.resolve()
    picture = out or Path(f"{whole.name if whole.is_dir() else whole.stem}-look.png")
    options.check_output(picture)
    from spairkit.images import is_picture, list_images, write_picture
    from spairkit.report.drawing import contact_sheet
    from spairkit.survey import look as measured
    from spairkit.survey import sample

    if picture.exists() and not is_picture(picture):
        raise InputError(f"{picture} exists and is no picture by spairkit; name another with --out")
    paths = [folder] if folder.is_file() else list_images(folder)
    with counted("looking at the images", 100, quiet=quiet) as show_done:
        survey = measured(paths, lambda share: show_done(round(100 * share)))
    shown = sample(paths, survey)
    names, images, found = zip(*shown, strict=True)
    write_picture(picture, contact_sheet(names, images, found))
    if as_json:
        print_json({**survey.to_json(), "picture": str(picture)})
        return
    typer.echo("\n".join(survey.lines()))
    for doubt in survey.doubts():
        say(f"warning: {doubt}")
    typer.echo(f"picture: {picture}")


@app.command()
def make(
    out: Annotated[Path, typer.Argument(metavar="FOLDER", help="A new folder.")],
    count: Annotated[int, typer.Option(min=1, max=100_000, help="Images.")] = 16,
    preset: options.PresetOption = None,
    data: options.DataOption = None,
    config: options.ConfigOption = None,
    set_: options.SetOption = None,
    quiet: options.QuietOption = False,
) -> None:
    """Write images as PNG files with annotations.json (COCO), for `--data FOLDER`.

    They are test scenes, or, with --data invaders, frames of Space Invaders.
    """
    categories: tuple[str, ...] = ()
    if data == _INVADERS:
        images, categories = _frames(preset, options.layers(config, set_))
    else:
        settings = options.resolved(preset, options.layers(config, set_, data=data)).data
        if settings.name == "folder":
            raise InputError("--data: name a dataset of scenes; a folder holds image files already")
        images = _scenes(settings, count)
    if out.exists():
        raise InputError(f"{out} already exists; name a new folder")
    from spairkit.images import write_png
    from spairkit.storage.durable import write_folder, write_text

    first = next(images)  # a dataset that cannot be used leaves no folder
    write_folder(out, {})
    truth: list[Truth] = []
    with counted("images", count, quiet=quiet) as show_done:
        for image, boxes in islice(chain([first], images), count):
            write_png(out / _name(len(truth)), image)
            truth.append(boxes)
            show_done(len(truth))
    height, width = first[0].shape[1:]
    write_text(out / "annotations.json", json.dumps(_coco(truth, width, height, categories)))
    say(f"wrote {several(count, 'image')} and annotations.json to {out}")


def _scenes(settings: "DataConfig", count: int) -> "Iterator[tuple[Tensor, Truth]]":
    """The first test scenes, `count` of them."""
    import torch

    from spairkit.data.datasets import open_dataset

    scenes = open_dataset(settings, "test")
    for first in range(0, count, _BATCH_SIZE):
        batch = scenes.batch(torch.arange(first, min(first + _BATCH_SIZE, count)))
        yield from zip(batch.images, batch.truth(), strict=True)


def _frames(
    preset: str | None, layers: "list[Mapping[str, Any]]"
) -> "tuple[Iterator[tuple[Tensor, Truth]], tuple[str, ...]]":
    """Frames of Space Invaders, and the names of their categories."""
    from spairkit.config_values import merge
    from spairkit.data.invaders import NAMES, frames

    given = merge(*layers)
    if preset or given.keys() - {"data"} or given.get("data", {}).keys() - {"seed"}:
        raise InputError("--data invaders has one setting, data.seed; remove the others")
    return frames(options.resolved(None, layers).data.seed), NAMES


def _name(index: int) -> str:
    return f"{index:05}.png"


def _coco(
    truth: "list[Truth]", width: int, height: int, categories: tuple[str, ...]
) -> dict[str, Any]:
    """COCO's annotations, with ids from 1; without categories a label stands under `label`."""
    images = [
        {"id": number, "file_name": _name(number - 1), "width": width, "height": height}
        for number in range(1, len(truth) + 1)
    ]
    annotations: list[dict[str, Any]] = []
    for number, item in enumerate(truth, start=1):
        for (x1, y1, x2, y2), label in zip(item.boxes.tolist(), item.labels.tolist(), strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": label + 1 if categories else 1,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": 0,
                    **({} if categories else {"label": label}),
                }
            )
    named = [{"id": i, "name": name} for i, name in enumerate(categories or ("object",), start=1)]
    return {"images": images, "annotations": annotations, "categories": named}
