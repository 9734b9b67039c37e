"""Files that fsspec reads from afar: URLs such as s3://bucket/cells/1.png."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from spairkit.errors import ImageFileError, InputError
from spairkit.names import printable

MAX_BYTES = 1 << 30
"""Of a file, at most, as of images on disk."""

_PROTOCOL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_CHUNK = 1 << 22
_LONGEST = 200  # characters of the reason that a library gives


def is_remote(name: object) -> bool:
    """Whether a word is a URL, and no path."""
    return _PROTOCOL.match(str(name)) is not None


def list_remote(url: str, suffixes: frozenset[str]) -> list[tuple[str, int]]:
    """The URL and size in bytes of each file at and below a URL, sorted.

    A file is taken whatever its name. Below a prefix those with one of the suffixes are, unless a
    part of their name begins with a dot.

    Raises:
        InputError: it cannot be listed, or there is no such file; a package or rights are missing.
    """
    with _store(url) as (files, root):
        known = files.info(root) if files.exists(root) else {}
        if known.get("type") == "file":
            return [(url, int(known.get("size") or 0))]
        below = files.find(root, detail=True)
        names = {name.removeprefix(root).lstrip("/"): about for name, about in below.items()}
    listed = [
        (f"{url.rstrip('/')}/{name}", int(about.get("size") or 0))
        for name, about in names.items()
        if Path(name).suffix.lower() in suffixes
        and not any(part.startswith(".") for part in name.split("/"))
    ]
    if not listed:
        raise InputError(f"{url}: no images there")
    return sorted(listed)


def fetch(url: str, place: Path) -> None:
    """Copies a file to `place`.

    Raises:
        ImageFileError: it is larger than 1 GiB.
        InputError: it cannot be read, or `place` not written.
    """
    with _store(url) as (files, name), files.open(name, "rb") as source, place.open("wb") as target:
        size = 0
        while chunk := source.read(_CHUNK):
            size += len(chunk)
            if size > MAX_BYTES:
                raise ImageFileError(f"{url}: larger than 1 GiB; cut it into smaller images")
            target.write(chunk)


def remote_version(url: str) -> str:
    """What changes with a file: a hash of its size, its date and its tag, as its store knows them.

    Raises:
        InputError: its store cannot be reached.
    """
    with _store(url) as (files, name):
        files.invalidate_cache()
        return str(files.ukey(name))


@contextmanager
def _store(url: str) -> Iterator[tuple[Any, str]]:
    """The file system of a URL, and the name in it; all that goes wrong becomes an InputError."""
    from fsspec.core import url_to_fs

    try:
        yield url_to_fs(url)
    except InputError:
        raise
    except ImportError as error:
        raise InputError(f"{url}: {error}") from None
    except Exception as error:  # each store has exceptions of its own
        reason = " ".join(str(error).split())[:_LONGEST] or type(error).__name__
        known = isinstance(error, FileNotFoundError)
        raise InputError(
            f"{url}: {'no such file' if known else f'cannot be read: {printable(reason)}'}"
        ) from error
