"""Options shared by several commands, and the values that they stand for."""

import os
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spairkit.cli.console import say
from spairkit.errors import InputError

if TYPE_CHECKING:
    import torch

    from spairkit.detector import Detector


class Device(StrEnum):
    """The device to compute on."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


def _below_one(value: float) -> float:
    if not 0 <= value < 1:
        raise typer.BadParameter(f"must lie in [0, 1), got {value}")
    return value


_DATA, _MODEL, _OUTPUT, _MACHINE = "Data", "Model", "Output", "Machine"  # groups in --help

PresetOption = Annotated[
    str | None,
    typer.Option(
        "--preset",
        rich_help_panel=_MODEL,
        help="Settings to start from: quick (default; minutes on a CPU), laptop (23 minutes) or "
        "paper (needs a GPU).",
    ),
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        rich_help_panel=_MODEL,
        help="The model: spair (default), or a baseline: air, dair or conncomp.",
    ),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        rich_help_panel=_MODEL,
        help="TOML file with settings, applied over the preset; see `spairkit config copy`.",
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        rich_help_panel=_MODEL,
        help="Change a setting, as in data.max_objects=5; repeatable. `spairkit config show` lists "
        "all.",
    ),
]
DataOption = Annotated[
    str | None,
    typer.Option(
        "--data",
        rich_help_panel=_DATA,
        help="A folder of images, the name of a dataset (see `spairkit data list`), or an MNIST "
        "file (EMNIST, if its name says emnist).",
    ),
]
CheckpointOption = Annotated[
    Path | None,
    typer.Option(
        "--checkpoint",
        rich_help_panel=_MODEL,
        help="A run, a checkpoint, `last` or `best`. Default: the newest run under ./runs, or else "
        "the model that ships with spairkit.",
    ),
]
CountOption = Annotated[
    int | None,
    typer.Option(
        "--count",
        min=0,
        max=256,
        rich_help_panel=_MODEL,
        help="The number of objects, for AIR and DAIR that were trained with it.",
    ),
]
DeviceOption = Annotated[
    Device,
    typer.Option("--device", rich_help_panel=_MACHINE, help="auto takes a GPU if there is one."),
]
ThresholdOption = Annotated[
    float,
    typer.Option(
        "--threshold",
        callback=_below_one,
        rich_help_panel=_MODEL,
        help="Objects with a confidence above this are found.",
    ),
]
BoxContrastOption = Annotated[
    float | None,
    typer.Option(
        "--box-contrast",
        callback=lambda value: value if value is None else _below_one(value),
        rich_help_panel=_MODEL,
        help="Tighten boxes to the pixels above this fraction of the object's maximum contrast; "
        "0.5 suits blurred edges, 0 keeps raw boxes. Default: the run's model.box_contrast.",
    ),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(
        "--threads", min=1, rich_help_panel=_MACHINE, help="CPU threads. Default: torch's choice."
    ),
]
LedgerOption = Annotated[
    Path,
    typer.Option(
        "--ledger",
        rich_help_panel=_OUTPUT,
        help="File to append the figures to, one JSON line each.",
    ),
]
JsonOption = Annotated[
    bool, typer.Option("--json", rich_help_panel=_OUTPUT, help="Print the result as JSON.")
]
QuietOption = Annotated[
    bool, typer.Option("--quiet", rich_help_panel=_OUTPUT, help="Show no progress.")
]


def check_output(path: Path) -> None:
    """Refuses an output file that could not be written, before any work is done.

    Raises:
        InputError: it is a folder, or its folder is missing or not writable.
    """
    if path.is_dir():
        raise InputError(f"--out {path}: is a folder; name a file")
    if not path.parent.is_dir():
        raise InputError(f"--out {path}: there is no folder {path.parent}; create it first")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise InputError(f"--out {path}: {path.parent} is not writable; name another file")


def choose_checkpoint(given: Path | None) -> Path:
    """The checkpoint asked for, else that of the newest run, else the packaged one; says which.

    Raises:
        InputError: `last` or `best` is asked for, and there is no run.
    """
    from spairkit.storage.runs import ROOT, newest_run, pretrained

    if given is not None and (given.exists() or str(given) not in ("last", "best")):
        return given
    run = newest_run()
    if given is not None:
        if run is None:
            raise InputError(f"--checkpoint {given}: no run under ./{ROOT}; name a checkpoint")
        return run / given
    if run is not None:
        say(f"using the newest run: {run}")
        return run
    say("using the packaged model (preset quick, digits): there is no run under ./runs")
    return pretrained()


def choose_device(device: Device) -> "torch.device":
    """The torch device.

    Raises:
        InputError: a GPU is asked for and there is none that torch can use.
    """
    import torch

    if device is Device.CUDA and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no GPU; run `spairkit doctor` for details")
    finds_gpu = device is Device.AUTO and torch.cuda.is_available()
    return torch.device("cuda" if finds_gpu or device is Device.CUDA else "cpu")


def open_detector(
    checkpoint: Path | None, device: Device, box_contrast: float | None = None
) -> "Detector":
    """The detector of `--checkpoint`, `--device` and `--box-contrast`.

    Raises:
        InputError: as `choose_checkpoint`, `choose_device` and `Detector`.
    """
    from spairkit.detector import load

    path = choose_checkpoint(checkpoint)
    return load(path, choose_device(device), box_contrast=box_contrast)


def layers(
    config: Path | None, options: Mapping[str, Any], words: list[str] | None
) -> list[Mapping[str, Any]]:
    """The layers of settings over a preset, in ascending precedence: file, options, `--set`."""
    from spairkit.config_values import assignments, load_toml

    return [load_toml(config) if config else {}, options, assignments(words or [])]


def choose_preset(given: str | None, over: list[Mapping[str, Any]]) -> str:
    """The preset asked for, else the one that the config file was made from, else the default."""
    from spairkit.presets import DEFAULT

    if given is not None:
        return given
    return next((str(layer["preset"]) for layer in reversed(over) if "preset" in layer), DEFAULT)
