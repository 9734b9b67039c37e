"""Training runs that several processes share: each is claimed by one process at a time.

Sweeps and comparisons yield the same events, so that one progress display serves both.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from spairkit.config import Config, DataConfig
from spairkit.config_values import differences
from spairkit.data.files import changed_files, data_files, sha256_of_files
from spairkit.errors import InputError
from spairkit.names import printable
from spairkit.storage import durable
from spairkit.storage.runs import Run, record_data, recorded_data

_MAX_BYTES = 1 << 28  # of a JSON file

LEAST_AGE = 3600.0
"""Seconds after which what is half-written in a shared folder is that of a killed process."""


@dataclass(frozen=True)
class Started:
    """A run starts or resumes in this process."""

    name: str
    steps: int
    """Updates in total; for ConnComp, thresholds."""


@dataclass(frozen=True)
class Ended:
    """A run has finished, here or in another process, or has stopped here."""

    name: str
    figures: Mapping[str, float] = field(default_factory=dict)
    """Validation or test figures; empty if the run failed or stopped."""
    error: str = ""
    """The reason of a failure; empty otherwise."""


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Claims the run folder `path` for this process; yields False if another process has it.

    The system releases the claim of a process that dies, so no claim is ever stale.
    """
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def resume_or_create(path: Path, config: Config) -> Run:
    """The run in the folder `path`, which the caller has claimed; a new run if there is none.

    The images of an old run may have moved; see `refuse_other_data`.

    Raises:
        InputError: the folder holds a run with another config, or cannot be written.
    """
    if (path / "config.toml").exists():
        run = Run.open(path)
        if changes := differences_but_place(config, run.config):
            raise InputError(
                f"{path}: this run has other settings: {'; '.join(changes)}; pass another --out"
            )
        if run.config != config:
            with run.lock():
                run.adopt(config)
        return run
    if path.exists():  # a process was killed before it wrote the config
        durable.remove_folder(path)
    return Run.create(path, config)


def differences_but_place(first: Config, second: Config) -> list[str]:
    """The `differences` between two configs, save where the images lie."""
    return [line for line in differences(first, second) if not line.startswith("data.path:")]


def note_data(folder: Path, data: DataConfig) -> None:
    """Records the hashes of the data that the runs in a folder are made of.

    Raises:
        InputError: the folder cannot be written.
    """
    record_data(folder, sha256_of_files(data_files(data)))


def refuse_other_data(folder: Path, data: DataConfig) -> None:
    """Refuses data in another place, unless they are those that `note_data` has recorded.

    Raises:
        InputError: they differ; the message says in which files.
    """
    before = recorded_data(folder) or {}
    if changes := changed_files(before, sha256_of_files(data_files(data))):
        raise InputError(
            printable(f"{data.path}: not the images of {folder}: {changes}; pass another --out")
        )


def read_json(path: Path, remedy: str) -> Any:
    """The JSON document in a file.

    Raises:
        InputError: the file cannot be read or is not JSON; the message ends with `remedy`.
    """
    try:
        if not path.is_file() or path.stat().st_size > _MAX_BYTES:
            raise InputError(f"{path}: not a file of at most 256 MB; {remedy}")
        return json.loads(path.read_text(encoding="utf-8"))
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}; {remedy}") from None
    except (ValueError, RecursionError):
        raise InputError(f"{path}: not JSON; {remedy}") from None
