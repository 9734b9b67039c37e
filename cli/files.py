"""The image files that a command is given, and the files that it writes: none of these."""

import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from spairkit.cli.console import say
from spairkit.errors import ImageFileError, InputError

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # as a path, which has no double slashes


@dataclass
class ImageFiles:
    """Files in the order given, those of a folder in the order of their names.

    A file of a folder that cannot be read is skipped. One that is named itself is an error: before
    any work if its header tells, else after all other images are done.
    """

    paths: list[Path]
    numbers: list[int]
    """Ids of `paths`: those of a folder's annotations, or counted from 1, skipped files too."""
    total: int
    """Number of files, skipped ones included."""
    inputs: list[Path]
    """All files that are read, skipped ones and annotations included."""
    named: frozenset[Path | str] = frozenset()
    categories: list[int] = field(default_factory=list)
    """Ids of the categories of a folder's annotations."""
    skipped: list[str] = field(default_factory=list)
    """Why files were skipped, a line for each, which begins with its name."""
    pixels: list[int] = field(default_factory=list)
    """Of each image; of a URL the bytes of its file."""
    urls: list[str] = field(default_factory=list)
    """In place of `paths`, if the images are not on this machine."""
    _failed: bool = False

    @property
    def names(self) -> list[str]:
        """Paths or URLs."""
        return self.urls or [str(path) for path in self.paths]

    def skip(self, path: object, error: ImageFileError) -> None:
        """Notes that a file cannot be read. Raises InputError if no other file is left."""
        self.skipped.append(str(error))
        self._failed |= path in self.named
        if len(self.skipped) == self.total:
            raise (
                error if self.total == 1 else InputError(f"no image can be read: {self._listed()}")
            )

    def conclude(self) -> None:
        """Names the files that were skipped. Raises InputError if one of them was named."""
        if self._failed:
            raise InputError(self._listed())
        if self.skipped:
            say(self._listed())

    def _listed(self) -> str:
        from spairkit.images import skipped_files

        return skipped_files(self.skipped, self.total)


def local_or_remote_files(words: list[str]) -> ImageFiles:
    """`image_files` of paths, or the files of URLs, whose headers are not read.

    Raises:
        InputError: as `image_files`, or URLs cannot be listed, or are among paths.
    """
    from spairkit.images import SUFFIXES
    from spairkit.remote import is_remote, list_remote

    remote = [word for word in words if is_remote(word)]
    if not remote:
        return image_files([Path(word) for word in words])
    if len(remote) < len(words):
        raise InputError("name URLs or files of this machine, not both at once")
    listed = [list_remote(url, SUFFIXES) for url in words]
    urls = [url for some in listed for url, _ in some]
    return ImageFiles(
        paths=[],
        numbers=list(range(1, len(urls) + 1)),
        total=len(urls),
        inputs=[],
        named=frozenset(words) & frozenset(urls),
        pixels=[size for some in listed for _, size in some],
        urls=urls,
    )


def image_files(words: list[Path]) -> ImageFiles:
    """The files that `words`, images and folders, stand for; their headers are read.

    Raises:
        InputError: one does not exist, a named file is no image, or no file can be read.
    """
    from spairkit.config import DataConfig
    from spairkit.data.folder import ANNOTATIONS, ImageFolder
    from spairkit.frames import file_of, frames_of
    from spairkit.images import image_size, list_images

    for word in words:
        if not file_of(word)[0].exists():
            if _URL.match(str(word)):
                raise InputError(f"{word}: only detect and count read URLs; copy the images here")
            raise InputError(f"{word}: no such image or folder")
    annotations = [word / ANNOTATIONS for word in words if (word / ANNOTATIONS).exists()]
    listed = [list_images(word) if word.is_dir() else frames_of(word) for word in words]
    paths = [path for some in listed for path in some]
    inputs = [*dict.fromkeys(file_of(path)[0] for path in paths), *annotations]
    if len(words) == 1 and annotations:
        config = DataConfig(name="folder", path=str(words[0]))
        folder = ImageFolder(config, "test", needs_truth=False)
        paths, ids = map(list, zip(*folder.files(), strict=True))
        return ImageFiles(
            paths,
            ids,
            folder.num_files,
            inputs,
            categories=folder.categories,
            skipped=folder.skipped,
            pixels=[math.prod(image_size(path)) for path in paths],
        )
    named = frozenset(
        path for word, some in zip(words, listed, strict=True) for path in some if not word.is_dir()
    )
    files = ImageFiles([], [], len(paths), inputs, named)
    for number, path in enumerate(paths, start=1):
        try:
            pixels = math.prod(image_size(path))
        except ImageFileError as error:
            if path in named:
                raise
            files.skip(path, error)
        else:
            files.paths.append(path)
            files.numbers.append(number)
            files.pixels.append(pixels)
    return files


def mirrored(words: list[Path], paths: list[Path], folder: Path) -> list[Path]:
    """A name without suffix for each image, in a folder that mirrors what all images lie in.

    Images whose names differ by their suffix only keep it.
    """
    places = [os.path.abspath(word if word.is_dir() else word.parent) for word in words]
    root = Path(os.path.commonpath(places))
    inside = [Path(os.path.abspath(path)).relative_to(root) for path in paths]
    short = [path.with_suffix("") for path in inside]
    sharing = Counter(short)
    names = [name if sharing[name] == 1 else path for name, path in zip(short, inside, strict=True)]
    if len(set(names)) < len(set(inside)):  # as of a.png, a.tif and a.png.png
        names = inside
    return [folder / name for name in names]


FileId = tuple[int, int]


def file_id(path: Path) -> FileId | None:
    """Device and inode, the same for every name of a file and every link to it; None if absent."""
    with suppress(OSError):
        status = os.stat(path)
        return status.st_dev, status.st_ino
    return None


def check_output(path: Path, option: str = "--out") -> None:
    """Refuses an output file that could not be written, before any work is done."""
    if path.is_dir():
        raise InputError(f"{option} {path}: is a folder; name a file")
    if path.exists() and not path.is_file():
        raise InputError(f"{option} {path}: is not a regular file; name another")
    if not path.parent.is_dir():
        raise InputError(f"{option} {path}: there is no folder {path.parent}; create it first")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise InputError(f"{option} {path}: {path.parent} is not writable; name another file")


def check_outputs(outputs: Mapping[str, Path], folders: Mapping[str, Path] | None = None) -> None:
    """`check_output` of several, by their options; no two may be the same file, or a folder.

    Annotations and corrections are not replaced, whatever the images are.
    """
    from spairkit.app.corrections import CORRECTIONS
    from spairkit.data.folder import ANNOTATIONS

    seen = {path.resolve(): option for option, path in (folders or {}).items()}
    for option, path in outputs.items():
        check_output(path, option)
        if path.exists() and path.resolve().name in (ANNOTATIONS, CORRECTIONS):
            raise InputError(f"{option} {path}: holds annotations; name another file")
        if other := seen.get(path.resolve()):
            raise InputError(f"{option} {path}: is the output of {other} too; name another file")
        seen[path.resolve()] = option


def refuse_input(path: Path, inputs: Iterable[Path], option: str = "--out") -> None:
    """Refuses an output that is one of the inputs, by this or any other name of the file.

    Raises:
        InputError: it is; the message names the input.
    """
    own = file_id(path)
    for other in inputs:
        if own is not None and own == file_id(other):
            raise InputError(f"{option} {path}: is an input ({other}); name another file")
