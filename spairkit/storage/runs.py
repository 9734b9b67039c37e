"""A run: a folder with the config, the metrics and the checkpoints of a training.

RUN/config.toml
RUN/data.json               sha256 of the files that it was trained on, by name
RUN/metrics.jsonl
RUN/checkpoints/step-N/     the last two and the best
RUN/best, RUN/last          links to checkpoints, for people: spairkit itself follows none

Runs are untrusted. One that holds other links is not opened, so nothing is written or deleted
elsewhere.
"""

import fcntl
import json
import os
import re
import socket
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from math import isfinite
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor

import spairkit
from spairkit.config import Config
from spairkit.config_values import differences, from_dict, load_toml, to_toml
from spairkit.errors import InputError
from spairkit.storage import checkpoints, durable
from spairkit.storage.checkpoints import Checkpoint, Scalar

ROOT = Path("runs")
"""The default folder of runs, below the current folder."""

LINKS = "best", "last"
"""The links in the folder of a run; no other is accepted, and none is followed."""

DATA = "data.json"

_CONFIG = "config.toml"
_LOCK, _OWNER = ".lock", ".owner"
_LOOK_SECONDS = 0.1  # in which another process that looks at the lock has let it go
_KEEP = 2
_MAX_BYTES = 1 << 28  # of data.json and of metrics.jsonl


