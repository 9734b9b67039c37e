"""Reads untrusted images; takes arrays and tensors for images; writes PNG.

PNG, JPEG, BMP, PPM (with PGM and PBM), TIFF (plain, packbits, LZW or deflate) and NumPy's .npy are
read, nothing else, and no file is decoded before its header has given its size. A layout that is
not read right is refused by name. The frames of stacks have paths of their own, see `frames.py`.
Pictures that spairkit has drawn are marked, and are no images of a folder.
"""

import hashlib
import io
import logging
import os
import struct
import threading
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.ImageFile import ImageFile
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from spairkit.deep_pixels import deep_png, netpbm, netpbm_has_more
from spairkit.errors import ImageFileError, InputError
from spairkit.frames import check_one, file_of, frames_of, open_stack
from spairkit.names import printable
from spairkit.numpy_images import NUMPY, NumpyImages
from spairkit.storage.durable import write_bytes
from spairkit.storage.runs import is_run
from spairkit.tiff import Tiff, micrometres

MAX_PIXELS = 178_000_000
"""Largest image that is read, in pixels: Pillow's own limit, and at most 2.7 GB while decoded."""

# Pillow logs what is wrong with a file before it raises; without a handler that goes to stderr
logging.getLogger("PIL").addHandler(logging.NullHandler())

