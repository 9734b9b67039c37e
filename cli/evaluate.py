"""`spairkit eval`: figures of a model, by protocol and by number of objects."""

import dataclasses
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Annotated

from spairkit.cli import options
from spairkit.cli.console import echo, json_text, print_json, say
from spairkit.cli.figures import measure, print_report
from spairkit.cli.files import check_outputs, refuse_input
from spairkit.errors import InputError


class SplitName(StrEnum):
    """Scenes that no model was trained on; of a folder, the files held back or all of them."""

    VALIDATION = "validation"
    TEST = "test"


def evaluate(
    checkpoint: options.CheckpointOption = None,
    data: options.DataOption = None,
    split: Annotated[SplitName, options.data_option()] = SplitName.TEST,
    set_: options.SetOption = None,
    threshold: options.ThresholdOption = 0.5,
    box_contrast: options.BoxContrastOption = None,
    search: options.SearchOption = None,
    out: Annotated[
        Path | None, options.output_option(help="Also write the figures to this JSON file.")
    ] = None,
    device: options.DeviceOption = options.Device.AUTO,
    as_json: options.JsonOption = False,
    quiet: options.QuietOption = False,
) -> None:
    """Measure average precision and counts, by default on the data of the run."""
    over = options.layers(None, set_, data=data)
    others = sorted({key for layer in over for key in layer if key != "data"})
    if others:
        raise InputError(
            f"--set {others[0]}: eval accepts only data settings, such as data.max_objects=5"
        )
    if out is not None:
        check_outputs({"--out": out})
    from spairkit.config_values import from_dict, merge, to_dict
    from spairkit.data.files import changed_files, data_files, sha256_of_files
    from spairkit.storage.durable import write_text
    from spairkit.storage.runs import Run, recorded_data

    detector, loaded = options.open_detector(checkpoint, device, box_contrast, search)
    mine = to_dict(loaded.config)
    del mine["prepare"]  # the detector's; other data may not go with it
    if loaded.run is not None:
        with suppress(InputError):  # of a config that was edited, which the checkpoint is not
            # images that have moved are named anew there
            mine["data"]["path"] = Run.open(loaded.run).config.data.path
    trained_on = mine["data"]["path"]
    settings = from_dict(merge(mine, *over), "--set").data
    options.refuse_absent(settings)
    files = data_files(settings)
    if out is not None:
        refuse_input(out, [*files.values(), *loaded.files])
    known = settings.path == trained_on
    if loaded.run is not None and (hashes := recorded_data(loaded.run)) is not None:
        now = sha256_of_files(files)
        if known and (changes := changed_files(hashes, now)):
            say(f"warning: the data have changed since the run began: {changes}")
        known |= now == hashes  # under another path
    report = measure(
        detector, settings, split.value, threshold=threshold, trained_on=known, quiet=quiet
    )
    if report is None:
        raise InputError(
            f"{settings.path}: no annotations in annotations.json (COCO), so there is no ground "
            "truth; `spairkit detect` needs none"
        )
    figures = {
        "checkpoint": str(loaded.path),
        "step": loaded.step,
        "split": split.value,
        "box_contrast": detector.box_contrast,
        "data": dataclasses.asdict(settings),
        **report.to_json(),
    }
    if out is not None:
        write_text(out, f"{json_text(figures)}\n")
        say(f"wrote {out}")
    if as_json:
        print_json(figures)
    else:
        echo(f"{loaded.path} (step {loaded.step})")
        print_report(report)
        if box_contrast is not None:
            tight = f"drawn round the pixels above {box_contrast:g} of each object's contrast"
            boxes = tight if box_contrast else "the model's own"
            echo(f"Boxes: {boxes}.")
