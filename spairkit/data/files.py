"""The files that data are read from, and their hashes."""

import hashlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from spairkit.config import DataConfig
from spairkit.data.folder import ANNOTATIONS
from spairkit.frames import file_of
from spairkit.images import list_images
from spairkit.names import printable

_NAMED = 3  # files of a kind of change that are named


def data_files(config: DataConfig) -> dict[str, Path]:
    """The files that a dataset is read from, by their path in its folder; none for digits.

    They are the images of a folder and its annotations, one image and the annotations beside it, or
    a file of glyphs.

    Raises:
        InputError: a folder cannot be read, or holds no image.
    """
    if not config.path:
        return {}
    place = Path(config.path)
    if config.name != "folder":
        return {place.name: place}
    folder = place if place.is_dir() else place.parent
    files = [*dict.fromkeys(file_of(path)[0] for path in list_images(place)), folder / ANNOTATIONS]
    return {path.relative_to(folder).as_posix(): path for path in files if path.exists()}


def changed_files(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Says how files have changed, by their hashes: `1 changed (a.png), 2 missing (b.png, c.png)`.

    Empty if they have not.
    """
    kinds = {
        "changed": [name for name in before if now.get(name, before[name]) != before[name]],
        "missing": [name for name in before if name not in now],
        "new": [name for name in now if name not in before],
    }
    said = []
    for kind, names in kinds.items():
        if names:
            more = [f"and {len(names) - _NAMED} more"] if len(names) > _NAMED else []
            listed = ", ".join([*map(printable, names[:_NAMED]), *more])
            said.append(f"{len(names)} {kind} ({listed})")
    return ", ".join(said)


def sha256_of(path: Path) -> str:
    """The sha256 of a file, or of a frame's file, in hexadecimal; empty if it cannot be read."""
    file, frame = file_of(path)
    try:
        if frame is None:
            return _digest(file)
        state = file.stat()
        return _digest_of_stack(file, state.st_mtime_ns, state.st_size)
    except OSError:
        return ""


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@lru_cache(maxsize=1)
def _digest_of_stack(path: Path, changed: int, size: int) -> str:
    """Of a file that has not changed, whose frames follow each other."""
    return _digest(path)


def sha256_of_files(files: Mapping[str, Path]) -> dict[str, str]:
    """`sha256_of` each file, by its name."""
    return {name: sha256_of(path) for name, path in files.items()}
