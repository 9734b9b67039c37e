"""Sweeps: runs that differ in a few settings, drawn by Optuna and compared on validation.

    FOLDER/journal.log      the Optuna study: settings, state and figure of each trial
    FOLDER/trial-0000/      the run of each trial
    FOLDER/sweep.json       results

Any number of processes can work on one folder. A trial that is stopped or killed stays RUNNING in
the study; the next process that finds it unclaimed resumes its run from the last checkpoint.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import torch
from filelock import FileLock
from optuna.exceptions import OptunaError
from optuna.samplers import RandomSampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from spairkit.config import Config
from spairkit.config_values import from_dict, to_dict
from spairkit.errors import DivergedError, InputError
from spairkit.experiments.shared_runs import (
    LEAST_AGE,
    Ended,
    Started,
    claimed,
    differences_but_place,
    note_data,
    refuse_other_data,
    resume_or_create,
)
from spairkit.storage import durable
from spairkit.storage.runs import DATA, LINKS, Run, new_folder
from spairkit.sweeps import search_space
from spairkit.sweeps.search_space import Space
from spairkit.training.loop import Event, fit
from spairkit.training.trainer import criterion

_JOURNAL, _LOCK = "journal.log", ".lock"
_LOCKS = _LOCK, f"{_JOURNAL}.lock"  # Optuna's is a link, which it does not follow
_STUDY, _DEFINITION = "sweep", "definition"
_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Trial:
    """The settings of a run and its result."""

    number: int
    """Counted from 0; the run folder is named after it."""
    state: str
    """complete, failed or running; a stopped trial is running until it is resumed."""
    values: dict[str, Any]
    """Settings by dotted config key."""
    figure: float | None
    """The best validation figure; None unless the trial is complete."""
    steps: int | None
    """Updates up to the last checkpoint; None without a checkpoint."""
    run: str
    """The run folder."""
    error: str = ""
    """The reason of a failure; empty otherwise."""


class Sweep:
    """The folder of a sweep and its Optuna study."""

    def __init__(self, path: Path, study: optuna.Study) -> None:
        self.path = path
        self._study = study
        values = study.user_attrs.get(_DEFINITION)
        if not isinstance(values, dict) or values.keys() != {"config", "space", "seed"}:
            raise InputError(f"{path / _JOURNAL}: not the journal of a sweep; pass another --out")
        self.seed: int = values["seed"]
        self.config = from_dict(values["config"], str(path))
        self.space = search_space.parse(values["space"], self.config, str(path))
        self.combinations = search_space.grid_size(self.space)
        """The number of trials that exhaust the search space; None if nothing does."""
        self.figure = criterion(self.config.train)
        """Name of the validation figure that ranks the trials; higher is better."""

    @classmethod
    def create(cls, out: Path | None, config: Config, space: Space, seed: int) -> "Sweep":
        """A new sweep in the new or empty folder `out`, or in the next free `runs/sweep-N`.

        `seed` determines the drawn settings; the runs use `config.train.seed`.

        Raises:
            InputError: the folder is not empty or cannot be written.
        """
        path = new_folder(out, "sweep", {_JOURNAL, DATA, *_LOCKS})
        durable.refuse_links(path, _LOCKS[1:])
        with FileLock(path / _LOCK):
            study = _open_study(path)
            if not study.user_attrs:
                note_data(path, config.data)
                values = {
                    "config": to_dict(config),
                    "space": search_space.plain(space),
                    "seed": seed,
                }
                study.set_user_attr(_DEFINITION, values)
        sweep = cls(path, study)
        sweep.check(config, space, seed)  # another process may have created it
        return sweep

    @classmethod
    def open(cls, path: Path) -> "Sweep | None":
        """The sweep in the folder `path`; None if there is none yet.

        Raises:
            InputError: its journal cannot be used.
        """
        if not (path / _JOURNAL).is_file():
            return None
        durable.refuse_links(path, (*LINKS, *_LOCKS[1:]))
        durable.sweep(path, LEAST_AGE)
        with FileLock(path / _LOCK):
            study = _open_study(path)
        return cls(path, study) if study.user_attrs else None  # None: killed during its creation

    def check(self, config: Config, space: Space | None, seed: int | None) -> None:
        """Refuses settings that differ from those of the sweep; None is not compared.

        The images may have moved; see `adopt`.

        Raises:
            InputError: settings differ; the message lists them.
        """
        found = differences_but_place(self.config, config)
        if space is not None and space != self.space:
            found.append("the search space")
        if seed is not None and seed != self.seed:
            found.append(f"--seed: {self.seed} -> {seed}")
        if found:
            raise InputError(
                f"{self.path}: the settings of a sweep are fixed, and these differ: "
                f"{'; '.join(found)}; omit them, or pass another --out"
            )

    def adopt(self, config: Config) -> None:
        """Takes over the place of the images, of settings that `check` has compared.

        Raises:
            InputError: there are other images in the new place.
        """
        if config == self.config:
            return
        refuse_other_data(self.path, config.data)
        with FileLock(self.path / _LOCK):
            values = self._study.user_attrs[_DEFINITION]
            self._study.set_user_attr(_DEFINITION, {**values, "config": to_dict(config)})
        self.config = config

    def work(
        self,
        trials: int,
        device: torch.device,
        stop: Callable[[], bool] = lambda: False,
        busy: Callable[[], bool] = lambda: False,
    ) -> Iterator[Started | Event | Ended]:
        """Runs trials in this process until the sweep has `trials` of them, failures included.

        Args:
            trials: total for all processes.
            device: device to train on.
            stop: called after every update; if true, the current trial is saved and work ends.
            busy: whether other processes still work; if so, wait for them and resume their
                trials if they die.

        Yields:
            An `Ended` for each finished trial, including those of other processes; for trials
            of this process also `Started` and the events of `fit`.

        Raises:
            InputError: an error that affects every trial: data, disk or journal.
        """
        reported: set[int] = set()
        while True:
            others = busy()  # before looking at the trials, or a worker's last one could be missed
            for trial in self._drawn():
                if trial.state.is_finished() and trial.number not in reported:
                    reported.add(trial.number)
                    figures = {} if trial.value is None else {self.figure: trial.value}
                    name = self.run_path(trial.number).name
                    yield Ended(name, figures, self._study.user_attrs.get(name, ""))
            if stop():
                return
            with ExitStack() as claims:
                claim = self._claim(trials, claims)
                if claim is not None:
                    yield from self._train(*claim, device, stop)
                    continue
            if not others:
                return
            time.sleep(_POLL_SECONDS)

    def trials(self) -> list[Trial]:
        """All trials: complete ones first, best first; then the others by number."""
        found = map(self._trial, self._drawn())
        return sorted(found, key=lambda t: (t.figure is None, -(t.figure or 0.0), t.number))

    def run_path(self, number: int) -> Path:
        """The run folder of a trial."""
        return self.path / f"trial-{number:04d}"

    def _drawn(self) -> list[FrozenTrial]:
        """The trials whose settings are complete: a kill can come while they are drawn."""
        trials = self._study.get_trials(deepcopy=False)
        return [trial for trial in trials if trial.params.keys() == self.space.keys()]

    def _claim(self, trials: int, claims: ExitStack) -> tuple[int, dict[str, Any]] | None:
        """Number and settings of a trial for this process: an abandoned one, else a new one."""
        with FileLock(self.path / _LOCK):
            for trial in self._drawn():
                if trial.state == TrialState.RUNNING and claims.enter_context(
                    claimed(self.run_path(trial.number))
                ):
                    return trial.number, _values(trial)
            number = len(self._study.get_trials(deepcopy=False))
            if len(self._drawn()) >= trials or number == self.combinations:
                return None
            self._study.sampler = search_space.sampler(self.space, self.seed, number)
            self._study.ask(dict(self.space))
            self._study.sampler = RandomSampler()  # GridSampler refuses tell outside optimize
            claims.enter_context(claimed(self.run_path(number)))
            return number, _values(self._drawn()[-1])

    def _train(
        self, number: int, values: dict[str, Any], device: torch.device, stop: Callable[[], bool]
    ) -> Iterator[Started | Event | Ended]:
        """Trains a claimed trial and records its result, unless it is stopped."""
        path = self.run_path(number)
        try:
            config = search_space.overridden(self.config, values)
        except InputError as error:
            self._record(number, None, str(error))
            return
        yield Started(path.name, config.train.steps)
        run = resume_or_create(path, config)
        try:
            with run.lock():
                yield from fit(config, run, device, stop)
        except DivergedError as error:
            self._record(number, None, str(error))
            return
        steps = max((step for step, _ in run.checkpoints), default=0)
        if stop() and steps < config.train.steps:
            yield Ended(path.name)
            return
        records = [record for record in run.metrics() if record.get("kind") == "validation"]
        figures = [f for record in records if (f := record.get(self.figure)) is not None]
        best = max(figures, default=None)
        self._record(number, best, f"no validation had a finite {self.figure}")

    def _record(self, number: int, figure: float | None, error: str) -> None:
        with FileLock(self.path / _LOCK):
            if figure is not None:
                self._study.tell(number, figure)
                return
            self._study.set_user_attr(self.run_path(number).name, error)
            self._study.tell(number, state=TrialState.FAIL)

    def _trial(self, trial: FrozenTrial) -> Trial:
        path = self.run_path(trial.number)
        states = {TrialState.COMPLETE: "complete", TrialState.FAIL: "failed"}
        return Trial(
            number=trial.number,
            state=states.get(trial.state, "running"),
            values=_values(trial),
            figure=trial.value,
            steps=max((step for step, _ in Run(path, self.config).checkpoints), default=None),
            run=str(path),
            error=self._study.user_attrs.get(path.name, ""),
        )


def _values(trial: FrozenTrial) -> dict[str, Any]:
    return {key: search_space.decoded(value) for key, value in trial.params.items()}


def _open_study(path: Path) -> optuna.Study:
    """The study in the folder `path`, new or existing. The caller holds the folder's lock."""
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    journal = path.resolve() / _JOURNAL  # absolute, or Optuna cannot see that its lock is stale
    try:
        if journal.exists():
            _drop_partial_line(journal)
        return optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(journal))),
            study_name=_STUDY,
            direction="maximize",
            load_if_exists=True,
        )
    except (
        OptunaError,
        LookupError,
        TypeError,
        ValueError,
        AssertionError,
        RecursionError,
    ) as error:
        raise InputError(
            f"{journal}: not a journal that Optuna can read: {error}; pass another --out"
        ) from error


def _drop_partial_line(journal: Path) -> None:
    """Removes a last line that a crash or a full disk cut short, or Optuna could not read on."""
    with open(journal, "rb+") as file:
        end = file.read().rfind(b"\n") + 1
        file.truncate(end)
