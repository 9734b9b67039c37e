"""Sweeps: many runs that differ in a few settings, drawn at random and recorded by Optuna.

A sweep is a folder with one run for each trial, `trial-0000` and on, and a journal, or a database
elsewhere, that says which trial is whose. Any number of processes work on it at once.

A trial that is stopped or whose process dies is marked failed, and its number is the next to be
given out: settings and run are those of the number, and the run goes on from its last checkpoint.
Death shows in the lock of the run, which the system drops; for processes on other machines that
share no folder but a database, in Optuna's heartbeat, after some minutes.
"""

import itertools
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock, Timeout

from spairkit.config import Config
from spairkit.config_values import differences, to_dict
from spairkit.errors import DivergedError, InputError
from spairkit.storage import durable
from spairkit.storage.runs import Run, next_folder
from spairkit.sweeps.search_space import Space, laid_over
from spairkit.sweeps.study import (
    JOURNAL,
    Definition,
    Draws,
    complete_figure,
    definition_of,
    is_surplus,
    is_waiting,
    live_trials,
    mark_lost,
    mark_stale,
    number_of,
    open_study,
    running_trials,
    storage_errors,
    suggest,
)
from spairkit.training.loop import REPORT_EVERY, Step, fit
from spairkit.training.trainer import criterion

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

RESULTS = "sweep.json"
"""Name of the file in a sweep's folder that holds its results, and that makes it one."""

_LOCK = ".lock"
_OURS = {JOURNAL, f"{JOURNAL}.lock", _LOCK}


@dataclass(frozen=True)
class Progress:
    """A trial has made updates."""

    trial: int
    step: int
    steps: int


@dataclass(frozen=True)
class Ended:
    """A trial is complete, has failed for good, or is stopped."""

    trial: int
    figure: float | None
    """None where it is not complete."""
    error: str = ""
    """Why it has failed for good; empty where it has not."""


@dataclass(frozen=True)
class Trial:
    """A trial that is complete, in progress, or has failed for good."""

    number: int
    """As in the name of its run."""
    state: str
    """complete, running or failed; waiting where it is about to begin."""
    values: dict[str, Any]
    """By dotted key of the config."""
    figure: float | None
    """Of its best validation; None where it is not complete."""
    steps: int | None
    """Updates that it made."""
    run: str
    """The folder; where it is another machine's, its name comes first."""
    error: str = ""