class Run:
    """The folder of a run. One process at a time trains in it (`lock`); others may read it."""

    def __init__(self, path: Path, config: Config) -> None:
        self.path = path
        self.config = config

    @classmethod
    def create(cls, out: Path | None, config: Config) -> "Run":
        """Makes a run in the folder `out`, by default the next `runs/<data>-<preset>[-<model>]-N`.

        Raises:
            InputError: `out` is not empty, or cannot be written.
        """
        model = "" if config.model.kind == "spair" else f"-{config.model.kind}"
        stem = f"{config.data.name}-{config.preset}{model}"
        if out is not None and (out / _CONFIG).exists():
            raise InputError(
                f"{out}: already holds a run; resume it (--resume), or name another folder (--out)"
            )
        run = cls(new_folder(out, stem, (_LOCK, _OWNER)), config)
        durable.refuse_links(run.path)
        with run.lock():  # of two processes that come at once, one gets the folder
            if (run.path / _CONFIG).exists():
                raise InputError(f"{run.path}: already holds a run; name another folder (--out)")
            durable.write_text(run.path / _CONFIG, to_toml(config))
        return run

    @classmethod
    def open(cls, path: Path) -> "Run":
        """Opens the run in the folder `path`.

        Raises:
            InputError: there is no run, its config cannot be used, or it holds links that a run
                does not have.
        """
        source = path / _CONFIG
        if not source.is_file():
            raise InputError(f"{path}: not a run (no config.toml in it); name the folder of a run")
        durable.refuse_links(path, LINKS)
        return cls(path, from_dict(load_toml(source), str(source)))

    @property
    def is_training(self) -> bool:
        """Whether a process of this machine trains in it now."""
        try:
            # to open a pipe would wait for a writer
            lock = os.open(self.path / _LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:  # it was never locked
            return False
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # it cannot be locked
            return False
        finally:
            os.close(lock)
        return False

    @property
    def missing(self) -> int:
        """Updates from the newest checkpoint to the end; 0 if it was out of patience before."""
        train = self.config.train
        step = self.checkpoints[0][0] if self.checkpoints else 0
        if 0 < train.patience <= step - (checkpoints.best_step(self.path) or 0):
            return 0
        return max(train.steps - step, 0)

    @property
    def checkpoints(self) -> list[tuple[int, Path]]:
        """Step and folder of each checkpoint, the newest first."""
        return checkpoints.checkpoints_of(self.path)

    def adopt(self, config: Config) -> None:
        """Takes over the settings of a run that may change: `train.steps` and `data.path`.

        With other steps the learning rate is linear to the new last step, so it may rise on
        resumption, and the result differs from a run that was started with this number.

        Raises:
            InputError: another setting differs, or the folder cannot be written.
        """
        if changes := fixed_differences(self.config, config):
            raise InputError(
                f"{self.path}: a run keeps its settings, but these differ: {'; '.join(changes)}; "
                "leave them out, or start a new run"
            )
        if config != self.config:
            self.config = config
            durable.write_text(self.path / _CONFIG, to_toml(config))

    def restart(self, config: Config, record: Mapping[str, Any]) -> None:
        """Gives up what was trained, and begins with another config at the first step.

        A kill in between leaves a run that comes to the same restart again: with the old config and
        fewer checkpoints, or none.

        Args:
            config: of the training that begins.
            record: the line of metrics.jsonl that remains of the old one; its step is 0.
        """
        for name in LINKS:
            self._clear(self.path / name)
            (self.path / name).unlink(missing_ok=True)
        for _, path in self.checkpoints:
            durable.remove_folder(path)
        if (self.path / "pictures").is_dir():
            durable.remove_folder(self.path / "pictures")
        known = [old for old in self.metrics() if old.get("kind") == record["kind"]]
        lines = [json.dumps(old) for old in known if old != record] + [json.dumps(dict(record))]
        durable.write_text(self.path / "metrics.jsonl", "".join(f"{line}\n" for line in lines))
        durable.write_text(self.path / _CONFIG, to_toml(config))
        self.config = config

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Locks the run for training, and removes files that a killed process left half-written.

        The system releases the lock of a process that dies, so a lock is never stale.

        Raises:
            InputError: another process trains here; the message gives its pid and host.
        """
        owner = self.path / _OWNER
        lock = FileLock(self.path / _LOCK)
        try:
            lock.acquire(timeout=_LOOK_SECONDS, poll_interval=_LOOK_SECONDS / 4)
        except Timeout:
            raise InputError(
                f"{self.path}: {_read_owner(owner)} is training here; wait for it or stop it"
            ) from None
        except OSError as error:
            raise InputError(f"cannot lock {self.path}: {error.strerror}") from error
        try:
            durable.write_text(owner, f"process {os.getpid()} on {socket.gethostname()}")
            durable.sweep(self.path)
            yield
        finally:
            lock.release()

    def save(
        self,
        *,
        step: int,
        model: Mapping[str, Tensor],
        optimiser: Mapping[str, Tensor],
        metrics: Mapping[str, float],
        environment: Mapping[str, Scalar],
        is_best: bool,
    ) -> Path:
        """Writes a checkpoint, makes it the last (and the best) one, and removes old ones.

        The last two and the best are kept. Checkpoints of later steps are removed: resuming from
        an earlier step has abandoned them. Arguments as in `save_checkpoint`.

        Raises:
            InputError: as `save_checkpoint`.
        """
        folder = self.path / "checkpoints"
        if not folder.is_dir():
            durable.write_folder(folder, {})
        best = step if is_best else checkpoints.best_step(self.path, step)
        path = checkpoints.save_checkpoint(
            folder,
            step=step,
            config=self.config,
            model=model,
            optimiser=optimiser,
            metrics=metrics,
            environment=environment,
            best=best,
        )
        self._link("last", step)
        if is_best:
            self.mark_best(step)
        past = [old_step for old_step, _ in self.checkpoints if old_step <= step]
        for old_step, old in self.checkpoints:
            if old_step not in (*past[:_KEEP], best):
                durable.remove_folder(old)
        return path

    def mark_best(self, step: int) -> None:
        """Points the link `best` at the checkpoint of `step`, which must exist."""
        self._link("best", step)

    def _link(self, name: str, step: int) -> None:
        self._clear(self.path / name)
        durable.replace_link(self.path / name, f"checkpoints/step-{step}")

    def _clear(self, link: Path) -> None:
        """Removes the folder that a copy which follows links has made of one."""
        if link.is_dir() and not link.is_symlink():
            if not (link / "manifest.json").exists():
                raise InputError(f"{link}: no checkpoint, which spairkit writes here; move it away")
            durable.remove_folder(link)

    def latest(self) -> Checkpoint | None:
        """The newest undamaged checkpoint, with the optimiser; None if there is none yet.

        Warns of each damaged checkpoint that is skipped.

        Raises:
            InputError: all checkpoints are damaged, or config.toml was edited.
        """
        damage: list[InputError] = []
        for step, path in self.checkpoints:
            try:
                checkpoint = checkpoints.load_checkpoint(path, with_optimiser=True)
            except InputError as error:
                damage.append(error)
                continue
            if changes := fixed_differences(checkpoint.config, self.config):
                raise InputError(
                    f"{self.path / _CONFIG}: was edited, and differs from the checkpoint of step "
                    f"{step}: {'; '.join(changes)}; undo this, or start a new run"
                )
            for reason in damage:
                warnings.warn(f"{reason}; resuming from step {step} instead", stacklevel=2)
            return checkpoint
        if damage:
            raise InputError(f"{self.path}: every checkpoint is damaged; the newest: {damage[0]}")
        return None

    def log(self, record: Mapping[str, Any]) -> None:
        """Appends a line to metrics.jsonl; `record` has an int `step`. NaN becomes null."""
        endless = {k for k, v in record.items() if isinstance(v, float) and not isfinite(v)}
        plain = {k: None if k in endless else v for k, v in record.items()}
        durable.append_line(self.path / "metrics.jsonl", json.dumps(plain, allow_nan=False))

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, without a line that a crash cut short.

        Raises:
            InputError: it is not a file, or larger than 256 MB.
        """
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return []
        if not path.is_file() or path.stat().st_size > _MAX_BYTES:
            raise InputError(f"{path}: not the metrics of a run; remove it")
        records = []
        for line in path.read_text(errors="replace").splitlines():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                records.append(record)
        return records

    def truncate_metrics(self, step: int) -> None:
        """Drops the lines of metrics.jsonl after `step`; training will write them again."""
        kept = [json.dumps(record) for record in self.metrics() if record["step"] <= step]
        durable.write_text(self.path / "metrics.jsonl", "".join(f"{line}\n" for line in kept))


def record_data(folder: Path, hashes: Mapping[str, str]) -> None:
    """Writes data.json. Raises InputError if the folder cannot be written."""
    durable.write_text(folder / DATA, f"{json.dumps(hashes, indent=1)}\n")


def recorded_data(folder: Path) -> dict[str, str] | None:
    """The sha256 of each file that a run, a sweep or a comparison was made of, by name.

    None if there is no record.

    Raises:
        InputError: data.json is not of this form.
    """
    path = folder / DATA
    if not path.exists():
        return None
    with suppress(OSError, ValueError, RecursionError):
        if path.is_file() and path.stat().st_size <= _MAX_BYTES:
            hashes = json.loads(path.read_bytes())
            if isinstance(hashes, dict) and all(isinstance(v, str) for v in hashes.values()):
                return hashes
    raise InputError(f"{path}: not a list of hashes; remove it to record the data anew")


def fixed_differences(first: Config, second: Config) -> list[str]:
    """The `differences` of settings that a run keeps."""
    free = ("train.steps:", "data.path:")
    return [line for line in differences(first, second) if not line.startswith(free)]


def newest_run(root: Path = ROOT, data: Path | None = None) -> Path | None:
    """The run below `root` that saved a checkpoint last; None if there is none.

    Args:
        data: only runs that were trained on this folder count.
    """
    saved: list[tuple[int, Path]] = []
    for folder in root.glob("*/checkpoints"):
        if data is not None and not _is_trained_on(folder.parent, data):
            continue
        for _, path in checkpoints.checkpoints_of(folder.parent)[:1]:
            with suppress(OSError):  # another process may replace it
                saved.append((path.stat().st_mtime_ns, folder.parent))
    return max(saved)[1] if saved else None


def _is_trained_on(run: Path, data: Path) -> bool:
    try:
        trained = Run.open(run).config.data
    except InputError:
        return False
    return trained.name == "folder" and Path(trained.path).resolve() == data.resolve()


def is_run(folder: Path) -> bool:
    """Whether the folder holds a run that has begun, whatever its name."""
    if not (folder / "metrics.jsonl").is_file() or not (folder / _CONFIG).is_file():
        return False
    try:
        return {"data", "model", "train"} <= load_toml(folder / _CONFIG).keys()
    except InputError:
        return False


def pretrained() -> Path:
    """The packaged checkpoint: the preset `quick`, trained on digits."""
    return Path(spairkit.__file__).parent / "pretrained" / "quick"


def new_folder(out: Path | None, stem: str, allowed: Collection[str] = ()) -> Path:
    """Makes the folder `out`, or the next free `runs/<stem>-N`.

    Args:
        stem: characters other than letters, digits, "_" and "-" become "-".
        allowed: names of files that `out` may already hold, besides half-written ones.

    Raises:
        InputError: `out` holds other files, or the system refuses.
    """
    stem = re.sub(r"[^\w-]+", "-", stem)
    try:
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            left = [entry.name for entry in out.iterdir() if entry.name not in allowed]
            if not all(map(durable.is_temporary, left)):
                raise InputError(f"{out}: not empty; name another folder (--out)")
            return out
        ROOT.mkdir(exist_ok=True)
        taken = [re.fullmatch(rf"{re.escape(stem)}-(\d{{1,9}})", p.name) for p in ROOT.iterdir()]
        number = max([int(match[1]) for match in taken if match], default=0)
        while True:
            number += 1
            path = ROOT / f"{stem}-{number}"
            try:
                path.mkdir()
            except FileExistsError:
                continue  # another process was faster
            return path
    except OSError as error:
        place = ROOT if out is None else out
        raise InputError(
            f"cannot create the folder {place}: {error.strerror}; name another (--out)"
        ) from error


def _read_owner(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return "another process"
