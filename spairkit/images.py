"""Picture files: strangers' in, ours out.

PNG, JPEG, BMP, PPM (with PGM and PBM) and TIFF (plain, packbits, LZW or deflate) are read, nothing
else, and nothing of a file is decoded before its size is known from its header.
"""

import io
import logging
import os
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from spairkit.errors import InputError
from spairkit.storage.durable import write_bytes

MAX_PIXELS = 64_000_000
"""The largest image that is read."""

# Pillow logs what is wrong with a TIFF before it raises; without a handler that goes to stderr
logging.getLogger("PIL").addHandler(logging.NullHandler())

_MAX_BYTES = 1 << 29
_FORMATS = ("PNG", "JPEG", "BMP", "PPM", "TIFF")
# of TIFF's many, those that hold measurements; the others are decoders for strangers to attack
_COMPRESSIONS = ("raw", "packbits", "tiff_lzw", "tiff_deflate", "tiff_adobe_deflate")
_SUFFIXES = frozenset(
    (".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".pbm", ".pnm", ".tif", ".tiff")
)
# what Pillow raises on damaged files
_DAMAGED = (
    OSError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    SyntaxError,
    AttributeError,
    ArithmeticError,
    MemoryError,
    RuntimeError,
    SystemError,
    AssertionError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
_TRANSPARENT = ("LA", "La", "PA", "RGBA", "RGBa")
_ORIENTATION = 0x0112
# what brings a picture of each orientation upright, by the numbers of EXIF
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)


def read_image(path: Path | str) -> Tensor:  # [3, H, W] float32 in [0, 1]
    """The first frame of a picture, upright, in RGB; grey becomes three equal channels.

    Transparent pictures are laid on black, palettes and other colour spaces are converted. Of
    16-bit grey, 0 to 65,535 becomes 0 to 1; 32-bit integers and floats, which have no such range,
    are stretched from their least value to their greatest (a constant picture is black).

    Raises:
        InputError: it is not there, not a regular file, not a picture of a known kind, damaged,
            larger than 64 million pixels or 512 MiB, or holds values that are not finite.
    """
    return to_colour(read_pixels(path)).contiguous()


def read_pixels(path: Path | str) -> Tensor:  # [1 or 3, H, W] uint8, or [1, H, W] float32
    """What `read_image` reads, as small as it can be kept: bytes, one channel where it is grey.

    Pictures of more than 8 bits come as float32 in [0, 1]. Raises InputError as `read_image`.
    """
    with _opened(path) as image:
        orientation = _orientation(image)
        upright = image.transpose(_TURNS[orientation]) if orientation in _TURNS else image
        mode = upright.mode
        if mode.startswith("I;16"):
            return _tensor(np.asarray(upright).astype(np.float32)[None] / np.float32(65535))
        if mode in ("I", "F"):
            return _tensor(_ranged(path, np.asarray(upright).astype(np.float64))[None])
        if mode in _TRANSPARENT or "transparency" in upright.info:
            layer = upright.convert("RGBA")
            black = Image.new("RGBA", layer.size, (0, 0, 0, 255))
            upright = Image.alpha_composite(black, layer)
        elif mode in ("1", "L"):
            return _tensor(np.asarray(upright.convert("L"))[None])
        return _tensor(np.asarray(upright.convert("RGB")).transpose(2, 0, 1))


def to_colour(pixels: Tensor) -> Tensor:  # [1 or 3, H, W] -> [3, H, W] float32 in [0, 1]
    """What `read_image` makes of `read_pixels`; the channels of a grey picture share memory."""
    scaled = pixels / 255 if pixels.dtype == torch.uint8 else pixels
    return scaled.expand(3, -1, -1)


def stretched(image: Tensor, *, black: float, white: float) -> Tensor:  # any shape, in [0, 1]
    """Intensities from `black` to `white` brought to 0 to 1; what lies beyond is cut off.

    So a model whose run has `data.black` and `data.white` saw the images that it was trained on,
    and so `spairkit detect` shows it others. A model that is loaded from Python does not know them.

    Raises:
        ValueError: not 0 <= black < white <= 1.
    """
    if not 0 <= black < white <= 1:
        raise ValueError(f"black and white must lie in order in [0, 1], got {black} and {white}")
    if (black, white) == (0, 1):
        return image
    return ((image - black) / (white - black)).clamp(0, 1)


def commonest_colour(images: Tensor) -> Tensor:  # [..., 3, H, W] -> [3]
    """The 8-bit colour that most pixels have, in [0, 1] (docs/model.md 4.4, mode "mode").

    Args:
        images: float in [0, 1], or uint8. Of equally common colours the one with the least red
            is taken, then green, then blue.
    """
    levels = images if images.dtype == torch.uint8 else (images * 255).round()
    red, green, blue = levels.long().unbind(-3)
    values, counts = ((red << 16) + (green << 8) + blue).flatten().unique(return_counts=True)
    code = values[counts.argmax()]
    return torch.stack([code >> 16, code >> 8 & 255, code & 255]) / 255


def image_size(path: Path | str) -> tuple[int, int]:
    """Height and width of the upright picture, from its header. Raises InputError."""
    with _opened(path) as image:
        width, height = image.size
        return (width, height) if _orientation(image) in _SIDEWAYS else (height, width)


def write_png(path: Path | str, image: Tensor) -> None:
    """Writes a [3, H, W] picture, uint8, or float clamped to [0, 1]; it is there whole or not.

    Raises:
        ValueError: the shape or the type is another, or a value is not a number.
        InputError: the file cannot be written.
    """
    if image.dim() != 3 or image.shape[0] != 3 or 0 in image.shape:
        raise ValueError(f"image must be [3, H, W], got {list(image.shape)}")
    if image.is_floating_point():
        if image.isnan().any():
            raise ValueError("image must hold numbers, got NaN")
        image = (image.detach().clamp(0, 1) * 255).round().to(torch.uint8)
    elif image.dtype != torch.uint8:
        raise ValueError(f"image must be uint8 or floating point, got {image.dtype}")
    data = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).save(data, format="PNG")
    write_bytes(Path(path), data.getvalue())


