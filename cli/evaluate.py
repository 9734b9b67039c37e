"""`spairkit eval`: how well a model does, by protocol and by number of objects."""

import dataclasses
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spairkit.cli.console import as_json, print_json, say
from spairkit.cli.figures import measure, print_report
from spairkit.cli.options import (
    BoxContrastOption,
    CheckpointOption,
    DataOption,
    Device,
    DeviceOption,
    JsonOption,
    QuietOption,
    SetOption,
    ThresholdOption,
    check_output,
    choose_checkpoint,
    choose_device,
    data_layer,
    layers,
    with_box_contrast,
)
from spairkit.errors import InputError

if TYPE_CHECKING:
    from spairkit.config import Config, DataConfig


class SplitName(StrEnum):
    """Scenes that no model was trained on; of a folder, files held back or all of them."""

    VALIDATION = "validation"
    TEST = "test"


def evaluate(
    checkpoint: CheckpointOption = None,
    data: DataOption = None,
    split: Annotated[SplitName, typer.Option("--split", help="Which images.")] = SplitName.TEST,
    set_: SetOption = None,
    threshold: ThresholdOption = 0.5,
    box_contrast: BoxContrastOption = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Also write the figures to this JSON file, or replace it."),
    ] = None,
    device: DeviceOption = Device.AUTO,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure average precision and counts, on the model's own data unless told otherwise."""
    over = layers(None, data_layer(data) if data else {}, set_)
    others = sorted({key for layer in over for key in layer if key != "data"})
    if others:
        raise InputError(f"--set {others[0]}: only data can be set here, as data.max_objects=5")
    if out is not None:
        check_output(out)
    from spairkit.models.loading import from_checkpoint
    from spairkit.storage.checkpoints import load_checkpoint
    from spairkit.storage.durable import write_text

    loaded = with_box_contrast(load_checkpoint(choose_checkpoint(checkpoint)), box_contrast)
    settings = _data(loaded.config, over)
    chosen = choose_device(device)
    report = measure(
        from_checkpoint(loaded, chosen),
        settings,
        split.value,
        chosen,
        threshold=threshold,
        trained_on=settings.path == loaded.config.data.path,
        quiet=quiet,
    )
    if report is None:
        raise InputError(
            f"{settings.path}: nothing to compare with: no annotations.json (COCO) in it; "
            "`spairkit detect` finds objects without one"
        )
    figures = {
        "checkpoint": str(loaded.path),
        "step": loaded.step,
        "split": split.value,
        "box_contrast": getattr(loaded.config.model, "box_contrast", None),
        "data": dataclasses.asdict(settings),
        **report.to_json(),
    }
    if out is not None:
        write_text(out, f"{as_json(figures)}\n")
        say(f"wrote {out}")
    if json:
        print_json(figures)
    else:
        typer.echo(f"{loaded.path} (step {loaded.step})")
        print_report(report)
        if box_contrast is not None:
            typer.echo(f"Boxes: {_ending(box_contrast)}.")


def _ending(box_contrast: float) -> str:
    """Where boxes end that were asked for, for people."""
    if not box_contrast:
        return "the model's own"
    return f"to {box_contrast:g} of each object's strongest contrast"


def _data(config: "Config", over: list[Any]) -> "DataConfig":
    """The data that the model was trained on, with `over` laid over it."""
    from spairkit.config_values import from_dict, merge, to_dict

    return from_dict(merge(to_dict(config), *over), "--set").data
