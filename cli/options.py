"""Options that several commands share, and what their words mean."""

import os
from collections.abc import Mapping
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spairkit.cli.console import say
from spairkit.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from spairkit.config import ModelConfig
    from spairkit.storage.checkpoints import Checkpoint


class Device(StrEnum):
    """Where to compute."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


def _below_one(value: float) -> float:
    if not 0 <= value < 1:
        raise typer.BadParameter(f"must lie in [0, 1), got {value}")
    return value


PresetOption = Annotated[
    str | None,
    typer.Option(
        "--preset",
        help="Settings to start from: quick (the default, minutes on a CPU), laptop (23 minutes) "
        "or paper (wants a GPU).",
    ),
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model", help="What to train: spair (the default), or its rivals air, dair, conncomp."
    ),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", help="TOML file laid over the preset; see `spairkit config copy`."),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change a setting, as data.max_objects=5; repeatable. `spairkit config show` has all.",
    ),
]
DataOption = Annotated[
    str | None,
    typer.Option(
        "--data",
        help="A dataset's name (see `spairkit data list`), a folder of images, or an MNIST file "
        "(EMNIST, where the name says emnist).",
    ),
]
CheckpointOption = Annotated[
    Path | None,
    typer.Option(
        "--checkpoint",
        help="A run, a checkpoint or `last`; else the newest run under ./runs, "
        "else the model that ships with spairkit.",
    ),
]
CountOption = Annotated[
    int | None,
    typer.Option(
        "--count", min=0, max=256, help="The number of objects, for a model that is told it."
    ),
]
DeviceOption = Annotated[Device, typer.Option("--device", help="auto takes a GPU if there is one.")]
ThresholdOption = Annotated[
    float,
    typer.Option("--threshold", callback=_below_one, help="Score above which an object counts."),
]
BoxContrastOption = Annotated[
    float | None,
    typer.Option(
        "--box-contrast",
        callback=lambda value: value if value is None else _below_one(value),
        help="Where boxes end: the share of an object's strongest contrast. 0.5 suits blurred "
        "edges; 0 takes the model's own boxes. Default: the run's model.box_contrast.",
    ),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option("--threads", min=1, help="CPU threads. Default: as many as torch takes."),
]
LedgerOption = Annotated[
    Path, typer.Option("--ledger", help="File that the figures are added to, as a line of JSON.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
QuietOption = Annotated[bool, typer.Option("--quiet", help="No progress, only the result.")]


def check_output(path: Path) -> None:
    """Refuses a file that could not be written, before the work whose result it is to hold.

    Raises:
        InputError: it is a folder, or its folder is missing or not writable.
    """
    if path.is_dir():
        raise InputError(f"--out {path}: is a folder; name a file")
    if not path.parent.is_dir():
        raise InputError(f"--out {path}: there is no folder {path.parent}; make it first")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise InputError(f"--out {path}: nothing can be written in {path.parent}; name another")


def choose_checkpoint(given: Path | None) -> Path:
    """The checkpoint asked for, or else the newest run's, or else the packaged one; says which.

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
    say("using the model that ships with spairkit (preset quick, digits), as no run is here")
    return pretrained()


def choose_device(device: Device) -> "torch.device":
    """The device that the word means here; a GPU computes in float32 from now on.

    Raises:
        InputError: a GPU is asked for and there is none that torch can use.
    """
    import torch

    from spairkit.training.process import set_precision

    if device is Device.CUDA and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no GPU here; `spairkit doctor` says more")
    finds_gpu = device is Device.AUTO and torch.cuda.is_available()
    chosen = torch.device("cuda" if finds_gpu or device is Device.CUDA else "cpu")
    set_precision("float32", chosen)  # torch's own choice for convolutions is not
    return chosen


def with_box_contrast(loaded: "Checkpoint", given: float | None) -> "Checkpoint":
    """The checkpoint with boxes drawn as `--box-contrast` says, or as they were trained to be.

    Raises:
        InputError: it is given, and the model's boxes do not depend on it.
    """
    from spairkit.config import ConnCompConfig

    if given is None:
        return loaded
    model = loaded.config.model
    if isinstance(model, ConnCompConfig):
        raise InputError("--box-contrast: conncomp's boxes hold whole components; leave it out")
    model = replace(model, box_contrast=given)
    return replace(loaded, config=replace(loaded.config, model=model))


def told_counts(count: int | None, model: "ModelConfig") -> "Tensor | None":  # [1]
    """What `--count` says to a model; one that needs it and gets none refuses by itself.

    Raises:
        InputError: the model finds out by itself.
    """
    import torch

    if count is None:
        return None
    if not model.told:
        raise InputError(f"--count {count}: this model counts by itself; leave it out")
    return torch.tensor([count])


_AS_THEY_ARE = {"black": 0.0, "white": 1.0}


def data_layer(word: str) -> dict[str, Any]:
    """The config values that `--data word` stands for; scenes are not stretched.

    Raises:
        InputError: it is neither the name of a dataset nor a folder nor a file.
    """
    from spairkit.data.datasets import dataset_names

    names = [name for name in dataset_names() if name != "folder"]
    if word in names:
        return {"data": {"name": word, **_AS_THEY_ARE}}
    path = Path(word)
    if path.is_dir():
        return {"data": {"name": "folder", "path": str(path.resolve())}}
    if path.is_file():
        return {
            "data": {
                "name": "emnist" if "emnist" in path.name.lower() else "mnist",
                "path": str(path.resolve()),
                **_AS_THEY_ARE,
            }
        }
    raise InputError(f"--data {word}: no such folder or file, and no dataset ({', '.join(names)})")


def layers(
    config: Path | None, options: Mapping[str, Any], words: list[str] | None
) -> list[Mapping[str, Any]]:
    """What lies over a preset, the last one on top: file, options of their own, `--set`."""
    from spairkit.config_values import assignments, load_toml

    return [load_toml(config) if config else {}, options, assignments(words or [])]


def choose_preset(given: str | None, over: list[Mapping[str, Any]]) -> str:
    """The preset asked for, or that the config file was made from, or the default."""
    from spairkit.presets import DEFAULT

    if given is not None:
        return given
    return next((str(layer["preset"]) for layer in reversed(over) if "preset" in layer), DEFAULT)
