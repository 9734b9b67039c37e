"""Durable writes: a file is complete or absent, even after a crash, a full disk or a power cut.

Data is written to a temporary name in the same folder, flushed to disk and renamed in one step;
then the folder is flushed. Modes follow the umask. A killed process leaves a temporary name behind,
which `sweep` and `sweep_beside` remove.

Every function raises InputError if the system refuses (no space, no permission, no folder); an
existing file of that name is then unchanged.
"""

import errno
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from spairkit.errors import InputError

_PREFIX = ".spairkit-tmp-"
_DIGITS = 16  # of a hash of the path, after which a temporary name is random

_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)

_ADVICE = {
    errno.ENOSPC: "free some space or write elsewhere",
    errno.EDQUOT: "free some space or write elsewhere",
    errno.EFBIG: "the system limits the size of files here",
    errno.EACCES: "choose a folder that you may write to",
    errno.EPERM: "choose a folder that you may write to",
    errno.EROFS: "choose a folder that you may write to",
    errno.ENOENT: "create its folder first",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
}


def write_bytes(path: Path, data: bytes) -> None:
    """Writes `data` to `path`; a link is followed, as by the shell's `>`.

    Raises:
        InputError: the system refuses, or `path` is not a regular file.
    """
    _write(path, [data])


def _write(path: Path, pieces: Iterable[bytes]) -> None:
    with _refusals(path):
        target = Path(os.path.realpath(path))
        if target.exists() and not target.is_file():
            raise InputError(f"cannot write {path}: it is not a file; choose another name")
        with _replacing(target) as temporary:
            _write_new(temporary, pieces)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of `text` in UTF-8; bytes of file names that are not UTF-8 are escaped."""
    write_texts(path, [text])


def write_texts(path: Path, pieces: Iterable[str]) -> None:
    """`write_text` of pieces one after the other, of which one is held at a time.

    An exception of the iterable leaves `path` as it was.
    """
    _write(path, (piece.encode(errors="backslashreplace") for piece in pieces))


def write_folder(path: Path, files: Mapping[str, bytes]) -> None:
    """Makes the folder `path`; it appears with all its files at once.

    An existing folder is replaced; for a moment between the two renames neither is there.
    """
    with _refusals(path):
        temporary = _temporary(path)
        try:
            os.mkdir(temporary)
            for name, data in files.items():
                _write_new(temporary / name, [data])
            _flush_folder(temporary)
            if path.is_dir():
                _exchange(temporary, path)
            else:
                os.rename(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _flush_folder(path.parent)


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """Yields a new folder of another name; it becomes `path` if the block ends well, or is removed.

    Raises:
        InputError: the system refuses, or there is something at `path`.
    """
    temporary = _temporary(path)
    with _refusals(path):
        os.mkdir(temporary)
    try:
        yield temporary
        with _refusals(path):
            _flush_folder(temporary)
            os.rename(temporary, path)
            _flush_folder(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def make_folder(path: Path) -> None:
    """Makes the folder `path` if it is missing. Raises InputError if the system refuses."""
    with _refusals(path):
        path.mkdir(exist_ok=True)


def remove_folder(path: Path) -> None:
    """Renames the folder away, then deletes it."""
    with _refusals(path):
        temporary = _temporary(path)
        os.rename(path, temporary)
        shutil.rmtree(temporary, ignore_errors=True)


def replace_link(link: Path, target: str) -> None:
    """Points the symbolic link `link` at `target`, a path relative to its folder.

    On a file system without links it does nothing.
    """
    with _refusals(link), suppress(_NoLinks), _replacing(link) as temporary:
        try:
            os.symlink(target, temporary)
        except OSError as error:
            if error.errno in _NO_LINKS:
                raise _NoLinks from error
            raise


def append_line(path: Path, line: str) -> None:
    """Appends `line` and a line feed to a file, which is created if it is missing; no link.

    If the system refuses, the file keeps its length; a crash may leave a part of the line.
    """
    with _refusals(path):
        new = not path.exists()
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666)
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


def is_temporary(name: str) -> bool:
    """Whether a file or folder of this name is what a killed process left half-written."""
    return name.startswith(_PREFIX)


def sweep(folder: Path, least_age: float = 0.0) -> None:
    """Removes what killed processes left half-written in `folder` and its subfolders.

    Args:
        folder: no other process may write to it, unless there is a least age.
        least_age: in seconds; what changed later may be in use.
    """
    before = time.time() - least_age
    with _refusals(folder):
        for root, folders, files in os.walk(folder):
            for name in filter(is_temporary, [*folders, *files]):
                path = Path(root, name)
                with suppress(FileNotFoundError):  # it was in use
                    if path.lstat().st_mtime > before:
                        continue
                    _remove(path)
            folders[:] = [name for name in folders if not is_temporary(name)]


def sweep_beside(paths: Iterable[Path]) -> None:
    """Removes what killed processes left half-written of these files and folders.

    Args:
        paths: no other process may write them. Others may be written in the same folders.
    """
    beginnings: dict[Path, set[str]] = {}
    for path in map(Path, map(os.path.realpath, paths)):
        beginnings.setdefault(path.parent, set()).add(_beginning(path))
    for folder, ours in beginnings.items():
        with _refusals(folder):
            for name in os.listdir(folder) if folder.is_dir() else ():
                if name[: len(_PREFIX) + _DIGITS] in ours:
                    with suppress(FileNotFoundError):  # another process removed it
                        _remove(folder / name)


def refuse_links(folder: Path, but: Collection[str] = ()) -> None:
    """Refuses a folder of ours that holds links, which could lead writes and deletions elsewhere.

    Args:
        folder: may itself be a link; what is below it, at any depth, may not.
        but: names of links that are never followed.

    Raises:
        InputError: there is a link, which is named.
    """
    for root, folders, files in os.walk(folder):
        for name in sorted([*folders, *files]):
            path = Path(root, name)
            # a kill between two steps of `replace_link` leaves a link, which `sweep` removes
            if name not in but and not is_temporary(name) and path.is_symlink():
                raise InputError(
                    f"{path}: is a link, and spairkit follows none in its own folders; replace it "
                    "by what it points to, or remove it"
                )


def _exchange(new: Path, old: Path) -> None:
    """Replaces the folder `old` by `new`."""
    aside = _temporary(old)
    os.rename(old, aside)
    try:
        os.rename(new, old)
    except BaseException:
        os.rename(aside, old)
        raise
    shutil.rmtree(aside, ignore_errors=True)


class _NoLinks(Exception):
    """The file system has no symbolic links."""


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary name, which then replaces `path`, or is removed if the block fails."""
    temporary = _temporary(path)
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _flush_folder(path.parent)


def _temporary(path: Path) -> Path:
    return path.with_name(f"{_beginning(path)}{secrets.token_hex(8)}")


def _beginning(path: Path) -> str:
    """How the temporary names of a path begin."""
    return _PREFIX + hashlib.sha256(os.fsencode(path.name)).hexdigest()[:_DIGITS]


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink()


def _write_new(path: Path, pieces: Iterable[bytes]) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        for piece in pieces:
            _write_all(descriptor, piece)
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
        # some network file systems cannot flush folders
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


@contextmanager
def _refusals(path: Path) -> Iterator[None]:
    """Turns an OSError into an InputError of one line about `path`."""
    try:
        yield
    except OSError as error:
        advice = _ADVICE.get(error.errno or 0)
        reason = error.strerror or str(error)
        raise InputError(
            f"cannot write {path}: {reason}{f'; {advice}' if advice else ''}"
        ) from error
