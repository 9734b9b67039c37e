"""Reads an image of an untrusted NumPy file (.npy), without unpickling anything."""

from typing import Any, BinaryIO, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spairkit.errors import ImageFileError
from spairkit.tiff import float_range, of_full_scale, on_black

NUMPY = ".npy"
"""The suffix of NumPy files."""

NUMPY_MAGIC = b"\x93NUMPY"
"""The first bytes of one."""

_MAX_DECODED_BYTES = 1_068_000_000  # as of a TIFF
_MOST_FRAMES = 1_000_000
_LONGEST_HEADER = 10_000


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
