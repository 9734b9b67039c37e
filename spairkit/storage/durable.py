"""Files that are there whole or not at all, also after a crash, a full disk or a power cut.

Everything goes to a temporary name in the same folder, is flushed to the disk, and takes its own
name in one step; then the folder is flushed too. Modes follow the umask. A process killed half-way
leaves a temporary name behind, which `sweep` removes.

Every function raises InputError where the system refuses (no space, no permission, no folder); what
stood under the name before is then untouched.
"""

import errno
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from spairkit.errors import InputError

_PREFIX = ".spairkit-tmp-"

_ADVICE = {
    errno.ENOSPC: "free some space or write elsewhere",
    errno.EDQUOT: "free some space or write elsewhere",
    errno.EFBIG: "the system limits the size of files here",
    errno.EACCES: "choose a folder that you may write to",
    errno.EPERM: "choose a folder that you may write to",
    errno.EROFS: "choose a folder that you may write to",
    errno.ENOENT: "make its folder first",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
}


def write_bytes(path: Path, data: bytes) -> None:
    """Puts `data` under the name `path`; a link there is followed, as the shell's `>` does.

    Raises:
        InputError: the system refuses, or `path` is something else than a file.
    """
    with _refusals(path):
        target = Path(os.path.realpath(path))
        if target.exists() and not target.is_file():
            raise InputError(f"cannot write {path}: it is not a file; choose another name")
        temporary = _temporary(target)
        try:
            _write_new(temporary, data)
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _flush_folder(target.parent)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of `text` in UTF-8."""
    write_bytes(path, text.encode())


def write_folder(path: Path, files: Mapping[str, bytes]) -> None:
    """Makes the folder `path` with these files in it; it appears with all of them at once.

    A folder of that name is replaced; between its going and the coming of the new one there is a
    moment with neither.
    """
    with _refusals(path):
        temporary = _temporary(path)
        try:
            os.mkdir(temporary)
            for name, data in files.items():
                _write_new(temporary / name, data)
            _flush_folder(temporary)
            if path.is_dir():
                _exchange(temporary, path)
            else:
                os.rename(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _flush_folder(path.parent)


def remove_folder(path: Path) -> None:
    """Removes a folder, which leaves its name before the first of its files goes."""
    with _refusals(path):
        temporary = _temporary(path)
        os.rename(path, temporary)
        shutil.rmtree(temporary, ignore_errors=True)


def replace_link(link: Path, target: str) -> None:
    """Lets the symbolic link `link` point at `target`, relative to the folder of the link."""
    with _refusals(link):
        temporary = _temporary(link)
        try:
            os.symlink(target, temporary)
            os.replace(temporary, link)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _flush_folder(link.parent)


def append_line(path: Path, line: str) -> None:
    """Adds `line` and a line feed to a file, which is made where it is missing.

    A refused line leaves the file as long as it was; a crash may leave a part of the line.
    """
    with _refusals(path):
        new = not path.exists()
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            try:
                _write_all(descriptor, f"{line}\n".encode())
                os.fsync(descriptor)
            except OSError:
                os.ftruncate(descriptor, size)
                raise
        finally:
            os.close(descriptor)
        if new:
            _flush_folder(path.parent)


def sweep(folder: Path) -> None:
    """Removes what a killed process left half-written in `folder`, which nobody else writes to."""
    with _refusals(folder):
        for path in folder.glob(f"{_PREFIX}*"):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _exchange(new: Path, old: Path) -> None:
    """`new` takes the name of the folder `old`, which is removed."""
    aside = _temporary(old)
    os.rename(old, aside)
    try:
        os.rename(new, old)
    except BaseException:
        os.rename(aside, old)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _temporary(path: Path) -> Path:
    return path.with_name(f"{_PREFIX}{secrets.token_hex(8)}")


def _write_new(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        _write_all(descriptor, data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # some network file systems have no such thing for folders, and say so
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


@contextmanager
def _refusals(path: Path) -> Iterator[None]:
    """What the system refuses, as one line about `path`."""
    try:
        yield
    except OSError as error:
        advice = _ADVICE.get(error.errno or 0)
        reason = error.strerror or str(error)
        raise InputError(
            f"cannot write {path}: {reason}{f'; {advice}' if advice else ''}"
        ) from error
