"""Frames of a stack: the path `cells.tif/03` is the third page of the file cells.tif.

A TIFF of several pages and a NumPy array of several images are stacks. Commands, folders and
`Detector.detect_many` take each frame as an image of its own.
"""

import os
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from spairkit.errors import ImageFileError
from spairkit.names import printable
from spairkit.numpy_images import NUMPY_MAGIC, NumpyImages
from spairkit.tiff import MAGIC, Tiff
from spairkit.tiff_pages import Pages, page_offsets, several_pages


def file_of(path: Path | str) -> tuple[Path, int | None]:
    """The file that an image lies in, and the number of its frame; None if it is no frame.

    Example:
        >>> file_of("nothing/03")
        (PosixPath('nothing/03'), None)
    """
    path = Path(path)
    if path.name.isdecimal() and len(path.name) < 10 and path.parent.is_file():
        return path.parent, int(path.name)
    return path, None


def frames_of(path: Path) -> list[Path]:
    """The frames of a stack, as `stack.tif/01`, or the path of any other file.

    A file that cannot be read stays as it is, and so does one whose pages are channels.
    """
    file, frame = file_of(path)
    if frame is not None:
        return [path]
    number, channels = _frames(file)
    if number == 1 or channels > 1:
        return [path]
    digits = len(str(number))
    return [path / f"{i:0{digits}}" for i in range(1, number + 1)]


def refuse_remote_stack(place: Path, url: str) -> None:
    """Raises ImageFileError if the file of a URL, which lies at `place`, has several frames."""
    number, _ = _frames(place)
    if number > 1:
        raise ImageFileError(
            f"{url}: a stack of {several_pages(number)}; from URLs, only single images are read; "
            "copy it to this machine"
        )


def _frames(file: Path) -> tuple[int, int]:
    """The numbers of frames and of channels of a file; 1 if it cannot be read."""
    try:
        with file.open("rb") as opened:
            stack = open_stack(file, opened, None)
            return (1, 1) if stack is None else (stack.num_frames, stack.num_channels)
    except Exception:  # reading it as an image tells why
        return 1, 1


def open_stack(path: Path, file: BinaryIO, frame: int | None) -> Tiff | NumpyImages | None:
    """The frame of an open TIFF or NumPy file; None for files of other formats.

    Args:
        path: its name.
        frame: from 1; None: of a file with one.

    Raises:
        ImageFileError: it has no such frame, or its layout is not supported.
        Exception: one of `images.DAMAGED`.
    """
    magic = file.read(len(NUMPY_MAGIC))
    file.seek(0)
    name = printable(path)
    if magic[:4] in MAGIC:
        state = os.fstat(file.fileno())
        pages = _pages(path, state.st_mtime_ns, state.st_size)
        return Tiff(file, name, pages, 1 if frame is None else frame)
    if magic == NUMPY_MAGIC:
        return NumpyImages(file, name, 1 if frame is None else frame)
    return None


def check_one(stack: Tiff | NumpyImages, name: str) -> None:
    """Raises ImageFileError for a stack of several frames of which none was named."""
    number = stack.num_frames
    if number == 1:
        return
    example = f"{name}/{1:0{len(str(number))}}"
    if stack.num_channels > 1:
        raise ImageFileError(
            f"{name}: {several_pages(number)} of {stack.num_channels} channels; name the pages of "
            f"one channel, as {example}, or save one channel"
        )
    raise ImageFileError(
        f"{name}: a stack of {several_pages(number)}; name one, as {example}, or use detect_many"
    )


@lru_cache(maxsize=1 << 10)
def _pages(path: Path, changed: int, size: int) -> Pages:
    """The pages of a TIFF that has not changed, which are looked for once."""
    with path.open("rb") as file:
        return page_offsets(file)
