"""Pictures of image files for the page: whole, reduced, or a part of one."""

import io
import threading
from collections import OrderedDict
from pathlib import Path

from PIL import Image

from spairkit.errors import InputError
from spairkit.frames import file_of
from spairkit.images import read_image
from spairkit.report.drawing import display_levels, reduced

MAX_SIDE = 2048
"""Pixels of a picture, in its longer side."""

_MAX_READ = 1 << 28  # bytes of decoded images that are kept
_LOSSLESS = 1 << 20  # pixels; larger pictures are JPEG
_QUALITY = 90

Region = tuple[int, int, int, int]
"""x, y, width and height, px of the file."""


class Pictures:
    """Draws files at the levels that spairkit shows; decodes one at a time, and keeps a few."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._read: OrderedDict[tuple[Path, str], Image.Image] = OrderedDict()

    @staticmethod
    def version(path: Path) -> str:
        """A text that changes when the file of an image does. Raises InputError if it is gone."""
        try:
            state = file_of(path)[0].stat()
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}") from None
        return f"{state.st_ino}-{state.st_mtime_ns}-{state.st_size}"

    def draw(self, path: Path, side: int, region: Region | None = None) -> tuple[bytes, str]:
        """A picture of a file, or of a region of it, and its media type.

        Args:
            side: of the picture at most, px; no file is enlarged.
            region: is cut off at the edges of the file; one outside gives a pixel at the edge.

        Raises:
            InputError: the file cannot be read.
        """
        with self._lock:
            whole = self._whole(path)
        x, y, width, height = region or (0, 0, whole.width, whole.height)
        x, y = min(max(x, 0), whole.width - 1), min(max(y, 0), whole.height - 1)
        part = whole.crop((x, y, min(x + width, whole.width), min(y + height, whole.height)))
        part.thumbnail((side, side), Image.Resampling.BOX)
        data = io.BytesIO()
        if part.width * part.height <= _LOSSLESS:
            part.save(data, format="PNG", compress_level=3)
            return data.getvalue(), "image/png"
        part.save(data, format="JPEG", quality=_QUALITY)
        return data.getvalue(), "image/jpeg"

    def _whole(self, path: Path) -> Image.Image:
        key = path, self.version(path)
        if key in self._read:
            self._read.move_to_end(key)
            return self._read[key]
        pixels = read_image(path)
        picture = reduced(pixels, max(pixels.shape[1:]), display_levels(pixels))
        size = picture.width * picture.height * 3
        if size <= _MAX_READ:
            self._read[key] = picture
            while sum(p.width * p.height * 3 for p in self._read.values()) > _MAX_READ:
                self._read.popitem(last=False)
        return picture
