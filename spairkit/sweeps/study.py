"""What Optuna keeps of a sweep: its study, with what it was begun with and a record of each trial.

It lies in a journal in the sweep's folder, or in a database under the name of the folder.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spairkit.config import Config
from spairkit.config_values import from_dict
from spairkit.errors import InputError
from spairkit.sweeps.search_space import Choices, Range, Space, parse

try:
    import optuna
except ModuleNotFoundError:
    raise InputError(
        "a sweep needs Optuna, which is not installed: pip install '.[search]' in spairkit's folder"
    ) from None

from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

JOURNAL = "journal.log"
"""Name of the file in a sweep's folder that holds its study, where no database does."""

_HEARTBEAT_SECONDS, _GRACE_SECONDS = 60, 180


@dataclass(frozen=True)
class Definition:
    """What the trials have in common, and what they differ in."""

    config: Config
    space: Space
    seed: int
    """Of the draws; the runs have `train.seed`."""


def open_study(path: Path, storage: str | None, *, create: bool) -> optuna.Study | None:
    """The study of a folder's journal, or of its name in a database; None where there is none."""
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    name = path.resolve().name
    with storage_errors(), warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)  # the heartbeat is
        opened: BaseStorage
        if storage is None:
            opened = JournalStorage(JournalFileBackend(str(path / JOURNAL)))
        else:
            opened = RDBStorage(
                storage,
                heartbeat_interval=_HEARTBEAT_SECONDS,
                grace_period=_GRACE_SECONDS,
            )
        if create:
            return optuna.create_study(
                study_name=name, storage=opened, direction="maximize", load_if_exists=True
            )
        try:
            return optuna.load_study(study_name=name, storage=opened)
        except KeyError:
            return None


@contextmanager
def storage_errors() -> Iterator[None]:
    """What the storage raises, in one line. It has many libraries under it, each its own errors."""
    try:
        yield
    except ImportError as error:
        raise InputError(f"--storage: its driver is not installed: {error.__cause__}") from error
    except Exception as error:
        if not type(error).__module__.startswith(("optuna", "sqlalchemy", "json")):
            raise
        text = str(error).partition("\n")[0]
        raise InputError(
            f"the sweep's storage cannot be used: {type(error).__name__}: {text}"
        ) from error


def definition_of(study: optuna.Study, path: Path) -> Definition:
    """What the study was begun with.

    Raises:
        InputError: it is not a sweep of ours, or of a spairkit with other settings.
    """
    source = f"the sweep {path.name}"
    values = study.user_attrs.get("spairkit")
    if not isinstance(values, dict) or not values.keys() >= {"config", "space", "seed"}:
        raise InputError(f"{source}: the study of that name in the storage is no sweep of spairkit")
    config = from_dict(values["config"], source)
    seed = values["seed"]
    if not isinstance(seed, int) or not isinstance(values["space"], dict):
        raise InputError(f"{source}: damaged; begin a new one with another --out")
    return Definition(config, parse(values["space"], config, source), seed)


class Draws(BaseSampler):
    """Gives every trial the settings that are its number's."""

    def __init__(self, definition: Definition) -> None:
        self._definition = definition

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        search_space: dict[str, BaseDistribution],
    ) -> dict[str, Any]:
        return {}

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        own = self._definition
        return _scalar(own.space.draw(own.seed, number_of(trial))[param_name])


def suggest(trial: optuna.Trial, key: str, setting: Choices | Range) -> None:
    """Tells Optuna of a setting, so that its own tools know it."""
    if isinstance(setting, Choices):
        trial.suggest_categorical(key, [_scalar(value) for value in setting.values])
    elif setting.whole:
        trial.suggest_int(key, int(setting.low), int(setting.high), log=setting.log)
    else:
        trial.suggest_float(key, setting.low, setting.high, log=setting.log)


def _scalar(value: Any) -> Any:
    # Optuna has no lists
    return str(value) if isinstance(value, list) else value


def number_of(trial: FrozenTrial | optuna.Trial) -> int:
    """Ours, which a trial has from the one that it repeats; Optuna's own are never used again."""
    return int(trial.user_attrs.get("number", trial.number))


def live_trials(study: optuna.Study) -> list[FrozenTrial]:
    """The trials that count, in Optuna's order: none that was surplus, stopped or lost."""
    trials = study.get_trials(deepcopy=False)
    return [t for t in trials if t.state != TrialState.FAIL or "error" in t.user_attrs]


def complete_figure(trial: FrozenTrial) -> float | None:
    """The figure of a trial; None where it is not complete."""
    return trial.value if trial.state == TrialState.COMPLETE else None


def is_waiting(trial: FrozenTrial) -> bool:
    """Whether it is still to be given out."""
    return trial.state == TrialState.WAITING


def running_trials(study: optuna.Study) -> list[FrozenTrial]:
    """Those that say they run."""
    return study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))


def mark_lost(study: optuna.Study, trial: FrozenTrial) -> None:
    """Marks a trial at which nobody is as failed."""
    with suppress(ValueError):  # another process was faster
        study.tell(trial.number, state=TrialState.FAIL)


def mark_stale(study: optuna.Study) -> None:
    """Likewise those whose processes have not been heard of for some minutes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        optuna.storages.fail_stale_trials(study)


def is_surplus(study: optuna.Study, trial: optuna.Trial, trials: int) -> bool:
    """Whether others, begun before, are enough or do the same."""
    before = {number_of(other) for other in live_trials(study) if other.number < trial.number}
    return len(before) >= trials or number_of(trial) in before
