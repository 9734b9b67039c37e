"""Options shared by several commands, and the values that they stand for."""

import shlex
from collections.abc import Iterable, Mapping
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spairkit.cli.console import say
from spairkit.errors import InputError

if TYPE_CHECKING:
    import torch

    from spairkit.config import Config, DataConfig
    from spairkit.detector import Detector
    from spairkit.storage.checkpoints import Checkpoint


FAILED = 3
"""Exit status of a training that has ended with signs of failure, and of commands that need its
objects."""


class Device(StrEnum):
    """The device to compute on."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class Search(StrEnum):
    """Modes of the search; see `spairkit.config.SearchConfig`."""

    OFF = "off"
    REFINE = "refine"
    FULL = "full"


def _below_one(value: float | None) -> float | None:
    if value is not None and not 0 <= value < 1:
        raise typer.BadParameter(f"must be at least 0 and below 1 (got {value:g})")
    return value


data_option, model_option, training_option, runs_option, output_option, machine_option = (
    partial(typer.Option, rich_help_panel=group)
    for group in ("Data", "Model", "Training", "Runs", "Output", "Machine")
)
"""`typer.Option` for each group of `--help`."""

PresetOption = Annotated[
    str | None,
    model_option(
        help="Settings to start from: quick (default; minutes on a CPU), laptop (23 minutes) or "
        "paper (needs a GPU)."
    ),
]
ModelOption = Annotated[
    str | None,
    model_option(
        help="The model: spair (default), or a baseline: air, dair, conncomp or watershed."
    ),
]
ConfigOption = Annotated[
    Path | None,
    model_option(
        help="TOML file with settings, applied over the preset; see `spairkit config copy`."
    ),
]
SetOption = Annotated[
    list[str] | None,
    model_option(
        "--set",
        metavar="KEY=VALUE",
        help="Change a setting, such as data.max_objects=5; repeatable. `spairkit config show` "
        "lists all.",
    ),
]
DataOption = Annotated[
    str | None,
    data_option(
        help="A folder of images, the name of a dataset (see `spairkit data list`), or an MNIST "
        "file (EMNIST, if its name says emnist)."
    ),
]
CheckpointOption = Annotated[
    Path | None,
    model_option(
        help="A run, a checkpoint, `last` or `best`. Default: the newest run under ./runs, or else "
        "the model that ships with spairkit."
    ),
]
CountOption = Annotated[
    int | None,
    model_option(
        min=0, max=256, help="The number of objects, for AIR and DAIR that were trained with it."
    ),
]
DeviceOption = Annotated[Device, machine_option(help="auto takes a GPU if there is one.")]
ThresholdOption = Annotated[
    float, model_option(callback=_below_one, help="Objects with a confidence above this are found.")
]
BoxContrastOption = Annotated[
    float | None,
    model_option(
        callback=_below_one,
        help="Draw boxes round the pixels above this fraction of an object's contrast; 0.5 suits "
        "blurred edges, 0 keeps raw boxes. Default: the run's model.box_contrast.",
    ),
]
SearchOption = Annotated[
    Search | None,
    model_option(
        help="SPAIR's search after the encoder's guess: off; refine, which fits objects to the "
        "image; or full, which also adds, removes, merges and splits them. Default: the run's "
        "search.mode."
    ),
]
ThreadsOption = Annotated[
    int | None, machine_option(min=1, help="CPU threads. Default: torch's choice.")
]
LedgerOption = Annotated[
    Path, output_option(help="File to append the figures to, one JSON line each.")
]
JsonOption = Annotated[bool, output_option("--json", help="Print the result as JSON.")]
QuietOption = Annotated[bool, output_option("--quiet", help="Show no progress.")]


def choose_checkpoint(given: Path | None, images: Iterable[Path] = ()) -> Path:
    """The checkpoint asked for, else that of the newest run, else the packaged one; says which.

    A run that was trained on the folder of the images goes before newer ones of other images.

    Raises:
        InputError: `last` or `best` is asked for, and there is no run.
    """
    from spairkit.storage.runs import ROOT, newest_run, pretrained

    if given is not None and (given.exists() or str(given) not in ("last", "best")):
        return given
    folders = dict.fromkeys(folder for path in images for folder in list(path.parents)[:2])
    own = next(filter(None, (newest_run(data=folder) for folder in folders)), None)
    run = own or newest_run()
    if given is not None:
        if run is None:
            raise InputError(f"--checkpoint {given}: no run under ./{ROOT}; name a checkpoint")
        if rest := unfinished(run):
            say(f"using {run / given}{rest}")
        return run / given
    if run is not None:
        say(f"using the newest run{' on these images' if own else ''}: {run}{unfinished(run)}")
        return run
    say("no run under ./runs: using the packaged model (preset quick, digits)")
    return pretrained()


def unfinished(path: Path) -> str:
    """What to add to the name of a run whose training has not ended; else nothing."""
    from spairkit.report.signs import has_signs
    from spairkit.storage.runs import Run

    try:
        run = Run.open(path)
    except InputError:
        return ""  # to load it tells why
    missing = run.missing
    if not missing or has_signs(path):
        return ""
    steps = run.config.train.steps
    place = f"at update {steps - missing} of {steps}"
    if run.is_training:
        return f", still training, {place}"
    return f", interrupted {place}; continue with: spairkit train --resume {shlex.quote(str(path))}"


def choose_device(device: Device) -> "torch.device":
    """The torch device.

    Raises:
        InputError: a GPU is asked for and there is none that torch can use.
    """
    from spairkit.detector import chosen_device

    return chosen_device(device.value)


def open_detector(
    checkpoint: Path | None,
    device: Device,
    box_contrast: float | None,
    search: Search | None,
    *,
    images: Iterable[Path] = (),
    refuse_failed: bool = False,
) -> "tuple[Detector, Checkpoint]":
    """The detector of `--checkpoint`, `--device`, `--box-contrast` and `--search`, for images.

    Warns of a run whose training failed or, with `refuse_failed`, ends with status 3.
    """
    from spairkit.detector import detector_of
    from spairkit.storage.checkpoints import load_checkpoint

    loaded = load_checkpoint(choose_checkpoint(checkpoint, images))
    detector = detector_of(
        loaded,
        choose_device(device),
        box_contrast=box_contrast,
        search=None if search is None else search.value,
    )
    _judge(loaded.path, refuse=refuse_failed)
    say_if_uncalibrated(detector)
    return detector, loaded


def refuse_absent(data: "DataConfig") -> None:
    """Refuses the data of a run that are no longer there, with advice."""
    if data.path and not Path(data.path).exists():
        raise InputError(
            f"{data.path}: the images of the run are not there; if they have moved, give them with "
            "--data"
        )


def _judge(checkpoint: Path, *, refuse: bool) -> None:
    """Says that the training of a checkpoint's run failed; ends with status 3 if it is refused."""
    from spairkit.report.signs import failed_run

    run = failed_run(checkpoint)
    if run is None:
        return
    if not refuse:
        say(f"warning: the training of {run} failed, see its report.html; do not trust it")
        return
    say(
        f"the training of {run} failed, so what it finds are no objects: see its report.html and "
        "spairkit viz; train again with another --seed, or with --model watershed"
    )
    raise typer.Exit(FAILED)