class Sweep:
    """A sweep's folder and its records."""

    def __init__(self, path: Path, storage: str | None, study: "optuna.Study") -> None:
        self.path = path
        self.storage = storage
        self._study = study
        self.definition = definition_of(study, path)
        study.sampler = Draws(self.definition)

    @classmethod
    def create(cls, path: Path | None, storage: str | None, definition: Definition) -> "Sweep":
        """A new sweep in the folder `path`, or in the next free `runs/sweep-N`.

        Args:
            path: new or empty.
            storage: the URL of an SQL database, for machines that share no folder: `path` is then
                local and its name is that of the sweep in the database. None is a journal file
                in `path`.
            definition: see there.

        Raises:
            InputError: the folder is taken or cannot be written; the storage cannot be used.
        """
        path = next_folder("sweep") if path is None else path
        with _turn(path, new=True):
            study = open_study(path, storage, create=True)
            assert study is not None
            if not study.user_attrs:
                values = {
                    "config": to_dict(definition.config),
                    "space": definition.space.to_dict(),
                    "seed": definition.seed,
                }
                study.set_user_attr("spairkit", values)
            sweep = cls(path, storage, study)
            sweep.check(definition.config, definition.space, definition.seed)
            durable.write_text(path / RESULTS, "{}\n")
        return sweep

    @classmethod
    def find(cls, path: Path, storage: str | None) -> "Sweep | None":
        """The sweep in a folder, or of its name in a database; None where there is none yet.

        Raises:
            InputError: the storage cannot be used, or holds something else under that name.
        """
        if storage is None and not (path / RESULTS).is_file():
            return None
        study = open_study(path, storage, create=False)
        if study is None:
            return None
        if not (path / RESULTS).is_file():
            with _turn(path, new=True):
                durable.write_text(path / RESULTS, "{}\n")
        return cls(path, storage, study)

    def check(self, config: Config, space: Space | None, seed: int | None) -> None:
        """Refuses settings that are not those the sweep was begun with; None asks for none.

        Raises:
            InputError: some differ; the message lists them.
        """
        own = self.definition
        found = differences(own.config, config)
        if space is not None and space.to_dict() != own.space.to_dict():
            found.append("the search space")
        if seed is not None and seed != own.seed:
            found.append(f"--seed: {own.seed} -> {seed}")
        if found:
            raise InputError(
                f"{self.path}: a sweep keeps its settings, and these differ: {'; '.join(found)}; "
                "leave them out, or begin a new sweep with another --out"
            )

    @property
    def figure(self) -> str:
        """Name of the validation figure that trials are compared by: higher is better."""
        return criterion(self.definition.config.train)

    def work(
        self,
        trials: int,
        device: torch.device,
        stop: Callable[[], bool],
        report: Callable[[Progress | Ended], None],
    ) -> None:
        """Makes trials in this process until the sweep has so many, or others make the rest.

        Args:
            trials: in all, those that have diverged included.
            device: where to train.
            stop: asked after every update; when it says yes the trial in progress is saved, to be
                gone on with.
            report: is told what happens.

        Raises:
            InputError: what no other settings would mend: the data, the disk, the storage.
        """
        while True:
            with _turn(self.path) as end_turn, storage_errors():
                if stop() or not self._offer(trials):
                    return

                def objective(
                    trial: "optuna.Trial", end_turn: Callable[[], None] = end_turn
                ) -> float:
                    # others that share a database but no folder may have been faster
                    if is_surplus(self._study, trial, trials):
                        raise _Surplus
                    return self._train(trial, device, stop, report, end_turn)

                with suppress(_Stopped, _Surplus):
                    self._study.optimize(objective, n_trials=1, catch=(DivergedError,))

    def trials(self) -> list[Trial]:
        """Complete ones first, the best of them first; then the others by number."""
        with storage_errors():
            found = {number_of(trial): self._trial(trial) for trial in live_trials(self._study)}
        return sorted(
            found.values(), key=lambda t: (t.figure is None, -(t.figure or 0.0), t.number)
        )

    def run_path(self, number: int) -> Path:
        """The run of a trial."""
        return self.path / f"trial-{number:04d}"

    def _trial(self, trial: "FrozenTrial") -> Trial:
        number, attributes = number_of(trial), trial.user_attrs
        error = attributes.get("error", "")
        run = str(self.run_path(number))
        if not self._is_mine(trial):
            run = f"{attributes['folder']}/trial-{number:04d}"
        return Trial(
            number=number,
            state="failed" if error else trial.state.name.lower(),
            values=self.definition.space.draw(self.definition.seed, number),
            figure=complete_figure(trial),
            steps=attributes.get("steps"),
            run=run,
            error=error,
        )

    def _offer(self, trials: int) -> bool:
        """Sees to it that Optuna has a trial to give out; False where there are enough."""
        self._fail_lost()
        live = live_trials(self._study)
        waiting = sum(map(is_waiting, live))
        if len(live) - waiting >= trials:
            return False
        if not waiting:
            taken = {number_of(trial) for trial in live}
            number = next(number for number in itertools.count() if number not in taken)
            self._study.enqueue_trial({}, user_attrs={"number": number})
        return True

    def _train(
        self,
        trial: "optuna.Trial",
        device: torch.device,
        stop: Callable[[], bool],
        report: Callable[[Progress | Ended], None],
        end_turn: Callable[[], None],
    ) -> float:
        """The figure of a trial; ends the turn as soon as the run is locked."""
        number = number_of(trial)
        trial.set_user_attr("folder", _here(self.path))
        values = self.definition.space.draw(self.definition.seed, number)
        for key, setting in self.definition.space.settings.items():
            suggest(trial, key, setting)
        path = self.run_path(number)
        try:
            config = laid_over(self.definition.config, values)
        except InputError as error:
            self._give_up(trial, str(error), report)
            raise DivergedError(str(error)) from error
        if (path / "config.toml").exists():
            run = Run.open(path)
        else:
            if path.is_dir():  # its process died as it was made
                durable.remove_folder(path)
            run = Run.create(path, config)
        with run.lock():
            end_turn()
            try:
                for event in fit(config, run, device, stop):
                    done = isinstance(event, Step) and event.step == event.steps
                    if isinstance(event, Step) and (done or event.step % REPORT_EVERY == 0):
                        report(Progress(number, event.step, event.steps))
                records = run.metrics()
                figures = [r.get(self.figure) for r in records if r.get("kind") == "validation"]
                saved = run.checkpoints
            except DivergedError as error:
                self._give_up(trial, str(error), report)
                raise
            steps = saved[0][0] if saved else 0
            best = max((figure for figure in figures if figure is not None), default=None)
            if stop() and steps < config.train.steps:
                report(Ended(number, None))
                raise _Stopped
            trial.set_user_attr("steps", steps)
            if best is None:
                self._give_up(trial, f"no validation gave a finite {self.figure}", report)
                raise DivergedError
            report(Ended(number, best))
            return float(best)

    def _give_up(
        self, trial: "optuna.Trial", error: str, report: Callable[[Progress | Ended], None]
    ) -> None:
        trial.set_user_attr("error", error)
        report(Ended(number_of(trial), None, error))

    def _is_mine(self, trial: "FrozenTrial") -> bool:
        """Whether its run is in this folder."""
        here = _here(self.path)
        return self.storage is None or trial.user_attrs.get("folder", here) == here

    def _fail_lost(self) -> None:
        """Marks the trials that say they run while nobody is at them."""
        for trial in running_trials(self._study):
            known = self.storage is None or "folder" in trial.user_attrs
            if known and self._is_mine(trial) and not _is_locked(self.run_path(number_of(trial))):
                mark_lost(self._study, trial)
        mark_stale(self._study)


class _Stopped(Exception):
    """A trial was asked to stop."""


class _Surplus(Exception):
    """Another process was faster."""


def _here(path: Path) -> str:
    return f"{socket.gethostname()}:{path.resolve()}"


def _is_locked(run: Path) -> bool:
    if not run.is_dir():
        return False
    lock = FileLock(run / _LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False


@contextmanager
def _turn(path: Path, *, new: bool = False) -> Iterator[Callable[[], None]]:
    """Keeps other processes from taking or judging trials until it ends, or is ended.

    Raises:
        InputError: the folder cannot be written or, where the sweep is new, is taken.
    """
    lock = FileLock(path / _LOCK)
    try:
        path.mkdir(parents=True, exist_ok=True)
        if new and {entry.name for entry in path.iterdir()} - _OURS:
            raise InputError(f"{path}: not empty, and no sweep; name another folder with --out")
        lock.acquire()
    except OSError as error:
        raise InputError(
            f"cannot use the folder {path}: {error.strerror}; name another with --out"
        ) from error
    try:
        yield lock.release
    finally:
        lock.release()
