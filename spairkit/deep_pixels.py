"""PNG of 16 bits and binary Netpbm, of which Pillow would give 8 bits or scale pixel by pixel.

Pillow reads the headers, and decodes PNG.
"""

import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image
from PIL.ImageFile import ImageFile
from torch import Tensor

from spairkit.tiff import of_full_scale, on_black

_SIGNATURE_BYTES = 8
_STRIP_PIXELS = 1 << 22
_MAX_PLAIN_PIXELS = 1 << 24  # of a file of decimal numbers
_CHANNELS = {b"P5": 1, b"P6": 3}


def deep_png(file: BinaryIO, image: ImageFile) -> Tensor | None:  # [1 or 3, H, W] uint16
    """The pixels of a PNG of 16 bits with several channels, laid on black; None of other images.

    Raises one of `images.DAMAGED`.
    """
    layout = next((str(tile.args) for tile in image.tile), "")
    if image.format != "PNG" or layout not in ("RGB;16B", "RGBA;16B", "LA;16B"):
        return None
    data, interlaced = _compressed(file)
    width, height = image.size
    mode = layout.partition(";")[0]
    values = np.empty((len(mode), height, width), np.uint16)
    # Pillow unpacks one byte of each sample; two samples are as long as four bytes
    for shift, half in ((8, "16B"), (0, "16L")):
        how = ("RGBA", "RGBA") if mode == "LA" else (mode, f"{mode};{half}")
        decoded = Image.frombytes(how[0], image.size, data, "zip", how[1], int(interlaced))
        for rows in _bands(height, width):
            part = np.asarray(decoded.crop((0, rows.start, width, rows.stop)))
            if mode == "LA":
                part = part[..., 0::2] if shift else part[..., 1::2]
            deep = np.left_shift(part.transpose(2, 0, 1), shift, dtype=np.uint16)
            values[:, rows] = deep if shift else values[:, rows] | deep
    key = image.info.get("transparency")
    if key is not None and mode == "RGB":
        for rows in _bands(height, width):
            hidden = (values[:, rows] == np.array(key, np.uint16)[:, None, None]).all(0)
            values[:, rows][:, hidden] = 0
    elif mode != "RGB":
        for rows in _bands(height, width):
            values[:-1, rows] = on_black(values[:, rows])
        values = values[:-1]
    return torch.from_numpy(values)


def netpbm(file: BinaryIO, image: ImageFile) -> Tensor | None:
    """The pixels of a binary PGM or PPM, [1 or 3, H, W]; None of other images.

    They are uint8 or uint16 where the greatest value of the header divides theirs, else float32.
    Raises one of `images.DAMAGED`.
    """
    decoder, _, offset, args = image.tile[0]
    file.seek(0)
    magic = file.read(2)
    if decoder == "ppm_plain":
        _check_plain(magic, image, args)
    if magic not in _CHANNELS or image.mode not in ("L", "I", "RGB"):
        return None
    channels, (width, height) = _CHANNELS[magic], image.size
    full = _full(args)
    stored = np.dtype(">u2" if full > 255 else "u1")
    values = np.empty((channels, height, width), stored.newbyteorder("="))
    file.seek(offset)
    for rows in _bands(height, width):
        shape = (rows.stop - rows.start, width, channels)
        size = int(np.prod(shape)) * stored.itemsize
        data = file.read(size)
        if len(data) != size:
            raise ValueError("the file ends too early")
        part = np.frombuffer(data, stored).reshape(shape)
        if part.max() > full:
            raise ValueError(f"a value is above {full}, the greatest of the header")
        values[:, rows] = part.transpose(2, 0, 1)
    return torch.from_numpy(of_full_scale(values, full))


def netpbm_has_more(file: BinaryIO, image: ImageFile) -> bool:
    """Whether another image follows in a binary PGM or PPM."""
    file.seek(0)
    channels = _CHANNELS.get(file.read(2))
    if channels is None:
        return False
    _, _, offset, args = image.tile[0]
    bytes_ = 2 if _full(args) > 255 else 1
    file.seek(offset + image.width * image.height * channels * bytes_)
    return file.read(64).lstrip()[:1] == b"P"


def _full(args: Any) -> int:
    """The value of white, from how Pillow would decode a binary PGM or PPM."""
    if isinstance(args, tuple):
        return int(args[1])
    return 65535 if args == "I;16B" else 255


def _check_plain(magic: bytes, image: ImageFile, args: Any) -> None:
    if image.width * image.height > _MAX_PLAIN_PIXELS:
        raise ValueError("decimal numbers for over 16 million pixels; save it as PNG")
    if magic == b"P3" and args[1] > 255:
        raise ValueError("decimal numbers for colours of more than 8 bits; save it as PNG")


def _bands(height: int, width: int) -> Iterator[slice]:
    step = max(_STRIP_PIXELS // width, 1)
    return (slice(top, min(top + step, height)) for top in range(0, height, step))


def _compressed(file: BinaryIO) -> tuple[bytes, bool]:
    """The compressed pixels of a PNG, and whether they are interlaced."""
    file.seek(_SIGNATURE_BYTES)
    parts: list[bytes] = []
    interlaced = False
    while True:
        length, kind = int.from_bytes(file.read(4), "big"), file.read(4)
        if kind in (b"IHDR", b"IDAT"):
            data = file.read(length)
            if zlib.crc32(kind + data).to_bytes(4, "big") != file.read(4):
                raise ValueError(f"the checksum of {kind.decode()} is wrong")
            if kind == b"IHDR":
                interlaced = data[12] == 1
            else:
                parts.append(data)
        elif len(kind) < 4 or kind == b"IEND":
            return b"".join(parts), interlaced
        else:
            file.seek(length + 4, 1)