def say_unfit(reasons: list[str], images: int) -> None:
    """Says that a model does not fit some images, by the reason of the first of them."""
    if reasons:
        more = f" (and {len(reasons) - 1} more of {images} images)" if len(reasons) > 1 else ""
        say(
            f"warning: this model does not fit {reasons[0]}{more}; train one on such images: "
            "spairkit train --data FOLDER"
        )


def say_if_uncalibrated(detector: "Detector") -> None:
    """Says that confidences and intervals of a search are rough."""
    if detector.search != "off" and not detector.has_intervals:
        say(
            f"confidences and count intervals may be too sure: the search {detector.search!r} is "
            "not calibrated for this model"
        )


def layers(
    config: Path | None,
    words: list[str] | None,
    *,
    data: str | None = None,
    model: str | None = None,
    **train: Any,
) -> list[Mapping[str, Any]]:
    """The layers of settings over a preset, in ascending precedence: file, options, `--set`.

    `train` holds settings of training that have options of their own; None is no setting.
    """
    from spairkit.config_values import assignments, load_toml

    layers: list[Mapping[str, Any]] = [load_toml(config)] if config else []
    if data:
        from spairkit.data.datasets import data_settings

        layers.append(data_settings(data))
    if model:
        layers.append({"model": {"kind": model}})
    if given := {name: value for name, value in train.items() if value is not None}:
        layers.append({"train": given})
    return [*layers, assignments(words or [])]


def resolved(preset: str | None, over: list[Mapping[str, Any]]) -> "Config":
    """The config of `--preset`, else of the config file's preset, else of the default one."""
    from spairkit.config_values import merge
    from spairkit.presets import DEFAULT, resolve

    if preset is None:
        preset = str(merge(*over).get("preset", DEFAULT))
    return resolve(preset, *over)
