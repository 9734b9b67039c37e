"""A run: a folder with the config, the metrics and the checkpoints of a training.

RUN/config.toml
RUN/metrics.jsonl
RUN/checkpoints/step-N/     the last two and the best
RUN/best, RUN/last          links to checkpoints
"""

import dataclasses
import json
import os
import re
import socket
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor

import spairkit
from spairkit.config import Config
from spairkit.config_values import from_dict, load_toml, to_toml
from spairkit.errors import InputError
from spairkit.storage import checkpoints, durable
from spairkit.storage.checkpoints import Checkpoint, Scalar

ROOT = Path("runs")
"""The default folder of runs, below the current folder."""

_CONFIG = "config.toml"
_LOCK, _OWNER = ".lock", ".owner"
_KEEP = 2
_CHECKPOINT = re.compile(r"step-(\d{1,10})")


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
        with run.lock():  # of two processes that come at once, one gets the folder
            if (run.path / _CONFIG).exists():
                raise InputError(f"{run.path}: already holds a run; name another folder (--out)")
            durable.write_text(run.path / _CONFIG, to_toml(config))
        return run

    @classmethod
    def open(cls, path: Path) -> "Run":
        """Opens the run in the folder `path`.

        Raises:
            InputError: there is no run, or its config cannot be used.
        """
        source = path / "config.toml"
        if not source.is_file():
            raise InputError(f"{path}: not a run (no config.toml in it); name the folder of a run")
        return cls(path, from_dict(load_toml(source), str(source)))

    @property
    def checkpoints(self) -> list[tuple[int, Path]]:
        """Step and folder of each checkpoint, the newest first."""
        folder = self.path / "checkpoints"
        if not folder.is_dir():
            return []
        matches = [(_CHECKPOINT.fullmatch(path.name), path) for path in folder.iterdir()]
        return sorted([(int(m[1]), path) for m, path in matches if m], reverse=True)

    def extend(self, steps: int) -> None:
        """Changes the number of updates, the only setting of a run that may change.

        The learning rate is then linear to the new last step, so it may rise on resumption, and the
        result differs from a run that was started with this number.
        """
        train = dataclasses.replace(self.config.train, steps=steps)
        self.config = dataclasses.replace(self.config, train=train)
        durable.write_text(self.path / "config.toml", to_toml(self.config))

    def restart(self, config: Config, record: Mapping[str, Any]) -> None:
        """Gives up what was trained, and begins with another config at the first step.

        A kill in between leaves a run that comes to the same restart again: with the old config and
        fewer checkpoints, or none.

        Args:
            config: of the training that begins.
            record: the line of metrics.jsonl that remains of the old one; its step is 0.
        """
        for link in ("best", "last"):
            (self.path / link).unlink(missing_ok=True)
        for _, path in self.checkpoints:
            durable.remove_folder(path)
        if (self.path / "pictures").is_dir():
            durable.remove_folder(self.path / "pictures")
        known = [old for old in self.metrics() if old.get("kind") == record["kind"]]
        lines = [json.dumps(old) for old in known if old != record] + [json.dumps(dict(record))]
        durable.write_text(self.path / "metrics.jsonl", "".join(f"{line}\n" for line in lines))
        durable.write_text(self.path / "config.toml", to_toml(config))
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
            lock.acquire(timeout=0)
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
        """Writes a checkpoint, points `last` (and `best`) at it, and removes old ones.

        The last two and the best are kept. Checkpoints of later steps are removed: resuming from
        an earlier step has abandoned them. Arguments as in `save_checkpoint`.

        Raises:
            InputError: as `save_checkpoint`.
        """
        folder = self.path / "checkpoints"
        if not folder.is_dir():
            durable.write_folder(folder, {})
        path = checkpoints.save_checkpoint(
            folder,
            step=step,
            config=self.config,
            model=model,
            optimiser=optimiser,
            metrics=metrics,
            environment=environment,
        )
        durable.replace_link(self.path / "last", f"checkpoints/{path.name}")
        if is_best:
            self.mark_best(step)
        past = [old for old_step, old in self.checkpoints if old_step <= step]
        kept = {old.name for old in past[:_KEEP]}
        if (self.path / "best").is_symlink():
            kept.add(Path(os.readlink(self.path / "best")).name)
        for _, old in self.checkpoints:
            if old.name not in kept:
                durable.remove_folder(old)
        return path

    def mark_best(self, step: int) -> None:
        """Points `best` at the checkpoint of `step`, which must exist."""
        durable.replace_link(self.path / "best", f"checkpoints/step-{step}")

    def latest(self) -> Checkpoint | None:
        """The newest undamaged checkpoint, with the optimiser; None if there is none yet.

        Warns of each damaged checkpoint that is skipped.

        Raises:
            InputError: all checkpoints are damaged.
        """
        damage: list[InputError] = []
        for step, path in self.checkpoints:
            try:
                checkpoint = checkpoints.load_checkpoint(path, with_optimiser=True)
            except InputError as error:
                damage.append(error)
                continue
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
        """The lines of metrics.jsonl, without a line that a crash cut short."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return []
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


def newest_run(root: Path = ROOT) -> Path | None:
    """The run below `root` that saved a checkpoint last; None if there is none."""
    links = [link for link in root.glob("*/last") if link.is_symlink() and link.exists()]
    newest = max(links, key=lambda link: (link.lstat().st_mtime_ns, link), default=None)
    return newest.parent if newest else None


def is_run(folder: Path) -> bool:
    """Whether the folder holds a run that has begun, whatever its name."""
    if not (folder / "metrics.jsonl").is_file() or not (folder / "config.toml").is_file():
        return False
    try:
        return {"data", "model", "train"} <= load_toml(folder / "config.toml").keys()
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
