"""What a comparison's folder holds: its settings, and the figures of its runs."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from spairkit.data.datasets import open_dataset, open_splits
from spairkit.errors import InputError
from spairkit.experiments.settings import Settings, Task, config_of, settings_from, to_json
from spairkit.storage import durable

FIGURES = ("ap", "ap_spair", "count_accuracy", "count_error")
"""What is averaged over the seeds."""

_MAX_FILE_BYTES = 1 << 24


def read_settings(folder: Path) -> Settings | None:
    """Those of the comparison in a folder; None where there is none.

    Raises:
        InputError: its settings cannot be used.
    """
    path = folder / "settings.json"
    remedy = "name another --out"
    return settings_from(_read(path, remedy), str(path)) if path.exists() else None


def begin(folder: Path, settings: Settings) -> None:
    """Makes the folder of a comparison, or finds that it is of the same one.

    Raises:
        InputError: it holds something else, or a comparison with other settings; the settings do
            not fit the data; or the system refuses.
    """
    before = read_settings(folder)
    if before is not None:
        other = [
            f"{field.name}: {getattr(before, field.name)!r} -> {getattr(settings, field.name)!r}"
            for field in fields(Settings)
            if getattr(before, field.name) != getattr(settings, field.name)
        ]
        if other:
            raise InputError(
                f"{folder}: a comparison keeps its settings, and these differ: {'; '.join(other)}; "
                "leave them out, or name another --out"
            )
        return
    for number in settings.objects or (None,):
        configs = [config_of(settings, Task(model, number, 0)) for model in settings.models]
        data = configs[0].data
        if not open_dataset(data, "test").has_truth:
            raise InputError(
                f"{data.path}: nothing to compare with: no annotations.json (COCO) in it"
            )
        for config in configs if data.name == "folder" else ():
            open_splits(config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise InputError(f"{folder}: not empty; name another folder with --out")
    except OSError as error:
        raise InputError(f"cannot make the folder {folder}: {error.strerror}") from error
    durable.write_text(folder / "settings.json", f"{json.dumps(to_json(settings), indent=2)}\n")


def is_finished(settings: Settings, folder: Path) -> bool:
    """Whether every run is measured."""
    return all((folder / "runs" / task.name / "test.json").exists() for task in settings.tasks())


def measured_figures(run: Path) -> dict[str, float]:
    """The figures of a run by name, its `steps`, and its `seconds` where they were taken."""
    path = run / "test.json"
    remedy = "remove it to measure again"
    values = _read(path, remedy)
    try:
        numbers = {name: values["overall"][name] for name in FIGURES} | {"steps": values["steps"]}
        numbers |= {"seconds": values["seconds"]} if "seconds" in values else {}
    except (KeyError, TypeError):
        numbers = {}
    shares = ("ap", "ap_spair", "count_accuracy")
    fine = all(
        type(number) in (int, float) and 0 <= number <= (1 if name in shares else 1e12)
        for name, number in numbers.items()
    )
    if not numbers or not fine:
        raise InputError(f"{path}: not the figures of a run; {remedy}")
    return {name: float(number) for name, number in numbers.items()}


def _read(path: Path, remedy: str) -> Any:
    """A JSON document of a comparison; `remedy` says what to do where it is none."""
    try:
        if not path.is_file() or path.stat().st_size > _MAX_FILE_BYTES:
            raise InputError(f"{path}: not a file of a comparison; {remedy}")
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not JSON; {remedy}") from None