def list_images(folder: Path | str) -> list[Path]:
    """The pictures in a folder and its subfolders by their suffix, sorted by path.

    Names that start with a dot are passed over, links to folders are not followed.

    Raises:
        InputError: it is no folder, cannot be read, or holds no picture.
    """
    refusals: list[OSError] = []
    found = []
    for root, folders, files in os.walk(folder, onerror=refusals.append):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            path
            for path in (Path(root, name) for name in files if not name.startswith("."))
            if path.suffix.lower() in _SUFFIXES and path.is_file()
        ]
    if refusals:
        refused = refusals[0]
        where = refused.filename or folder
        raise InputError(f"{printable(where)}: cannot be read as a folder: {refused.strerror}")
    if not found:
        raise InputError(
            f"{printable(folder)}: no pictures in this folder (PNG, JPEG, BMP, PPM or TIFF)"
        )
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


@contextmanager
def _opened(path: Path | str) -> Iterator[Image.Image]:
    """The picture, its header read and found harmless; whatever Pillow raises, as InputError."""
    path, name = Path(path), printable(path)
    try:
        # a pipe or a device would block or never end
        if not path.is_file():
            missing = "not a regular file" if path.exists() else "no such file"
            raise InputError(f"{name}: {missing}; name a picture")
        if path.stat().st_size > _MAX_BYTES:
            raise InputError(f"{name}: larger than 512 MiB; cut it into smaller pictures")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with path.open("rb") as file, Image.open(file, formats=_FORMATS) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise InputError(
                        f"{name}: {width}x{height} pixels are more than 64 million; "
                        "cut it into smaller pictures"
                    )
                if width * height == 0:
                    raise InputError(f"{name}: a picture of {width}x{height} pixels")
                compression = image.info.get("compression")
                if image.format == "TIFF" and compression not in _COMPRESSIONS:
                    raise InputError(
                        f"{name}: a TIFF compressed by {compression}; save it with LZW, deflate "
                        "or no compression, or as PNG"
                    )
                yield image
    except InputError:
        raise
    except Image.DecompressionBombError:
        raise InputError(
            f"{name}: more than 64 million pixels; cut it into smaller pictures"
        ) from None
    except UnidentifiedImageError:
        raise InputError(
            f"{name}: not a picture that can be read (PNG, JPEG, BMP, PPM or TIFF)"
        ) from None
    except _DAMAGED as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{name}: a damaged picture: {printable(reason[:200])}") from None


def _orientation(image: Image.Image) -> int:
    """EXIF's number, from what stands before the pixels; Pillow itself turns TIFF."""
    if image.format == "TIFF":
        return 1
    # the method of the class: PNG's own decodes the picture to look behind it
    orientation = Image.Image.getexif(image).get(_ORIENTATION)
    return orientation if orientation in _TURNS else 1


def _ranged(path: Path | str, values: NDArray[np.float64]) -> NDArray[np.float32]:
    if not np.isfinite(values).all():
        raise InputError(f"{printable(path)}: holds values that are not finite; replace them")
    low, high = values.min(), values.max()
    # halves, because the difference of two numbers may be too large for one
    half = high / 2 - low / 2
    ranged: NDArray[np.float64] = (values / 2 - low / 2) / (half if half > 0 else 1)
    return ranged.astype(np.float32)


def _tensor(array: NDArray[np.generic]) -> Tensor:
    return torch.from_numpy(np.array(array, order="C"))


def printable(text: object) -> str:
    """A name that may hold any character, fit to stand in a message of one line."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))
