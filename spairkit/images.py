"""Reads untrusted images; takes arrays and tensors for images; writes PNG.

PNG, JPEG, BMP, PPM (with PGM and PBM) and TIFF (plain, packbits, LZW or deflate) are read, nothing
else, and no file is decoded before its header has given its size.
"""

import io
import logging
import os
import struct
import warnings
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from spairkit.errors import InputError
from spairkit.storage.durable import write_bytes

MAX_PIXELS = 64_000_000
"""Largest image that is read, in pixels."""

# Pillow logs what is wrong with a TIFF before it raises; without a handler that goes to stderr
logging.getLogger("PIL").addHandler(logging.NullHandler())

_MAX_BYTES = 1 << 29
_FORMATS = ("PNG", "JPEG", "BMP", "PPM", "TIFF")
# of TIFF's many, those that hold measurements; the other decoders are only an attack surface
_COMPRESSIONS = ("raw", "packbits", "tiff_lzw", "tiff_deflate", "tiff_adobe_deflate")
SUFFIXES = frozenset(
    (".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".pbm", ".pnm", ".tif", ".tiff")
)
DAMAGED = (
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
"""Exceptions that the readers of images and archives raise on damaged files."""

_TRANSPARENT = ("LA", "La", "PA", "RGBA", "RGBa")
_ORIENTATION = 0x0112
# the turn that brings an image upright, by EXIF orientation
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


Source = TypeVar("Source")
ImageLike = str | os.PathLike[str] | NDArray[Any] | Image.Image | Tensor
"""Types that `as_image` accepts."""


def as_image(source: ImageLike) -> Tensor:  # [3, H, W] float32 in [0, 1], on the CPU
    """An image in any of the usual forms, in RGB; grey becomes three equal channels.

    Args:
        source: a path (see `read_image`); a NumPy array [H, W], [H, W, 3] or [H, W, 4] of uint8,
            uint16 or bool (the whole range becomes 0 to 1) or of floats in [0, 1]; a PIL image, as
            it is stored (EXIF orientation is applied to files only); or a tensor [3, H, W], uint8
            or float in [0, 1]. [H, W, 1] is grey. Transparent pixels are laid on black.

    Raises:
        TypeError: `source` is of another type.
        ValueError: its shape, dtype or values are not supported.
        InputError: a file cannot be read, or a PIL image is damaged.
    """
    if isinstance(source, (str, os.PathLike)):
        return read_image(os.fspath(source))
    if isinstance(source, Image.Image):
        try:
            return to_colour(_pixels(source, "the PIL image")).contiguous()
        except DAMAGED as error:
            raise InputError(f"the PIL image is damaged: {error}") from None
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Tensor):
        if source.dim() != 3 or source.shape[0] != 3 or 0 in source.shape:
            raise ValueError(f"a tensor must be [3, H, W], got {list(source.shape)}")
        return _in_range(source.detach().cpu().contiguous())
    hint = "; for several images use detect_many" if isinstance(source, (list, tuple)) else ""
    raise TypeError(
        "an image must be a path, a NumPy array [H, W], [H, W, 3] or [H, W, 4], a PIL image or a "
        f"tensor [3, H, W], got {type(source).__name__}{hint}"
    )


def read_image(path: Path | str) -> Tensor:  # [3, H, W] float32 in [0, 1]
    """The first frame of an image file, upright, in RGB; grey becomes three equal channels.

    Transparent pixels are laid on black, palettes and other colour spaces are converted. Of 16-bit
    grey, 0 to 65,535 becomes 0 to 1; 32-bit integers and floats, which have no such range, are
    stretched from their least value to their greatest (a constant image is black).

    Raises:
        InputError: it is not there, not a regular file, not an image of a known format, damaged,
            larger than 64 million pixels or 512 MiB, or holds values that are not finite.
    """
    return to_colour(read_pixels(path)).contiguous()


def read_pixels(path: Path | str) -> Tensor:  # [1 or 3, H, W] uint8, or [1, H, W] float32
    """The pixels of `read_image` as compactly as possible: bytes, one channel for grey.

    More than 8 bits become float32 in [0, 1]. Raises InputError as `read_image`.
    """
    with _opened(path) as image:
        orientation = _orientation(image)
        upright = image.transpose(_TURNS[orientation]) if orientation in _TURNS else image
        return _pixels(upright, printable(path))


def _pixels(image: Image.Image, name: str) -> Tensor:  # as `read_pixels`
    mode = image.mode
    if mode.startswith("I;16"):
        return _tensor(np.asarray(image).astype(np.float32)[None] / np.float32(65535))
    if mode in ("I", "F"):
        return _tensor(_ranged(name, np.asarray(image).astype(np.float64))[None])
    if mode in _TRANSPARENT or "transparency" in image.info:
        layer = image.convert("RGBA")
        black = Image.new("RGBA", layer.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, layer)
    elif mode in ("1", "L"):
        return _tensor(np.asarray(image.convert("L"))[None])
    return _tensor(np.asarray(image.convert("RGB")).transpose(2, 0, 1))


def _from_array(array: NDArray[Any]) -> Tensor:
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.ndim not in (2, 3) or channels not in (1, 3, 4):
        raise ValueError(
            f"an array must be [H, W], [H, W, 3] or [H, W, 4], got {list(array.shape)}"
        )
    if 0 in array.shape:
        raise ValueError(f"the image is empty, got an array {list(array.shape)}")
    if array.dtype == bool:
        array = array.astype(np.uint8) * np.uint8(255)
    if array.dtype.kind == "u" and array.itemsize == 2:  # in either byte order
        array = array.astype(np.float32) / np.float32(65535)
    if array.dtype != np.uint8 and array.dtype.kind != "f":
        raise ValueError(
            f"an array must be uint8, uint16, bool or floats in [0, 1], got {array.dtype}; "
            "convert it"
        )
    if array.dtype.kind == "f":
        array = array.astype(np.float32)
    pixels = _in_range(_tensor(array.reshape(*array.shape[:2], channels).transpose(2, 0, 1)))
    if channels == 4:
        pixels = pixels[:3] * pixels[3:]
    return to_colour(pixels).contiguous()


def _in_range(image: Tensor) -> Tensor:
    """In [0, 1]: bytes are divided by 255; floats must lie there."""
    if image.dtype == torch.uint8:
        return image / 255
    if not image.is_floating_point():
        raise ValueError(f"a tensor must be uint8 or floating-point in [0, 1], got {image.dtype}")
    image = image.float()
    low, high = image.aminmax()
    if low.isnan():
        raise ValueError("the image contains NaN")
    if low < 0 or high > 1:
        raise ValueError(
            f"floats must lie in [0, 1], got {float(low):g} to {float(high):g}; "
            "divide by the sensor's maximum value"
        )
    return image


def to_colour(pixels: Tensor) -> Tensor:  # [1 or 3, H, W] -> [3, H, W] float32 in [0, 1]
    """RGB in [0, 1] of `read_pixels`; the channels of a grey image share memory."""
    scaled = pixels / 255 if pixels.dtype == torch.uint8 else pixels
    return scaled.expand(3, -1, -1)


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


def num_channels(images: Tensor) -> Tensor:  # [B, 3, H, W] -> [B] int64
    """The number of channels that differ: 1 for a grey image, whose channels are equal, else 3."""
    grey = (images[:, 1:] == images[:, :1]).flatten(1).all(1)
    return 3 - 2 * grey.long()


def same_sized(
    images: Iterable[tuple[Source, Tensor]], batch_size: int, max_pixels: int
) -> Iterator[list[tuple[Source, Tensor]]]:
    """Groups of consecutive images [C, H, W] of one size, each image with its source.

    A group holds at most `batch_size` images and `max_pixels` pixels, or one image.
    """
    group: list[tuple[Source, Tensor]] = []
    iterator = iter(images)
    while True:
        try:
            source, image = next(iterator)
        except StopIteration:
            break
        except Exception:
            if group:
                yield group  # images before the one that fails are not lost
            raise
        full = len(group) == batch_size or (len(group) + 1) * image[0].numel() > max_pixels
        if group and (full or group[0][1].shape != image.shape):
            yield group
            group = []
        group.append((source, image))
    if group:
        yield group


def image_size(path: Path | str) -> tuple[int, int]:
    """Height and width of the upright image, from its header. Raises InputError."""
    with _opened(path) as image:
        width, height = image.size
        return (width, height) if _orientation(image) in _SIDEWAYS else (height, width)


def write_png(path: Path | str, image: Tensor) -> None:
    """Writes a [3, H, W] image, uint8 or float clamped to [0, 1]; the file is never half-written.

    Raises:
        ValueError: `image` has another shape or dtype, or holds NaN.
        InputError: the file cannot be written.
    """
    if image.dim() != 3 or image.shape[0] != 3 or 0 in image.shape:
        raise ValueError(f"image must be [3, H, W], got {list(image.shape)}")
    if image.is_floating_point():
        if image.isnan().any():
            raise ValueError("image must not contain NaN")
        image = (image.detach().clamp(0, 1) * 255).round().to(torch.uint8)
    elif image.dtype != torch.uint8:
        raise ValueError(f"image must be uint8 or floating point, got {image.dtype}")
    data = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).save(data, format="PNG")
    write_bytes(Path(path), data.getvalue())


