"""Frames of a stack: the path `cells.tif/03` is the third page of the file cells.tif.

A TIFF of several pages and a NumPy array of several images are stacks. Commands, folders and
`Detector.detect_many` take each frame as an image of its own.
"""

import os
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spairkit.errors import ImageFileError
from spairkit.tiff import (
    MAGIC,
    Pages,
    Tiff,
    float_range,
    of_full_scale,
    on_black,
    page_offsets,
    several_pages,
)

NUMPY = ".npy"
"""The suffix of NumPy files."""

_NUMPY_MAGIC = b"\x93NUMPY"
_MAX_DECODED_BYTES = 1_068_000_000  # as of a TIFF
_MOST_FRAMES = 1_000_000
_LONGEST_HEADER = 10_000


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
    try:
        with file.open("rb") as opened:
            stack = open_stack(file, opened, None)
            number = 1 if stack is None or stack.num_channels > 1 else stack.num_frames
    except Exception:  # reading it as an image tells why
        return [path]
    digits = len(str(number))
    return [path] if number == 1 else [path / f"{i:0{digits}}" for i in range(1, number + 1)]


def open_stack(path: Path, file: BinaryIO, frame: int | None) -> "Tiff | NumpyImages | None":
    """The frame of an open TIFF or NumPy file; None for files of other formats.

    Args:
        path: its name.
        frame: from 1; None: of a file with one.

    Raises:
        ImageFileError: it has no such frame, or its layout is not supported.
        Exception: one of `images.DAMAGED`.
    """
    from spairkit.names import printable

    magic = file.read(len(_NUMPY_MAGIC))
    file.seek(0)
    name = printable(path)
    if magic[:4] in MAGIC:
        state = os.fstat(file.fileno())
        pages = _pages(path, state.st_mtime_ns, state.st_size)
        return Tiff(file, name, pages, 1 if frame is None else frame)
    if magic == _NUMPY_MAGIC:
        return NumpyImages(file, name, 1 if frame is None else frame)
    return None


def check_one(stack: "Tiff | NumpyImages", name: str) -> None:
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


class NumpyImages:
    """An open NumPy file (.npy) of images, of which one is read; members as of `Tiff`.

    It holds [H, W], [H, W, 3 or 4], [N, H, W] or [N, H, W, 3 or 4]; a last axis of 3 or 4 is that
    of colours, and a fourth channel is transparency.

    Raises:
        ImageFileError: it has another shape or type, or no such frame.
        Exception: one of `images.DAMAGED`.
    """

    orientation = 1
    pixel_size = None
    has_more = False
    num_channels = 1

    def __init__(self, file: BinaryIO, name: str, frame: int = 1) -> None:
        self._file, self._name = file, name
        shape, self._columns_first, self._dtype = _header(file)
        if self._dtype.kind not in "buif" or self._dtype.itemsize > 8:
            raise ImageFileError(
                f"{name}: a NumPy array of {self._dtype}; save it as uint8, uint16 or float32"
            )
        colours = shape[-1] if len(shape) > 2 and shape[-1] in (3, 4) else 1
        axes = shape if colours == 1 else shape[:-1]
        if len(axes) not in (2, 3):
            raise ImageFileError(
                f"{name}: a NumPy array of shape {list(shape)}; images are [H, W], [H, W, 3], "
                "[N, H, W] or [N, H, W, 3]"
            )
        if 0 in shape:
            raise ImageFileError(f"{name}: the array is empty, of shape {list(shape)}")
        self.num_frames = axes[0] if len(axes) == 3 else 1
        if self.num_frames > _MOST_FRAMES:
            raise ImageFileError(f"{name}: {self.num_frames} images are more than a million")
        if not 1 <= frame <= self.num_frames:
            raise ImageFileError(f"{name}: there is no image {frame}; it has {self.num_frames:,}")
        self._shape, self._frame, self._colours = shape, frame, colours
        self.stored_size: tuple[int, int] = axes[-2], axes[-1]

    def pixels(self) -> Tensor:  # [1 or 3, H, W] uint8, uint16 or float32
        """The image; values as in `images.read_pixels`. Errors as of the class."""
        height, width = self.stored_size
        size = height * width * self._colours * self._dtype.itemsize
        if size > _MAX_DECODED_BYTES:
            raise ImageFileError(f"{self._name}: the image takes more than 1 GB; cut it smaller")
        array = self._read(size).reshape(height, width, self._colours).transpose(2, 0, 1)
        if array.dtype == bool:
            array = array.astype(np.uint8) * np.uint8(255)
        array = np.array(array, array.dtype.newbyteorder("="), order="C")
        if array.dtype.kind == "u" and array.itemsize <= 2:
            if len(array) == 4:
                array = on_black(array).astype(array.dtype)
            return torch.from_numpy(of_full_scale(array, int(np.iinfo(array.dtype).max)))
        if len(array) == 4:
            raise ImageFileError(
                f"{self._name}: {array.dtype} with transparency; save uint8 or uint16, or no "
                "fourth channel"
            )
        return torch.from_numpy(float_range(array, self._name))

    def _read(self, size: int) -> NDArray[Any]:
        """The values of the frame, in the order of their axes."""
        start = self._file.tell()
        if self._columns_first:  # Fortran's order
            mapped = np.memmap(
                cast(Any, self._file), self._dtype, "r", start, self._shape, order="F"
            )
            frame = mapped[self._frame - 1] if self.num_frames > 1 else mapped
            return np.array(frame, order="C")
        self._file.seek(start + (self._frame - 1) * size)
        data = self._file.read(size)
        self._file.seek(start)
        if len(data) != size:
            raise ValueError("the file ends too early")
        return np.frombuffer(data, self._dtype)


def _header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether the first axis runs fastest, and type; `file` then stands at the values."""
    version = np.lib.format.read_magic(cast(Any, file))
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in readers:
        raise ValueError(f"version {version} of NumPy's format")
    return readers[version](cast(Any, file), max_header_size=_LONGEST_HEADER)
