"""The finished images of `detect`, kept beside its output until all are done: OUT.partial.

The first line has a hash of everything that results depend on besides the images; each further line
holds a batch of finished images. The same command, run again after a kill, continues with
the batch that was interrupted, and the result is identical to the bit.
"""

import fcntl
import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spairkit.cli.console import say, several
from spairkit.errors import InputError

if TYPE_CHECKING:
    from spairkit.counts import CountPosterior

_KEY = "spairkit detect"


@dataclass(frozen=True, kw_only=True)
class Finished:
    """The result of one image."""

    name: str
    number: int
    sha256: str
    """Of the image file."""
    rows: list[str]
    """Its part of the output."""
    objects: int
    has_masks: bool
    least_count: int | None
    """With the next two, the posterior of the count; None without one."""
    count_probabilities: list[float]
    count_is_shared: bool
    misfit: str | None
    """Why the model does not fit it."""
    measured: str = ""
    """Its part of the table of objects, if there is to be one."""

    def counts(self) -> "CountPosterior | None":
        """The posterior of the count, if the model gives one."""
        import torch

        from spairkit.counts import CountPosterior

        if self.least_count is None:
            return None
        probabilities = torch.tensor(self.count_probabilities, dtype=torch.float64)
        return CountPosterior(self.least_count, probabilities, self.count_is_shared)


class Partial:
    """Results of finished images, by their number; kept in a file if there is an output."""

    def __init__(self, path: Path, descriptor: int | None) -> None:
        self.path = path
        self.finished: dict[int, Finished] = {}
        self._descriptor = descriptor

    def add(self, batch: list[Finished]) -> None:
        """Adds the images of a batch, and keeps them. Raises InputError if the disk is full."""
        if not batch:
            return
        if self._descriptor is not None:
            self._append([asdict(item) for item in batch])
        self.finished |= {item.number: item for item in batch}

    def read(self, key: str) -> None:
        """Reads what an earlier process has kept, if the key is the same, else begins anew.

        Raises:
            InputError: the file is not one of ours.
        """
        assert self._descriptor is not None
        head = f"{json.dumps({_KEY: key})}\n".encode()
        with open(self._descriptor, "rb", closefd=False) as file:
            lines = file.read().splitlines(keepends=True)
        if lines and not lines[0].startswith(f'{{"{_KEY}": "'.encode()):
            raise InputError(f"{self.path}: is no partial result of detect; remove it")
        if lines and lines[0] != head:
            say(f"{self.path} is of other settings: starting anew")
            lines = []
        end = len(head)
        for line in lines[1:]:
            batch = _parsed(line)
            if batch is None:
                break  # cut short by a crash
            self.finished |= {item.number: item for item in batch}
            end += len(line)
        os.ftruncate(self._descriptor, end if lines else 0)
        if not lines:
            self._append({_KEY: key})

    def _append(self, value: Any) -> None:
        assert self._descriptor is not None
        size = os.fstat(self._descriptor).st_size
        rest = memoryview(f"{json.dumps(value)}\n".encode())
        try:
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
            os.fsync(self._descriptor)
        except OSError as error:
            os.ftruncate(self._descriptor, size)
            raise InputError(f"cannot write {self.path}: {error.strerror}") from error


@contextmanager
def partial_of(out: Path | None, key: Mapping[str, Any]) -> Iterator[Partial]:
    """What is finished of the output `out`; the file is removed if the block ends well.

    Args:
        out: the output; None keeps results in memory only.
        key: the settings that results depend on.

    Raises:
        InputError: another process works on the same output, the file is not one of ours, or the
            system refuses.
    """
    if out is None:
        yield Partial(Path(), None)
        return
    path = out.with_name(f"{out.name}.partial")
    # a link is not followed, and a pipe does not block
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise InputError(f"{path}: is no partial result of detect; remove it")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"{path}: another process works on this output") from None
        partial = Partial(path, descriptor)
        partial.read(json.dumps(key, sort_keys=True))
        try:
            yield partial
        except BaseException:
            if partial.finished:
                kept = several(len(partial.finished), "image")
                say(f"{kept} finished, kept in {path}; the same command goes on")
            else:
                path.unlink(missing_ok=True)
            raise
        path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _parsed(line: bytes) -> list[Finished] | None:
    """A batch; None if the line is not whole."""
    try:
        return [Finished(**item) for item in json.loads(line)] if line.endswith(b"\n") else None
    except (TypeError, ValueError, RecursionError):
        return None
