"""Reads a page of an untrusted TIFF, exactly, or refuses its layout by name.

tifffile parses the tags; blocks are decoded here, into no more memory than the tags promise.
"""

import logging
import math
import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NoReturn, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from spairkit.backends import runs_compiled
from spairkit.errors import ImageFileError
from spairkit.tiff_pages import MOST_PAGES, Head, Pages, several_pages

Array = NDArray[Any]
Data = bytes | NDArray[np.uint8]

# tifffile logs what is wrong with a file; without a handler that goes to stderr
logging.getLogger("tifffile").addHandler(logging.NullHandler())

MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""The first four bytes of a TIFF."""

_MAX_DECODED_BYTES = 1_068_000_000  # 178 million pixels of 16-bit RGB
_MAX_RATIO = 1500  # of LZW 1,400, of deflate 1,032, of packbits 64
_STRIP_PIXELS = 1 << 22
_GREY, _RGB, _PALETTE, _CMYK = 1, 2, 3, 5
_WHITE_IS_ZERO = 0
_COMPRESSIONS = (1, 5, 8, 32773, 32946)  # none, LZW, deflate, packbits, deflate again
_PREMULTIPLIED, _ALPHA = 1, 2
_KINDS = {1: "uint", 2: "int", 3: "float", 5: "complex int", 6: "complex float"}
_COLOURS = {_GREY: 1, _RGB: 3, _PALETTE: 1, _CMYK: 4}
_ORIENTATION, _COLORMAP, _PHOTOMETRIC, _INK_SET = 274, 320, 262, 332
_X_RESOLUTION, _Y_RESOLUTION, _RESOLUTION_UNIT = 282, 283, 296
_RESOLUTION_UNITS = {2: 25_400.0, 3: 10_000.0}  # inch and centimetre, in µm
_IMAGEJ_UNITS = {
    "nm": 1e-3,
    **dict.fromkeys(("um", "\u00b5m", "\u03bcm", "\\u00B5m", "micron", "microns"), 1.0),
    "mm": 1e3,
    "cm": 1e4,
    "m": 1e6,
    **dict.fromkeys(("inch", "in"), 25_400.0),
}
_OME_SIZE = re.compile(r"""\bPhysicalSize([XY])\s*=\s*["']([\d.eE+-]{1,32})["']""")
_OME_UNIT = re.compile(r"""\bPhysicalSize([XY])Unit\s*=\s*["']([^"']{1,16})["']""")
_SCREENS = (72.0, 96.0)  # pixels per inch that programs write where they know nothing
_LEAST_UM, _MOST_UM = 1e-6, 1e9  # of the side of a pixel, else the tag means nothing
_SIZE_C = re.compile(r"""\bSizeC\s*=\s*["']\s*0*([1-9]\d{0,5})["']""")  # in OME's XML
_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


class Tiff:
    """A page of an open TIFF: its header is read and its layout checked.

    Args:
        file: the open file.
        name: its name in messages.
        pages: the `page_offsets` of the file.
        frame: the number of the page, from 1.

    Attributes:
        stored_size: height and width before the page is turned upright.
        orientation: as in EXIF, from 1 to 8.
        num_frames: the number of pages, or of the planes of an ImageJ stack that has one page.
        num_channels: of a stack by OME or ImageJ, whose pages are of one channel each; else 1.
        has_more: whether there are planes of a MetaMorph stack besides, or pages of another size,
            which are not read.
        pixel_size: width and height of a stored pixel in µm, from the tags of resolution and the
            unit of ImageJ, or from OME; None where there are none, see `micrometres`.

    Raises:
        ImageFileError: the layout is not supported; the message names it.
        Exception: one of `images.DAMAGED`.
    """

    def __init__(self, file: BinaryIO, name: str, pages: Pages, frame: int = 1) -> None:
        from tifffile import TiffFile, TiffPage

        self._file, self._name = file, name
        with TiffFile(cast(Any, Head(file)), name=name) as tiff:
            page = tiff.pages.first
            planes = _planes_of_imagej(tiff)
            in_pages = len(pages.offsets) > 1 or planes == 1
            self.num_frames = len(pages.offsets) if in_pages else planes
            if not 1 <= frame <= self.num_frames:
                raise ImageFileError(
                    f"{name}: there is no page {frame}; it has {several_pages(self.num_frames)}"
                )
            self.num_channels = _num_channels(tiff) if self.num_frames > 1 else 1
            if frame > 1 and in_pages:
                tiff.filehandle.seek(pages.offsets[frame - 1])
                page = TiffPage(tiff, index=frame - 1)
            self._order = tiff.byteorder
            tags = {
                code: page.tags.valueof(code, 0)
                for code in (_ORIENTATION, _COLORMAP, _PHOTOMETRIC, _INK_SET)
                if code in page.tags
            }
            first = tiff.pages.first
            self.has_more = pages.others or (first.is_stk and first.tags[33629].count > 1)
            self.pixel_size = _pixel_size(tiff)
        self.stored_size = _whole(page.imagelength), _whole(page.imagewidth)
        turn = tags.get(_ORIENTATION, 1)
        self.orientation = int(turn) if turn in range(1, 9) else 1
        self._samples = _whole(page.samplesperpixel)
        extra = tuple(page.extrasamples)
        colours = self._samples - len(extra)
        # a file without the tag is read as libtiff reads it
        photometric = tags.get(_PHOTOMETRIC, _RGB if colours == 3 else _GREY)
        self._inverted = photometric == _WHITE_IS_ZERO
        self._photometric = _GREY if self._inverted else int(photometric)
        self._kind = int(page.sampleformat) if isinstance(page.sampleformat, int) else 0
        self._bits = page.bitspersample if isinstance(page.bitspersample, int) else 0
        self._compression = page.compression
        self._predictor = 1 if page.compression == 1 else int(page.predictor)
        self._reversed = page.fillorder == 2
        self._colormap = tags.get(_COLORMAP)
        if page.imagedepth != 1 or page.tiledepth != 1:
            self._refuse("volumes; save each plane as an image of its own")
        if page.compression not in _COMPRESSIONS:
            raise ImageFileError(
                f"{name}: a TIFF compressed by {_called(page.compression)}; save it with LZW, "
                "deflate or no compression, or as PNG"
            )
        if tags.get(_INK_SET, 1) != 1:
            self._refuse("inks other than CMYK")
        self._check_samples(page)
        # with an unnamed fourth sample RGB is RGBX
        others = self._samples - _COLOURS[self._photometric]
        self._extra = int(extra[-1]) if others and extra else 0
        self._check_channels(others)
        self._separate = page.planarconfig == 2 and self._samples > 1
        self._offsets = list(page.dataoffsets)
        self._counts = page.databytecounts
        self._tiled = bool(page.tilewidth)
        height, width = self.stored_size
        if frame > 1 and not in_pages:
            self._step_to_plane(frame - 1)
        self._block = (
            (_whole(page.tilelength), _whole(page.tilewidth))
            if self._tiled
            else (min(_whole(page.rowsperstrip), height), width)
        )

    def pixels(self) -> Tensor:  # [1 or 3, H, W] uint8, uint16 or float32
        """The page as it is stored, before it is turned; values as in `images.read_pixels`.

        Raises:
            ImageFileError: it holds values that are not finite, or takes over 1.07 GB.
            Exception: one of `images.DAMAGED`.
        """
        values = self._planes()
        colours = values[: _COLOURS[self._photometric]]
        if not self._has_full_scale:
            return torch.from_numpy(float_range(colours, self._name, self._inverted))
        full = (1 << self._bits) - 1
        if self._inverted:
            np.subtract(values.dtype.type(full), colours, out=colours)
        if self._photometric == _PALETTE:
            return torch.from_numpy(self._looked_up(colours))
        if self._photometric == _CMYK:
            colours = _in_strips(values, 3, values.dtype, _cmyk_to_rgb)
        elif self._extra == _ALPHA:
            colours = _in_strips(values, len(colours), values.dtype, on_black)
        return torch.from_numpy(of_full_scale(colours, full))

    @property
    def _has_full_scale(self) -> bool:
        """Whether the greatest value of the type is white."""
        return _KINDS[self._kind] == "uint" and self._bits <= 16

    def _step_to_plane(self, plane: int) -> None:
        """Moves the blocks to a further plane of ImageJ, which lies behind the first."""
        height, width = self.stored_size
        size = height * -(-width * self._samples * self._bits // 8)
        ends = [a + n for a, n in zip(self._offsets, self._counts, strict=True)]
        if self._compression != 1 or self._tiled or self._offsets[1:] != ends[:-1]:
            self._refuse("planes that do not follow each other")
        self._offsets = [offset + plane * size for offset in self._offsets]

    def _check_samples(self, page: Any) -> None:
        kind = _KINDS.get(self._kind)
        if not isinstance(page.bitspersample, int):
            self._refuse("samples of different bits")
        if kind is None or kind.startswith("complex"):
            self._refuse(f"{kind or 'undefined'} samples")
        sizes = (16, 32, 64) if kind == "float" else (8, 16, 32, 64)
        if self._bits not in (*sizes, *(range(1, 16) if kind == "uint" else ())):
            self._refuse(f"{self._bits}-bit {kind} samples")
        if self._photometric not in _COLOURS:
            self._refuse(f"photometric interpretation {_called(page.photometric)}")
        if self._predictor not in (1, 2, 3):
            self._refuse(f"predictor {self._predictor}")
        whole_bytes = self._bits in (8, 16, 32, 64)
        if self._predictor != 1 and (
            self._compression == 32773
            or not whole_bytes
            or (self._predictor == 3) > (kind == "float")
        ):
            self._refuse(f"predictor {self._predictor} on {self._bits}-bit {kind} samples")

    def _check_channels(self, others: int) -> None:
        kind, photometric = _KINDS[self._kind], self._photometric
        if others < 0:
            raise ValueError(f"{self._samples} samples are too few for its colours")
        if others > 1 or (photometric == _GREY and others and not self._extra):
            self._refuse(
                f"{self._samples} channels, not marked as RGB or transparency; save the channel "
                "to look at as grey"
            )
        if others and photometric in (_PALETTE, _CMYK):
            self._refuse("a palette or CMYK with further channels")
        special = photometric in (_PALETTE, _CMYK) or self._extra == _ALPHA
        if special and not self._has_full_scale:
            self._refuse(f"{self._bits}-bit {kind} samples with transparency, a palette or CMYK")
        if photometric == _PALETTE:
            if self._bits > 8:
                self._refuse(f"a palette of {self._bits} bits")
        elif self._samples > 1 and self._has_full_scale and self._bits not in (8, 16):
            self._refuse(f"{self._bits}-bit colours")

    def _refuse(self, layout: str) -> NoReturn:
        remedy = "" if ";" in layout else "; save it as grey or RGB of 8 or 16 bits"
        raise ImageFileError(f"{self._name}: a TIFF of {layout}{remedy}")

    def _planes(self) -> Array:  # [S, H, W] in the machine's byte order
        height, width = self.stored_size
        dtype = self._dtype()
        if height * width * self._samples * dtype.itemsize > _MAX_DECODED_BYTES:
            raise ImageFileError(
                f"{self._name}: {height}x{width} pixels of {self._samples * dtype.itemsize} bytes "
                "are more than 1 GB; cut it into smaller images"
            )
        rows, columns = self._block
        down, across = -(-height // rows), -(-width // columns)
        planes = self._samples if self._separate else 1
        if len(self._offsets) != down * across * planes:
            raise ValueError(f"{len(self._offsets)} blocks of {down * across * planes} are there")
        values = np.empty((self._samples, height, width), dtype)
        block = 0
        for plane in range(planes):
            part = values[plane : plane + 1] if self._separate else values
            for top in range(0, height, rows):
                for left in range(0, width, columns):
                    here = part[:, top : top + rows, left : left + columns]
                    # strips end with the image, tiles go beyond it
                    self._fill(here, rows if self._tiled else here.shape[1], columns, block)
                    block += 1
        return values

    def _dtype(self) -> np.dtype[Any]:
        bytes_ = next(size for size in (1, 2, 4, 8) if 8 * size >= self._bits)
        return np.dtype(f"{ {'uint': 'u', 'int': 'i', 'float': 'f'}[_KINDS[self._kind]] }{bytes_}")

    def _fill(self, values: Array, rows: int, columns: int, block: int) -> None:
        """Decodes a block of rows and columns; `values` [S, h, w] are its part of the image."""
        samples, height, width = values.shape
        row_bytes = -(-columns * samples * self._bits // 8)
        if rows * row_bytes > 2 * _MAX_DECODED_BYTES:
            raise ValueError("a block is larger than 2 GB")
        offset = int(self._offsets[block])
        stored = int(self._counts[block]) if block < len(self._counts) else 0
        plain = self._compression == 1
        if offset == 0:
            raise ValueError("a block is missing")
        if plain and 0 < stored < rows * row_bytes:  # 0 and none: not told
            raise ValueError("a block is too short")
        whole = b"" if plain else self._decoded(offset, stored, rows * row_bytes)
        step = max(_STRIP_PIXELS // (columns * samples), 1)
        for top in range(0, height, step):
            number = min(step, height - top)
            start, size = top * row_bytes, number * row_bytes
            data = self._stored(offset + start, size) if plain else whole[start : start + size]
            found = self._unpacked(data, number, columns, samples)
            values[:, top : top + number] = found[:, :width].transpose(2, 0, 1)

    def _decoded(self, offset: int, stored: int, size: int) -> Data:
        """The `size` bytes of a compressed block of `stored` bytes."""
        if size > _MAX_RATIO * stored:
            raise ValueError("a block is too short")
        return _DECODERS[self._compression](self._stored(offset, stored), size, self._name)

    def _stored(self, offset: int, size: int) -> bytes:
        self._file.seek(offset)
        data = self._file.read(size)
        if len(data) != size:
            raise ValueError("the file ends too early")
        return data.translate(_REVERSED) if self._reversed else data

    def _unpacked(
        self, data: Data, rows: int, columns: int, samples: int
    ) -> Array:  # [rows, columns, samples]
        dtype = self._dtype()
        if self._bits % 8:
            # each row begins at a byte
            bits = np.unpackbits(np.frombuffer(data, np.uint8).reshape(rows, -1), axis=1)
            bits = bits[:, : columns * samples * self._bits]
            bits = bits.reshape(rows, columns, samples, self._bits)
            weights = (1 << np.arange(self._bits)[::-1]).astype(dtype)
            return cast(Array, bits @ weights)
        if self._predictor == 3:
            differences = np.frombuffer(data, np.uint8).reshape(rows, -1, samples)
            summed = np.add.accumulate(differences, axis=1, dtype=np.uint8)
            parts = summed.reshape(rows, dtype.itemsize, -1)  # most significant bytes first
            whole = np.ascontiguousarray(parts.transpose(0, 2, 1)).view(dtype.newbyteorder(">"))
            return whole.reshape(rows, columns, samples)
        stored = np.frombuffer(data, dtype.newbyteorder(self._order))
        stored = stored.reshape(rows, columns, samples)
        if self._predictor == 1:
            return stored
        whole = stored.astype(dtype).view(f"u{dtype.itemsize}")
        return np.add.accumulate(whole, axis=1, out=whole).view(dtype)

    def _looked_up(self, values: Array) -> Array:  # [1, H, W] -> [3, H, W] uint8
        colours = np.asarray(self._colormap).reshape(3, 1 << self._bits)
        # some programs write bytes
        colours = (colours >> 8 if colours.max() > 255 else colours).astype(np.uint8)
        return _in_strips(values, 3, np.dtype(np.uint8), lambda part: colours[:, part[0]])


def of_full_scale(values: Array, full: int) -> Array:
    """Unsigned values of which `full` is white: uint8 or uint16 if that is exact, else float32.

    Args:
        values: uint8 or uint16, any shape, at most `full`; maybe overwritten.
    """
    for dtype in (np.uint8, np.uint16):
        most = int(np.iinfo(dtype).max)
        if most % full == 0:
            values = values.astype(dtype, copy=False)
            if most > full:
                values *= dtype(most // full)
            return values
    return values / np.float32(full)


def _whole(value: Any) -> int:
    """The value of a tag that is a number from 1."""
    if not isinstance(value, int) or value < 1:
        raise ValueError("a size is missing or 0")
    return value


def _called(value: Any) -> str:
    """The name of the value of a tag that is a number."""
    return str(getattr(value, "name", int(value))).lower()


def micrometres(per_unit: tuple[float, float], unit: float) -> tuple[float, float] | None:
    """The width and height of a pixel in µm, from the pixels per `unit`, which is in µm.

    None if they are no sizes, or 72 or 96 per inch, which many programs write by default.
    """
    if not all(math.isfinite(number) and number > 0 for number in per_unit):
        return None
    width, height = (unit / number for number in per_unit)
    if any(abs(25_400 / width - screen) < 0.1 for screen in _SCREENS):
        return None
    return (
        (width, height) if _LEAST_UM < min(width, height) <= max(width, height) < _MOST_UM else None
    )


def _pixel_size(tiff: Any) -> tuple[float, float] | None:
    try:
        page = tiff.pages.first
        if page.is_ome and (size := _ome_pixel_size(page.description)):
            return size
        stored = [page.tags.valueof(code) for code in (_X_RESOLUTION, _Y_RESOLUTION)]
        unit = _RESOLUTION_UNITS.get(page.tags.valueof(_RESOLUTION_UNIT, 2))
        if page.is_imagej:
            named = (tiff.imagej_metadata or {}).get("unit")
            unit = unit if named is None else _IMAGEJ_UNITS.get(named)
        if unit is None or None in stored:
            return None
        x, y = (numerator / denominator for numerator, denominator in stored)
        return micrometres((x, y), unit)
    except Exception:  # tifffile's on damaged tags, which no pixel depends on
        return None


def _ome_pixel_size(description: str) -> tuple[float, float] | None:
    """Width and height in µm of PhysicalSizeX and PhysicalSizeY; their unit is µm by default."""
    sizes = dict(reversed(_OME_SIZE.findall(description)))  # of several images the first
    units = dict(reversed(_OME_UNIT.findall(description)))
    if not {"X", "Y"} <= sizes.keys():
        return None
    micrometre = [_IMAGEJ_UNITS.get(units.get(axis, "\u00b5m")) for axis in "XY"]
    if None in micrometre:
        return None
    x, y = (float(sizes[axis]) * (unit or 1.0) for axis, unit in zip("XY", micrometre, strict=True))
    return micrometres((1 / x, 1 / y), 1.0)


def _planes_of_imagej(tiff: Any) -> int:
    """The number of planes that an ImageJ stack names, 1 of other files."""
    if not tiff.pages.first.is_imagej:
        return 1
    planes = (tiff.imagej_metadata or {}).get("images", 1)
    return planes if isinstance(planes, int) and 1 <= planes <= MOST_PAGES else 1


def _num_channels(tiff: Any) -> int:
    """The number of channels that ImageJ or OME names, where each page holds one; else 1."""
    page = tiff.pages.first
    if page.samplesperpixel != 1:
        return 1
    if page.is_imagej:
        channels = (tiff.imagej_metadata or {}).get("channels", 1)
        return channels if isinstance(channels, int) and channels > 1 else 1
    if not page.is_ome:
        return 1
    named = _SIZE_C.search(page.description)
    return int(named[1]) if named else 1


def _in_strips(
    values: Array, channels: int, dtype: np.dtype[Any], convert: Callable[[Array], Array]
) -> Array:  # [S, H, W] -> [channels, H, W]
    """`convert` of bands of rows, so that its scratch memory is small."""
    converted = np.empty((channels, *values.shape[1:]), dtype)
    for rows in _bands(values):
        converted[:, rows] = convert(values[:, rows])
    return converted


def _bands(values: Array) -> Iterator[slice]:
    _, height, width = values.shape
    step = max(_STRIP_PIXELS // width, 1)
    return (slice(top, top + step) for top in range(0, height, step))


def _cmyk_to_rgb(part: Array) -> Array:  # [4, h, w] -> [3, h, w]
    full = int(np.iinfo(part.dtype).max)
    light = (full - part).astype(np.float32) / full
    return cast(Array, (light[:3] * light[3:] * full).round())


def on_black(part: Array) -> Array:  # [C + 1, h, w], alpha last -> [C, h, w]
    """Colours on black: uint8 or uint16 times the share of the last channel."""
    full = int(np.iinfo(part.dtype).max)
    alpha = part[-1:].astype(np.float32) / full
    return cast(Array, (part[:-1] * alpha).round())


def float_range(values: Array, name: str, inverted: bool = False) -> Array:  # float32 in [0, 1]
    """From the least value of all channels to the greatest becomes 0 to 1; float32 in place."""
    low, high = np.inf, -np.inf
    for rows in _bands(values):
        part = values[:, rows]
        if not np.isfinite(part).all():
            raise ImageFileError(f"{name}: contains NaN or infinity; replace them")
        low, high = min(low, float(part.min())), max(high, float(part.max()))
    # halves, because the difference of two numbers may be too large for one
    half = high / 2 - low / 2
    ranged = values if values.dtype == np.float32 else np.empty(values.shape, np.float32)
    for rows in _bands(values):
        part = (values[:, rows].astype(np.float64) / 2 - low / 2) / (half if half > 0 else 1)
        ranged[:, rows] = 1 - part if inverted and half > 0 else part
    return ranged


def _inflated(data: bytes, size: int, name: str) -> bytes:
    decoder = zlib.decompressobj()
    decoded = decoder.decompress(data, size)
    if not decoder.eof:
        decoder.decompress(decoder.unconsumed_tail, 1)  # checks the sum at the end
    return _of_size(decoded, size)


def _from_lzw(data: bytes, size: int, name: str) -> Data:
    if data[:1] == b"\0" and data[1:2] and data[1] & 1:
        raise ImageFileError(f"{name}: a TIFF of LZW as before 1991; save it anew")
    if not runs_compiled(torch.zeros(1)):
        raise ImageFileError(f"{name}: LZW needs Numba, which does not work here; save it as PNG")
    from spairkit.kernels.lzw_cpu import decode

    decoded = np.empty(size, np.uint8)
    if decode(np.frombuffer(data, np.uint8), decoded) != size:
        raise ValueError("a block of LZW is damaged")
    return decoded


def _from_packbits(data: bytes, size: int, name: str) -> bytes:
    return Image.frombytes("L", (size, 1), data, "packbits", "L").tobytes()


def _of_size(data: bytes, size: int) -> bytes:
    if len(data) != size:
        raise ValueError("a block is too short")
    return data


_DECODERS: dict[int, Callable[[bytes, int, str], Data]] = {
    5: _from_lzw,
    8: _inflated,
    32946: _inflated,
    32773: _from_packbits,
}
