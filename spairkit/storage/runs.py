"""A run: a folder with the config, the metrics, the checkpoints and what `best` and `last` are.

RUN/config.toml
RUN/metrics.jsonl
RUN/checkpoints/step-N/     the last two and the best
RUN/best, RUN/last          links to them
"""

import dataclasses
import json
import os
import re
import socket
import warnings
from collections.abc import Iterator, Mapping
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
"""Where runs go unless told otherwise: below the current folder."""

_KEEP = 2
_CHECKPOINT = re.compile(r"step-(\d{1,10})")


class Run:
    """A run's folder. One process at a time trains in it (`lock`); any may read it meanwhile."""

    def __init__(self, path: Path, config: Config) -> None:
        self.path = path
        self.config = config

    @classmethod
    def create(cls, out: Path | None, config: Config) -> "Run":
        """A new run in the folder `out`, or in the next free `runs/<data>-<preset>-N`; a model
        that is not SPAIR stands in the name.

        Raises:
            InputError: `out` is taken, or cannot be written.
        """
        model = "" if config.model.kind == "spair" else f"-{config.model.kind}"
        stem = f"{config.data.name}-{config.preset}{model}"
        path = next_folder(stem) if out is None else _empty_folder(out)
        durable.write_text(path / "config.toml", to_toml(config))
        return cls(path, config)

    @classmethod
    def open(cls, path: Path) -> "Run":
        """The run in the folder `path`.

        Raises:
            InputError: there is none, or its config cannot be used.
        """
        source = path / "config.toml"
        if not source.is_file():
            raise InputError(f"{path}: not a run: no config.toml in it; name the folder of a run")
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
        """Lets the run go on to `steps` updates; the one thing that may change in a run.

        The line of the learning rate is drawn anew to the new end, so it may rise again where
        the run goes on, and the bits are not those of a run that was begun with so many.
        """
        train = dataclasses.replace(self.config.train, steps=steps)
        self.config = dataclasses.replace(self.config, train=train)
        durable.write_text(self.path / "config.toml", to_toml(self.config))

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps other trainers out while it lasts; what a killed one left half-written goes.

        The system drops the lock of a process that dies, so none is ever stale.

        Raises:
            InputError: another process trains here; the message has its pid and host.
        """
        owner = self.path / ".owner"
        lock = FileLock(self.path / ".lock")
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
            if (self.path / "checkpoints").is_dir():
                durable.sweep(self.path / "checkpoints")
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
        """Writes a checkpoint, lets `last` (and `best`) point at it, and removes the old ones.

        The last two and the best stay. Those of later steps go too: they are of a future that
        resuming from an earlier step gave up.
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
        """Lets `best` point at the checkpoint of `step`, which there must be."""
        durable.replace_link(self.path / "best", f"checkpoints/step-{step}")

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole, with the optimiser; None where there is none yet.

        Warns of each that is passed over because it is damaged.

        Raises:
            InputError: there are checkpoints, and all are damaged.
        """
        damage: list[InputError] = []
        for step, path in self.checkpoints:
            try:
                checkpoint = checkpoints.load_checkpoint(path, with_optimiser=True)
            except InputError as error:
                damage.append(error)
                continue
            for reason in damage:
                warnings.warn(f"{reason}; goes on from step {step}, which is whole", stacklevel=2)
            return checkpoint
        if damage:
            raise InputError(f"{self.path}: no checkpoint is whole; of the newest: {damage[0]}")
        return None

    def log(self, record: Mapping[str, Any]) -> None:
        """Adds a line to metrics.jsonl. `record` has an int `step`; what is not finite is null."""
        endless = {k for k, v in record.items() if isinstance(v, float) and not isfinite(v)}
        plain = {k: None if k in endless else v for k, v in record.items()}
        durable.append_line(self.path / "metrics.jsonl", json.dumps(plain, allow_nan=False))

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; one that a crash cut short is left out."""
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
        """Drops the lines of metrics.jsonl after `step`, which training will write again."""
        kept = [json.dumps(record) for record in self.metrics() if record["step"] <= step]
        durable.write_text(self.path / "metrics.jsonl", "".join(f"{line}\n" for line in kept))


def newest_run(root: Path = ROOT) -> Path | None:
    """The run below `root` that saved a checkpoint last; None where there is none."""
    links = [link for link in root.glob("*/last") if link.is_symlink() and link.exists()]
    newest = max(links, key=lambda link: (link.lstat().st_mtime_ns, link), default=None)
    return newest.parent if newest else None


def pretrained() -> Path:
    """The checkpoint that ships with the package: the `quick` preset on the digits."""
    return Path(spairkit.__file__).parent / "pretrained" / "quick"


def next_folder(stem: str) -> Path:
    """Makes the next free folder `runs/<stem>-N`.

    Raises:
        InputError: the system refuses.
    """
    stem = re.sub(r"[^\w-]+", "-", stem)
    try:
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
        raise InputError(
            f"cannot make a folder in {ROOT}: {error.strerror}; name another with --out"
        ) from error


def _empty_folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
        if (path / "config.toml").exists():
            raise InputError(
                f"{path}: already holds a run; go on with --resume {path}, or name another --out"
            )
        if any(path.iterdir()):
            raise InputError(f"{path}: not empty; name another folder with --out")
    except OSError as error:
        raise InputError(
            f"cannot make the folder {path}: {error.strerror}; name another with --out"
        ) from error
    return path


def _read_owner(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return "another process"