def list_images(folder: Path | str) -> list[Path]:
    """The image files in a folder and its subfolders, by suffix, sorted by path.

    Names that start with a dot are skipped; links to folders are not followed.

    Raises:
        InputError: it is no folder, cannot be read, or holds no image.
    """
    refusals: list[OSError] = []
    found = []
    for root, folders, files in os.walk(folder, onerror=refusals.append):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            path
            for path in (Path(root, name) for name in files if not name.startswith("."))
            if path.suffix.lower() in SUFFIXES and path.is_file()
        ]
    if refusals:
        refused = refusals[0]
        where = refused.filename or folder
        raise InputError(f"{printable(where)}: cannot be read as a folder: {refused.strerror}")
    if not found:
        raise InputError(
            f"{printable(folder)}: no images in this folder (PNG, JPEG, BMP, PPM or TIFF)"
        )
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


@contextmanager
def _opened(path: Path | str) -> Iterator[Image.Image]:
    """The image, after its header was checked; Pillow's exceptions become InputError."""
    path, name = Path(path), printable(path)
    try:
        # a pipe or a device would block or never end
        if not path.is_file():
            missing = "not a regular file" if path.exists() else "no such file"
            raise InputError(f"{name}: {missing}; name an image file")
        if path.stat().st_size > _MAX_BYTES:
            raise InputError(f"{name}: larger than 512 MiB; cut it into smaller images")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with path.open("rb") as file, Image.open(file, formats=_FORMATS) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise InputError(
                        f"{name}: {width}x{height} pixels are more than 64 million; "
                        "cut it into smaller images"
                    )
                if width * height == 0:
                    raise InputError(f"{name}: the image is empty ({width}x{height} pixels)")
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
            f"{name}: more than 64 million pixels; cut it into smaller images"
        ) from None
    except UnidentifiedImageError:
        raise InputError(
            f"{name}: not an image that can be read (PNG, JPEG, BMP, PPM or TIFF)"
        ) from None
    except DAMAGED as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{name}: a damaged image: {printable(reason[:200])}") from None


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation from the header; Pillow itself turns TIFF."""
    if image.format == "TIFF":
        return 1
    # the method of the class: PNG's own decodes the picture to look behind it
    orientation = Image.Image.getexif(image).get(_ORIENTATION)
    return orientation if orientation in _TURNS else 1


def _ranged(name: str, values: NDArray[np.float64]) -> NDArray[np.float32]:
    if not np.isfinite(values).all():
        raise InputError(f"{name}: contains NaN or infinity; replace them")
    low, high = values.min(), values.max()
    # halves, because the difference of two numbers may be too large for one
    half = high / 2 - low / 2
    ranged: NDArray[np.float64] = (values / 2 - low / 2) / (half if half > 0 else 1)
    return ranged.astype(np.float32)


def _tensor(array: NDArray[np.generic]) -> Tensor:
    return torch.from_numpy(np.array(array, order="C"))


def printable(text: object) -> str:
    """A name with unprintable characters escaped, for a message of one line."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))
