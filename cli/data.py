"""`spairkit data`: the datasets, and scenes as image files."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spairkit.cli import options
from spairkit.cli.console import counted, echo, print_json, say, several
from spairkit.cli.files import check_output, image_files, refuse_input
from spairkit.errors import InputError

if TYPE_CHECKING:
    from spairkit.config import DataConfig
    from spairkit.data.image_files import Source
    from spairkit.detections import Truth

app = typer.Typer(
    no_args_is_help=True,
    help="Look at a folder of images; list datasets; write scenes as image files.",
)

_ABOUT = {
    "digits": "scenes of UCI optical digits, which ship with spairkit",
    "mnist": "scenes of MNIST digits; --data FILE, or --set data.path=FILE (npz or IDX)",
    "emnist": "scenes of EMNIST digits; --data FILE, or --set data.path=FILE (npz or IDX)",
    "cards": "scenes of seven cards of the game SET",
    "folder": "your own images: --data FOLDER; eval needs an annotations.json (COCO) in it",
}
_INVADERS = "invaders"
_ABOUT_INVADERS = "frames of Space Invaders, for `data make` only; needs the extra atari"
_COUNT = 16  # images of scenes and games
_BATCH_SIZE = 64


@app.command("list")
def list_(as_json: options.JsonOption = False) -> None:
    """List the datasets."""
    from spairkit.data.datasets import dataset_names
    from spairkit.data.synthetic import KINDS

    about = {name: _ABOUT.get(name, "") for name in dataset_names()}
    about |= {name: f"{kind.about}, for `data make` only" for name, kind in KINDS.items()}
    about[_INVADERS] = _ABOUT_INVADERS
    if as_json:
        print_json(about)
    else:
        echo("\n".join(f"{name:<12}{text}" for name, text in about.items()))


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
    if out is not None and out.suffix.lower() != ".png":
        raise InputError(f"--out {out}: pictures are PNG; name a file that ends in .png")
    whole = folder.resolve()
    picture = out or Path(f"{whole.name if whole.is_dir() else whole.stem}-look.png")
    check_output(picture)
    from spairkit.images import is_picture, write_picture
    from spairkit.report.drawing import contact_sheet
    from spairkit.survey import look as measured
    from spairkit.survey import sample

    if picture.exists() and not is_picture(picture):
        raise InputError(f"{picture} exists and is no picture by spairkit; name another with --out")
    files = image_files([folder])
    paths = files.paths
    refuse_input(picture, files.inputs)
    with counted("looking at the images", 100, quiet=quiet) as show_done:
        survey = measured(paths, lambda share: show_done(round(100 * share)))
    shown = sample(paths, survey)
    names, images, found = zip(*shown, strict=True)
    write_picture(picture, contact_sheet(names, images, found))
    if as_json:
        print_json({**survey.to_json(), "picture": str(picture), "skipped": files.skipped})
        return
    echo("\n".join(survey.lines()))
    for doubt in survey.doubts():
        say(f"warning: {doubt}")
    echo(f"picture: {picture}")
    files.conclude()


@app.command()
def make(
    out: Annotated[Path, typer.Argument(metavar="FOLDER", help="A new folder.")],
    count: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=100_000,
            help="Images. Default: 16; of cells 8, of sprites 12, of brightfield 1.",
        ),
    ] = None,
    preset: options.PresetOption = None,
    data: options.DataOption = None,
    config: options.ConfigOption = None,
    set_: options.SetOption = None,
    quiet: options.QuietOption = False,
) -> None:
    """Write image files with annotations.json (COCO), for `--data FOLDER`.

    They are test scenes; or, with --data cells, sprites or brightfield, images as laboratories and
    games have them, with a damaged file and a text file; or, with --data invaders, frames of Space
    Invaders. Only the seed of those can be set: --set data.seed=1.
    """
    from spairkit.data.image_files import write_images

    source = _source(data, count, preset, config, set_)
    if out.exists():
        raise InputError(f"{out} already exists; name a new folder")
    with counted("images", source.count, quiet=quiet) as show_done:
        number = write_images(source, out, show_done)
    *names, last = [several(number, "image"), *source.beside, "annotations.json"]
    say(f"wrote {', '.join(names)} and {last} to {out}")


def _source(
    data: str | None,
    count: int | None,
    preset: str | None,
    config: Path | None,
    set_: list[str] | None,
) -> "Source":
    """What `--data` names: a synthetic kind, Space Invaders or a dataset of scenes."""
    from spairkit.data import synthetic
    from spairkit.data.image_files import Source, invaders_source

    if data in synthetic.KINDS:
        kind = synthetic.KINDS[data]
        number = count or kind.count
        seed = _seed(data, preset, options.layers(config, set_))
        return Source(
            _drawn(data, seed, number),
            number,
            kind.size,
            kind.suffix,
            (kind.category,),
            synthetic.BESIDE,
        )
    if data == _INVADERS:
        seed = _seed(data, preset, options.layers(config, set_))
        return invaders_source(seed, count or _COUNT)
    settings = options.resolved(preset, options.layers(config, set_, data=data)).data
    if settings.name == "folder":
        raise InputError("--data: name a dataset of scenes; a folder holds image files already")
    number = count or _COUNT
    return Source(_scenes(settings, number), number, settings.whole_size)


def _seed(data: str, preset: str | None, layers: list[Mapping[str, Any]]) -> int:
    """The only setting of images that are no scenes."""
    from spairkit.config_values import merge

    given = merge(*layers)
    if preset or given.keys() - {"data"} or given.get("data", {}).keys() - {"seed"}:
        raise InputError(f"--data {data} has one setting, data.seed; remove the others")
    return options.resolved(None, layers).data.seed


def _scenes(settings: "DataConfig", count: int) -> "Iterator[tuple[bytes, Truth]]":
    """The first test scenes, `count` of them."""
    import torch

    from spairkit.data.datasets import open_dataset
    from spairkit.images import png

    scenes = open_dataset(settings, "test")
    for first in range(0, count, _BATCH_SIZE):
        batch = scenes.batch(torch.arange(first, min(first + _BATCH_SIZE, count)))
        for image, truth in zip(batch.images, batch.truth(), strict=True):
            yield png(image), truth


def _drawn(kind: str, seed: int, count: int) -> "Iterator[tuple[bytes, Truth]]":
    """The first images of a synthetic kind, `count` of them."""
    import torch

    from spairkit.data.synthetic import drawn, encoded
    from spairkit.detections import Truth

    for index in range(count):
        image, boxes = drawn(kind, seed, index)
        labels = torch.zeros(len(boxes), dtype=torch.int64)
        yield encoded(kind, image), Truth(torch.from_numpy(boxes).float(), labels)
