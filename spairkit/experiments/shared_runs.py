"""Training runs that several processes share: each is claimed by one process at a time.

Sweeps, comparisons and experiments yield the same events, so that one progress display serves all.
"""

import json
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from filelock import FileLock, Timeout

from spairkit.config import Config, DataConfig
from spairkit.config_values import differences
from spairkit.data.files import changed_files, data_files, sha256_of_files
from spairkit.errors import InputError
from spairkit.names import printable
from spairkit.storage import durable
from spairkit.storage.runs import Run, record_data, recorded_data
from spairkit.training.calibration import calibrate, calibrates
from spairkit.training.loop import Event, Step, fit

_MAX_BYTES = 1 << 28  # of a JSON file
_POLL_SECONDS = 0.5

LEAST_AGE = 3600.0
"""Seconds after which what is half-written in a shared folder is that of a killed process."""


@dataclass(frozen=True)
class Started:
    """A run starts or resumes in this process."""

    name: str
    steps: int
    """Updates in total; for ConnComp, thresholds."""
    unit: str = "steps"
    """What is counted in place of them."""


@dataclass(frozen=True)
class Ended:
    """A run has finished, here or in another process, or has stopped here."""

    name: str
    figures: Mapping[str, float] = field(default_factory=dict)
    """Validation or test figures; empty if the run failed or stopped."""
    error: str = ""
    """The reason of a failure; empty otherwise."""


class Named(Protocol):
    """A piece of work on a run; its name is that of the run's folder."""

    @property
    def name(self) -> str: ...


Work = TypeVar("Work", bound=Named)


def work_through(
    works: Iterable[Work],
    runs: Path,
    device: torch.device,
    is_done: Callable[[Work], bool],
    do: Callable[[Work, torch.device, Callable[[], bool]], Iterator[Started | Event]],
    figures: Callable[[Work], Mapping[str, float]],
    stop: Callable[[], bool],
    busy: Callable[[], bool],
) -> Iterator[Started | Event | Ended]:
    """Does what no other process has done or claimed, and waits for the others.

    Args:
        works: in the order in which to do them.
        runs: the folder of their runs, made if it is missing.
        device: passed to `do`.
        is_done: whether nothing is left of it.
        do: does the rest of it, or a part if it is stopped.
        figures: of a finished one, for the display of progress.
        stop, busy: see `Sweep.work`.

    Yields:
        The same events as `Sweep.work`.

    Raises:
        InputError: as `do`, or the folder cannot be written.
    """
    durable.make_folder(runs)
    durable.sweep(runs.parent, LEAST_AGE)
    left = list(works)
    while True:
        others = busy()  # before looking at the runs, or a worker's last one could be missed
        for work in list(left):
            if not is_done(work) and not stop():
                with claimed(runs / work.name) as mine:
                    if mine and not is_done(work):
                        yield from do(work, device, stop)
                        if not is_done(work):
                            yield Ended(work.name)
            if is_done(work):
                left.remove(work)
                yield Ended(work.name, figures(work))
        if stop() or not left or not others:
            return
        time.sleep(_POLL_SECONDS)


def trained(
    path: Path, config: Config, device: torch.device, stop: Callable[[], bool]
) -> Generator[Started | Event, None, dict[str, float] | None]:
    """Trains the run in the folder `path`, which the caller has claimed, and calibrates its search.

    Returns:
        Its `steps` and, if it made any update now, its `seconds` of training, extrapolated to the
        whole run if it was interrupted; None if it was stopped.

    Raises:
        InputError: as `resume_or_create` and `fit`.
    """
    run = resume_or_create(path, config)
    yield Started(path.name, run.config.train.steps)
    first, last = None, None
    with run.lock():
        for event in fit(run.config, run, device, stop):
            if isinstance(event, Step):
                first, last = first or event, event
            yield event
        if stop():
            return None
        if calibrates(run):
            calibrate(run, device)
    cost: dict[str, float] = {"steps": run.config.train.steps}
    if first is not None and last is not None:
        cost["seconds"] = last.seconds * last.step / (last.step - first.step + 1)
    return cost


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