_FILTERS = threading.RLock()  # those of warnings, which all threads share
_MAX_BYTES = 1 << 30
_STRIP_PIXELS = 1 << 22  # of a large image that are converted together
_NAMED = 3  # files that a message about skipped ones names
# PNG's place for the name of the program that wrote it
_SOFTWARE, _SOURCE = "Software", "Source"
_MARK = b"tEXtSoftware\0spairkit"
_HEAD_BYTES = 1024  # of a PNG, in which our marks stand
_FORMATS = ("PNG", "JPEG", "BMP", "PPM")
SUFFIXES = frozenset(
    (".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".pbm", ".pnm", ".tif", ".tiff", NUMPY)
)
_STACKS = (".tif", ".tiff", NUMPY)
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
_ORIENTATION, _ORIENTATIONS = 0x0112, range(1, 9)
# of EXIF's orientations, those whose rows and columns run backwards; from 5 on they then change
# places
_ROWS_BACKWARDS = (3, 4, 6, 7)
_COLUMNS_BACKWARDS = (2, 3, 7, 8)
_SIDEWAYS = (5, 6, 7, 8)

_MAX_HELD = 1 << 26
_told_of_pages: list[str] = []
_read_before: dict[str, Tensor] | None = None  # by name, in `reading_once`

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
    """An image file, or a frame of a stack, upright, in RGB; grey becomes three equal channels.

    Transparent pixels are laid on black, palettes and CMYK are converted. Of unsigned values of up
    to 16 bits the whole range becomes 0 to 1: 0 to 65,535 of 16 bits. Signed integers, integers of
    more bits and floats, which have no such range, are stretched from their least value to their
    greatest (a constant image is black). A frame of a stack (a TIFF of several pages, or a NumPy
    array of several images) is named, as `stack.tif/03`. Of an animation, and of pages that differ
    in size, the first is read, with a warning; three such files are named.

    Raises:
        ImageFileError: it is not there, not a regular file, not an image of a known format or of a
            layout that is read, a stack of which no frame is named, damaged, larger than 178
            million pixels or 1 GiB, in memory too, or holds values that are not finite.
    """
    return to_colour(read_pixels(path)).contiguous()


def read_pixels(path: Path | str) -> Tensor:  # [1 or 3, H, W] uint8, uint16 or float32
    """The pixels of `read_image` as compactly as possible: one channel for grey.

    They are bytes, uint16 of 16 bits, and float32 in [0, 1] of other types; `to_colour` makes
    `read_image`'s of all or of a part of them. Raises ImageFileError as `read_image`.
    """
    if _read_before is not None and (known := _read_before.get(os.fspath(path))) is not None:
        return known
    with _opened(path) as image:
        orientation, has_more = image.orientation, image.has_more
        pixels = image.pixels()
    if has_more:
        _tell_of_pages(printable(path))
    pixels = pixels if orientation == 1 else upright(pixels, orientation)
    if _read_before is not None:
        held = sum(map(Tensor.numel, _read_before.values()))
        if held + pixels.numel() <= _MAX_HELD:
            _read_before[os.fspath(path)] = pixels
    return pixels


@contextmanager
def reading_once() -> Iterator[None]:
    """In this block `read_pixels` keeps the pixels of files, and does not read them again.

    It keeps up to 64 million values. It is for files that do not change meanwhile, and pixels that
    nobody changes.
    """
    global _read_before
    before, _read_before = _read_before, {}
    try:
        yield
    finally:
        _read_before = before


class _Picture:
    """An image file that Pillow has opened; members as of `Tiff`."""

    def __init__(self, file: BinaryIO, image: ImageFile, name: str) -> None:
        self._file, self._image, self._name = file, image, name
        self.stored_size = image.height, image.width
        # the method of the class: PNG's own decodes the picture to look behind it
        orientation: Any = Image.Image.getexif(image).get(_ORIENTATION)
        self.orientation: int = orientation if orientation in _ORIENTATIONS else 1

    @property
    def pixel_size(self) -> tuple[float, float] | None:
        # that of JPEG and BMP is of paper or a screen
        per_inch = self._image.info.get("dpi") if self._image.format == "PNG" else None
        return None if per_inch is None else micrometres(per_inch, 25_400)

    @property
    def has_more(self) -> bool:
        if self._image.format == "PPM":
            return netpbm_has_more(self._file, self._image)
        return getattr(self._image, "n_frames", 1) > 1

    def pixels(self) -> Tensor:
        deep = netpbm if self._image.format == "PPM" else deep_png
        pixels = deep(self._file, self._image)
        return _pixels(self._image, self._name) if pixels is None else pixels


def warn(message: str, stacklevel: int = 1) -> None:
    """`warnings.warn`, but not while another thread reads an image, which silences all threads."""
    with _FILTERS:
        warnings.warn(message, stacklevel=stacklevel + 1)


def _tell_of_pages(name: str) -> None:
    """Warns of a file with several pages, once, and not of every file of a large folder."""
    if name in _told_of_pages or len(_told_of_pages) == _NAMED:
        return
    _told_of_pages.append(name)
    last = "; further such files are not named" if len(_told_of_pages) == _NAMED else ""
    warnings.warn(
        f"{name}: holds further images (an animation, or pages that are damaged or of another "
        f"size), which are not read; save them as files of their own{last}",
        stacklevel=3,
    )


def upright(pixels: Tensor, orientation: int) -> Tensor:  # [C, H, W] -> [C, H', W']
    """Pixels as they are stored, turned upright by an orientation of EXIF, 1 to 8."""
    array = pixels.numpy()
    rows, columns = _directions(orientation)
    array = array[:, ::rows, ::columns]
    return _tensor(array.swapaxes(1, 2) if orientation in _SIDEWAYS else array)


def upright_boxes(boxes: Tensor, orientation: int, stored_size: tuple[int, int]) -> Tensor:
    """Boxes [n, 4] of the stored pixels, in pixels of the upright image; see `upright`.

    Args:
        stored_size: height and width of the image as it is stored.
    """
    height, width = stored_size
    rows, columns = _directions(orientation)
    x1, y1, x2, y2 = boxes.unbind(1)
    if rows < 0:
        y1, y2 = height - y2, height - y1
    if columns < 0:
        x1, x2 = width - x2, width - x1
    if orientation in _SIDEWAYS:
        x1, y1, x2, y2 = y1, x1, y2, x2
    return torch.stack([x1, y1, x2, y2], 1)


def _directions(orientation: int) -> tuple[int, int]:
    """1 for rows, and for columns, that run forwards, else -1."""
    return (
        -1 if orientation in _ROWS_BACKWARDS else 1,
        -1 if orientation in _COLUMNS_BACKWARDS else 1,
    )


def _pixels(image: Image.Image, name: str) -> Tensor:  # as `read_pixels`
    mode = image.mode
    if mode.startswith("I;16"):
        return _converted(image, 1, np.uint16, np.asarray)
    if mode == "I" and image.format == "PPM":  # Pillow's form of 16-bit grey
        return _converted(image, 1, np.uint16, np.asarray)
    if mode in ("I", "F"):
        low, high = _range(image, name)
        return _converted(image, 1, np.float32, lambda strip: _ranged(strip, low, high))
    if mode in _TRANSPARENT or "transparency" in image.info:
        return _converted(image, 3, np.uint8, _on_black)
    if mode in ("1", "L"):
        return _converted(image, 1, np.uint8, lambda strip: np.asarray(strip.convert("L")))
    return _converted(image, 3, np.uint8, lambda strip: np.asarray(strip.convert("RGB")))


def _converted(
    image: Image.Image,
    channels: int,
    dtype: type[np.generic],
    convert: Callable[[Image.Image], NDArray[Any]],  # to [rows, W] or [rows, W, channels]
) -> Tensor:  # [channels, H, W]
    """The pixels, converted strip by strip, so that no second copy of a large image is made."""
    width, height = image.size
    pixels = np.empty((channels, height, width), dtype)
    for rows, strip in _strips(image):
        pixels[:, rows] = convert(strip).reshape(-1, width, channels).transpose(2, 0, 1)
    return torch.from_numpy(pixels)


def _strips(image: Image.Image) -> Iterator[tuple[slice, Image.Image]]:
    width, height = image.size
    step = max(_STRIP_PIXELS // width, 1)
    if step >= height:
        yield slice(0, height), image
        return
    for top in range(0, height, step):
        bottom = min(top + step, height)
        yield slice(top, bottom), image.crop((0, top, width, bottom))


def _on_black(strip: Image.Image) -> NDArray[np.uint8]:
    layer = strip.convert("RGBA")
    black = Image.new("RGBA", layer.size, (0, 0, 0, 255))
    return np.asarray(Image.alpha_composite(black, layer).convert("RGB"))


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


def to_colour(pixels: Tensor) -> Tensor:  # [..., 1 or 3, H, W] -> [..., 3, H, W] float32 in [0, 1]
    """RGB in [0, 1] of `read_pixels`; the channels of a grey image share memory."""
    full = {torch.uint8: 255, torch.uint16: 65535}.get(pixels.dtype)
    scaled = pixels.float() / full if full else pixels
    return scaled.expand(*pixels.shape[:-3], 3, -1, -1)


def commonest_colour(images: Tensor) -> Tensor:  # [..., 3, H, W] -> [3]
    """The 8-bit colour that most pixels have, in [0, 1] (docs/model.md 4.4, mode "mode").

    Args:
        images: float in [0, 1], or uint8. Of equally common colours the one with the least red
            is taken, then green, then blue.
    """
    if images[..., 0, :, :].numel() > _STRIP_PIXELS:
        rows = max(_STRIP_PIXELS // images[..., 0, 0, :].numel(), 1)
        counted = torch.zeros(1 << 24, dtype=torch.int64, device=images.device)
        for strip in images.split(rows, -2):
            counted += torch.bincount(_codes(strip), minlength=len(counted))
        code = counted.argmax()
    else:
        values, counts = _codes(images).unique(return_counts=True)
        code = values[counts.argmax()]
    return torch.stack([code >> 16, code >> 8 & 255, code & 255]) / 255


def _codes(images: Tensor) -> Tensor:  # [..., 3, H, W] -> [n] int64
    """The 8-bit colour of each pixel as one number, red first."""
    levels = images if images.dtype == torch.uint8 else (images * 255).round()
    red, green, blue = levels.long().unbind(-3)
    return ((red << 16) + (green << 8) + blue).flatten()


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
        if len(group) * image[0].numel() >= max_pixels:
            yield group  # before the next image is read, as this one may be large
            group = []
    if group:
        yield group


def image_size(path: Path | str) -> tuple[int, int]:
    """Height and width of the upright image, from its header. Raises ImageFileError."""
    with _opened(path) as image:
        return _upright_size(image)


def stored_form(path: Path | str) -> tuple[tuple[int, int], int]:
    """Height and width of an image as it is stored, and its orientation as in EXIF, 1 to 8.

    Both are from its header. Raises ImageFileError.
    """
    with _opened(path) as image:
        return image.stored_size, image.orientation


def pixel_size(path: Path | str) -> tuple[float, float] | None:
    """Width and height of a pixel of the upright image in µm; None if the file does not say.

    They are those of a TIFF's XResolution, YResolution and ResolutionUnit, of ImageJ's unit, of
    OME's PhysicalSizeX and PhysicalSizeY, or of a PNG's pHYs. 72 and 96 pixels per inch count as
    not said. Raises ImageFileError.
    """
    with _opened(path) as image:
        size = image.pixel_size
        return (size[1], size[0]) if size and image.orientation in _SIDEWAYS else size


def write_png(path: Path | str, image: Tensor) -> None:
    """Writes a [3, H, W] image, uint8 or float clamped to [0, 1]; the file is never half-written.

    Raises:
        ValueError: `image` has another shape or dtype, or holds NaN.
        InputError: the file cannot be written.
    """
    write_bytes(Path(path), png(image))


def png(image: Tensor) -> bytes:
    """The bytes of the file that `write_png` writes. Raises ValueError as it does."""
    return _png(image, PngInfo())


def write_picture(path: Path | str, picture: Tensor, source: Path | str | None = None) -> None:
    """As `write_png`, marked as a picture by spairkit, which `list_images` leaves out.

    Args:
        picture: [3, H, W], as in `write_png`.
        source: the file of the image that it shows; see `shows`.
    """
    marks = PngInfo()
    marks.add_text(_SOFTWARE, "spairkit")
    if source is not None:
        marks.add_text(_SOURCE, _fingerprint(source))
    write_bytes(Path(path), _png(picture, marks))


def is_picture(path: Path | str) -> bool:
    """Whether the file is a PNG that spairkit has drawn; false if it cannot be read."""
    return _MARK in _chunks(path)


def shows(path: Path | str, source: Path | str) -> bool:
    """Whether the file is a picture that `write_picture` has drawn of the image file `source`."""
    mark = f"tEXt{_SOURCE}\0{_fingerprint(source)}".encode()
    return {_MARK, mark} <= set(_chunks(path))


def _chunks(path: Path | str) -> list[bytes]:
    """Type and content of the chunks with which a PNG begins; none if it cannot be read."""
    try:
        with Path(path).open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError:
        return []
    chunks: list[bytes] = []
    at = 8
    while head.startswith(b"\x89PNG") and at + 8 <= len(head):
        end = at + 8 + int.from_bytes(head[at : at + 4], "big")
        chunks.append(head[at + 4 : end])
        at = end + 4  # behind the checksum
    return chunks


def _fingerprint(source: Path | str) -> str:
    """Stands for the place of a file, which a picture that is passed on should not tell."""
    file, frame = file_of(source)
    place = os.fsencode(file.resolve() / ("" if frame is None else str(frame)))
    return hashlib.sha256(place).hexdigest()[:32]


def _png(image: Tensor, marks: PngInfo) -> bytes:
    if image.dim() != 3 or image.shape[0] != 3 or 0 in image.shape:
        raise ValueError(f"image must be [3, H, W], got {list(image.shape)}")
    if image.is_floating_point():
        if image.isnan().any():
            raise ValueError("image must not contain NaN")
        image = (image.detach().clamp(0, 1) * 255).round().to(torch.uint8)
    elif image.dtype != torch.uint8:
        raise ValueError(f"image must be uint8 or floating point, got {image.dtype}")
    data = io.BytesIO()
    picture = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
    picture.save(data, format="PNG", pnginfo=marks)
    return data.getvalue()


def list_images(folder: Path | str) -> list[Path]:
    """The image files in a folder and its subfolders, by suffix, sorted by path.

    Names that start with a dot are skipped; links to folders are not followed. So is what spairkit
    has written: its pictures, and the folders of its runs. The frames of a stack stand for it. An
    image file is a folder of its frames. NumPy files count only where there are no others, as
    programs write masks beside images in this format.

    Raises:
        InputError: it is no folder, cannot be read, or holds no image.
    """
    file, frame = file_of(folder)
    if frame is not None:
        return [Path(folder)]
    if file.is_file():
        return frames_of(file)
    refusals: list[OSError] = []
    found: list[Path] = []
    arrays: list[Path] = []
    drawn = 0
    for root, folders, files in os.walk(folder, onerror=refusals.append):
        folders[:] = [
            name for name in folders if not (name.startswith(".") or is_run(Path(root, name)))
        ]
        for name in files:
            path = Path(root, name)
            if name.startswith(".") or path.suffix.lower() not in SUFFIXES or not path.is_file():
                continue
            if path.suffix.lower() == ".png" and is_picture(path):
                drawn += 1
            else:
                (arrays if path.suffix.lower() == NUMPY else found).append(path)
    if refusals:
        refused = refusals[0]
        where = refused.filename or folder
        raise InputError(f"{printable(where)}: cannot be read as a folder: {refused.strerror}")
    found = found or arrays
    if not found:
        kinds = "PNG, JPEG, BMP, PPM, TIFF or .npy"
        besides = f" besides {drawn} that spairkit drew" if drawn else ""
        raise InputError(f"{printable(folder)}: no images in this folder{besides} ({kinds})")
    found.sort(key=lambda path: path.relative_to(folder).as_posix())
    return [frame for path in found for frame in _listed(path)]


def _listed(path: Path) -> list[Path]:
    """The frames of a file of a folder; only TIFF and NumPy files have several."""
    return frames_of(path) if path.suffix.lower() in _STACKS else [path]


def skipped_files(reasons: Sequence[str], total: int) -> str:
    """Says which of `total` image files were skipped, in one line.

    Args:
        reasons: one for each skipped file; each begins with the name of the file.
    """
    more = len(reasons) - _NAMED
    listed = [*reasons[:_NAMED], *([f"and {more} more"] if more > 0 else [])]
    return f"skipped {len(reasons)} of {total}: {'; '.join(listed)}"


def _upright_size(image: Tiff | NumpyImages | _Picture) -> tuple[int, int]:
    height, width = image.stored_size
    return (width, height) if image.orientation in _SIDEWAYS else (height, width)


@contextmanager
def _opened(path: Path | str) -> Iterator[Tiff | NumpyImages | _Picture]:
    """The image, after its header was checked; exceptions of readers become ImageFileError."""
    name = printable(path)
    path, frame = file_of(path)
    try:
        # a pipe or a device would block or never end
        if not path.is_file():
            missing = "not a regular file" if path.exists() else "no such file"
            raise ImageFileError(f"{name}: {missing}; name an image file")
        with path.open("rb") as file:
            stack = open_stack(path, file, frame)
            if stack is not None:
                if frame is None:
                    check_one(stack, name)
                _check_size(stack.stored_size, name)
                yield stack
                return
            if frame is not None:
                raise ImageFileError(f"{name}: {printable(path)} is no stack; name the file itself")
            if path.stat().st_size > _MAX_BYTES:
                raise ImageFileError(f"{name}: larger than 1 GiB; cut it into smaller images")
            with _FILTERS, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with Image.open(file, formats=_FORMATS) as opened:
                    _check_size((opened.height, opened.width), name)
                    yield _Picture(file, opened, name)
    except ImageFileError:
        raise
    except Image.DecompressionBombError:
        raise ImageFileError(
            f"{name}: more than 178 million pixels; cut it into smaller images"
        ) from None
    except UnidentifiedImageError:
        raise ImageFileError(
            f"{name}: not an image that can be read (PNG, JPEG, BMP, PPM, TIFF or .npy)"
        ) from None
    except DAMAGED as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageFileError(f"{name}: a damaged image: {printable(reason[:200])}") from None


def _check_size(size: tuple[int, int], name: str) -> None:
    height, width = size
    if width * height > MAX_PIXELS:
        raise ImageFileError(
            f"{name}: {width}x{height} pixels are more than 178 million; cut it into smaller images"
        )
    if width * height == 0:
        raise ImageFileError(f"{name}: the image is empty ({width}x{height} pixels)")


def _range(image: Image.Image, name: str) -> tuple[float, float]:
    """The least and the greatest value."""
    low, high = np.inf, -np.inf
    for _, strip in _strips(image):
        values = np.asarray(strip)
        if not np.isfinite(values).all():
            raise ImageFileError(f"{name}: contains NaN or infinity; replace them")
        low, high = min(low, float(values.min())), max(high, float(values.max()))
    return low, high


def _ranged(strip: Image.Image, low: float, high: float) -> NDArray[np.float64]:
    # halves, because the difference of two numbers may be too large for one
    half = high / 2 - low / 2
    values = np.asarray(strip).astype(np.float64)
    ranged: NDArray[np.float64] = (values / 2 - low / 2) / (half if half > 0 else 1)
    return ranged


def _tensor(array: NDArray[np.generic]) -> Tensor:
    return torch.from_numpy(np.array(array, order="C"))
