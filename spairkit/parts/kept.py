"""Results of finished parts, kept beside an output until all are done: the folder OUT.parts.

A part is a file that is complete or absent, named by a hash of its images' names and the settings,
so that processes that work on one output at the same time do not disturb each other.
"""

import errno
import fcntl
import hashlib
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from spairkit.errors import InputError
from spairkit.parts.files import version
from spairkit.parts.plan import Part, Result, described
from spairkit.storage.durable import (
    is_temporary,
    make_folder,
    refuse_links,
    remove_folder,
    sweep_beside,
    write_bytes,
)

_LOCK = "spairkit-detect.lock"
_SUFFIX = ".part"
_MAX_BYTES = 1 << 30
_DIGITS = 32  # of the hash in the name of a file
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
_RESULT = TypeAdapter(Result)


class KeptParts:
    """Results by part; in a folder, or in memory if there is none.

    Args:
        folder: of the results; None keeps them in memory.
        settings: what results depend on besides the images.
    """

    def __init__(self, folder: Path | None, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        self.images = 0
        """Finished images that are kept."""
        self._settings = json.dumps(settings, sort_keys=True)
        self._in_memory: dict[str, bytes] = {}

    def add(self, part: Part, result: Result) -> None:
        """Keeps the result of a part. Raises InputError if the system refuses."""
        body = json.dumps(asdict(result)).encode()
        data = b"%s\n%s" % (hashlib.sha256(body).hexdigest().encode(), body)
        name = self._name(part)
        if self.folder is None:
            self._in_memory[name] = data
        else:
            write_bytes(self.folder / name, data)
        self.images += len(result.found)

    def unchanged(self, part: Part) -> Result | None:
        """The result of a part, if it is kept, and images and files are as they were then."""
        result = self._read(part)
        if result is None or result.versions != [version(item) for item in part]:
            return None
        found = {item.name for item in result.found}
        written = [file for item in part if item.name in found for file in item.files]
        if not all(map(os.path.isfile, written)):
            return None
        self.images += len(result.found)
        return result

    def __getitem__(self, part: Part) -> Result:
        """The result of a finished part. Raises InputError if another process has removed it."""
        result = self._read(part)
        if result is None:
            raise InputError(f"{self.folder}: finished parts are gone; run the command again")
        return result

    def has_others(self) -> bool:
        """Whether the folder has any part, of these or of other settings or images."""
        return self.folder is not None and any(
            name.endswith(_SUFFIX) for name in os.listdir(self.folder)
        )

    def _name(self, part: Part) -> str:
        text = f"{self._settings}\n{described(part)}"
        return f"{hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]}{_SUFFIX}"

    def _read(self, part: Part) -> Result | None:
        """The result of a part; None if it is not there, or not whole."""
        name = self._name(part)
        if self.folder is None:
            data = self._in_memory.get(name, b"")
        else:
            data = _contents(self.folder / name)
        digest, _, body = data.partition(b"\n")
        if digest != hashlib.sha256(body).hexdigest().encode():
            return None
        with suppress(ValueError, RecursionError):
            return _RESULT.validate_python(json.loads(body))
        return None


@contextmanager
def kept_parts(
    out: Path | None,
    settings: Mapping[str, Any],
    written: Iterable[Path] = (),
    *,
    shared: bool = False,
) -> Iterator[KeptParts]:
    """What is finished of the output `out`; it is removed if the block ends well.

    Args:
        out: the output; None keeps results in memory only.
        settings: what results depend on besides the images.
        written: the files that this process writes; what killed ones left half-written of them
            is removed too, on a file system with locks.
        shared: other processes that share may work on this output too, and nothing is removed.

    Raises:
        InputError: another process works on the same output, the folder is not one of ours or
            holds links, or the system refuses.
    """
    if out is None:
        yield KeptParts(None, settings)
        return
    folder = out.with_name(f"{out.name}.parts")
    lock = _locked(folder, shared=shared)
    try:
        refuse_links(folder)
        kept = KeptParts(folder, settings)
        try:
            yield kept
        except BaseException:
            if not shared and not kept.images:
                remove_folder(folder)
            raise
        if not shared:
            if _holds(lock):
                sweep_beside([folder, *written])
            remove_folder(folder)
    finally:
        os.close(lock)


def _locked(folder: Path, *, shared: bool) -> int:
    """Makes the folder, and gives the descriptor of its lock, which the system frees at the end.

    On a file system without locks there is none: results of two processes are the same.
    """
    path = folder / _LOCK
    while True:
        _check(folder)
        make_folder(folder)
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
            descriptor = os.open(path, flags, 0o666)
        except FileNotFoundError:
            continue  # another process has just removed the folder
        except OSError as error:
            with suppress(OSError):
                folder.rmdir()
            raise InputError(f"cannot write {path}: {error.strerror}") from error
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(descriptor)
                raise InputError(f"{folder}: another process works on this output") from None
        with suppress(OSError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        os.close(descriptor)


def _holds(lock: int) -> bool:
    """Whether no other process has the lock, which a file system without locks cannot tell."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _check(folder: Path) -> None:
    """Refuses what is not a folder of finished parts."""
    foreign = f"{folder}: is no folder of finished parts of detect; remove it"
    try:
        if not stat.S_ISDIR(folder.lstat().st_mode):
            raise InputError(foreign)
        names = os.listdir(folder)
    except FileNotFoundError:
        return
    except OSError as error:
        raise InputError(f"{folder}: cannot be read: {error.strerror}") from error
    ours = all(name == _LOCK or name.endswith(_SUFFIX) or is_temporary(name) for name in names)
    if not ours:
        raise InputError(foreign)


def _contents(path: Path) -> bytes:
    """The bytes of a regular file of at most 1 GiB, which is no link; empty if there is none."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return b""
    with open(descriptor, "rb") as file:
        about = os.fstat(descriptor)
        whole = stat.S_ISREG(about.st_mode) and about.st_size <= _MAX_BYTES
        return file.read() if whole else b""
