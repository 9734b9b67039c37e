"""Glyphs to scatter: the packaged digits, or those of an MNIST or EMNIST file.

No glyph is in two splits. Resizing uses exact integer arithmetic, so that every machine gets the
same bytes.
"""

import gzip
import lzma
import math
import struct
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from numpy.typing import NDArray

from spairkit.config import DataConfig
from spairkit.errors import InputError
from spairkit.images import DAMAGED

Split = Literal["train", "validation", "test"]

_MAX_BYTES = 1 << 30
_MAX_SIDE = 256
_CHUNK = 4096
_PAIR = ("images", "labels")


@dataclass(frozen=True, eq=False)
class Glyphs:
    """Grey images of one size, white on black."""

    images: NDArray[np.uint8]  # [n, h, w]
    labels: NDArray[np.int64]  # [n], -1 for no label
    full: int = 255  # the value of white

    def __len__(self) -> int:
        """The number of glyphs."""
        return len(self.labels)


def load_glyphs(config: DataConfig, split: Split) -> Glyphs:
    """The glyphs of one split, in the order of the file.

    Of each class the first 80 % are for training, the next 10 % for validation and the last 10 %
    for testing, as in the paper (docs/model.md 10). An npz file with its own test set keeps it, and
    its training set is split 90 to 10.

    `digits` needs no file. `mnist` and `emnist` read `config.path`: an npz with `x_train`,
    `y_train`, `x_test`, `y_test`, or with `images` and optionally `labels`; or an IDX file of
    images, plain or gzipped, whose labels are found beside it by their usual name. MNIST images are
    cropped by one pixel at every edge, so that digits have the size of the paper's. EMNIST images
    are transposed, and only digits are kept if there are labels.

    Raises:
        InputError: there is no such file, it is damaged, too large or of another kind, or the
            split would be empty.
    """
    if config.name == "digits":
        path = Path(__file__).with_name("digits.npz")
    elif config.path:
        path = Path(config.path)
    else:
        raise InputError(
            f"data.name = {config.name!r} needs data.path: an npz file, or an IDX file of images "
            "(plain or gzipped)"
        )
    arrays = _read(path)
    if "x_train" in arrays:
        prefix = "test" if split == "test" else "train"
        images, labels = arrays[f"x_{prefix}"], arrays[f"y_{prefix}"]
        tenths = {"train": (0, 9), "validation": (9, 10), "test": (0, 10)}[split]
    else:
        images, labels = arrays["images"], arrays["labels"]
        tenths = {"train": (0, 8), "validation": (8, 9), "test": (9, 10)}[split]
    if config.name == "mnist":
        images = images[:, 1:-1, 1:-1]
    elif config.name == "emnist":
        images = images.swapaxes(1, 2)[labels < 10]
        labels = labels[labels < 10]
    chosen = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        of_class = np.flatnonzero(labels == label)
        low, high = (len(of_class) * tenth // 10 for tenth in tenths)
        chosen[of_class[low:high]] = True
    chosen &= images.max((1, 2), initial=0) > 0
    if not chosen.any():
        raise InputError(
            f"{path}: too few glyphs for a {split} split; each class needs at least ten"
        )
    full = 16 if config.name == "digits" else 255
    return Glyphs(np.ascontiguousarray(images[chosen]), labels[chosen], full)


def resize(images: NDArray[np.uint8], side: int, *, full: int = 255) -> NDArray[np.uint8]:
    """Grey images [n, h, w] resized to [n, side, side], with 0 to `full` scaled to 0 to 255.

    Bilinear between pixel centres, with antialiasing. The weights are integers and the exact
    quotient is rounded once, half up, so that all machines agree.
    """
    down, across = _weights(images.shape[1], side), _weights(images.shape[2], side)
    # every product and sum below is an integer less than 2^53, exact in any order
    divisor = down.sum(1)[:, None] * across.sum(1)[None, :] * full
    resized = np.empty((len(images), side, side), dtype=np.uint8)
    for start in range(0, len(images), _CHUNK):
        chunk = images[start : start + _CHUNK].astype(np.float64)
        sums = (down.astype(np.float64) @ chunk @ across.T.astype(np.float64)).astype(np.int64)
        resized[start : start + _CHUNK] = (2 * 255 * sums + divisor) // (2 * divisor)
    return resized


def _weights(old: int, new: int) -> NDArray[np.int64]:
    """[new, old]: the share of old pixel j in new pixel i, times a number that depends on i.

    Their centres are (2j + 1) / 2old and (2i + 1) / 2new; the triangle's half width is a pixel of
    the coarser grid. Multiplied by 2 old new, everything is an integer.
    """
    centres = (2 * np.arange(new) + 1) * old
    distances = np.abs((2 * np.arange(old) + 1)[None, :] * new - centres[:, None])
    weights: NDArray[np.int64] = np.maximum(2 * max(old, new) - distances, 0)
    return weights


def _read(path: Path) -> dict[str, NDArray[Any]]:
    """`x_train, y_train, x_test, y_test`, or `images, labels`, checked."""
    with _reading(path):
        if not path.exists():
            raise InputError(f"{path}: no such file")
        if not path.is_file():
            raise InputError(f"{path}: not a regular file; name an npz file or IDX images")
        with path.open("rb") as file:
            magic = file.read(2)
    if magic == b"PK":
        arrays = _read_npz(path)
    else:
        arrays, labels = {"images": _read_idx_array(path)}, _labels_beside(path)
        if labels is not None:
            arrays["labels"] = _read_idx_array(labels)
    if "images" in arrays:
        arrays.setdefault("labels", np.full(len(arrays["images"]), -1))
    for images_key, labels_key in (("x_train", "y_train"), ("x_test", "y_test"), _PAIR):
        if images_key in arrays:
            _check(path, images_key, arrays[images_key], labels_key, arrays[labels_key])
            arrays[labels_key] = arrays[labels_key].astype(np.int64)
    return arrays


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns exceptions from damaged files into an InputError that names the file."""
    try:
        with warnings.catch_warnings():
            # numpy's, about headers that Python 2 wrote
            warnings.simplefilter("ignore")
            yield
    except InputError:
        raise
    except (*DAMAGED, zipfile.BadZipFile, lzma.LZMAError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path}: not a readable npz or IDX file: {reason[:200]}") from None


def _check(
    path: Path, images_key: str, images: NDArray[Any], labels_key: str, labels: NDArray[Any]
) -> None:
    if images.dtype != np.uint8 or images.ndim != 3:
        raise InputError(
            f"{path}: {images_key} must be uint8 [n, height, width], "
            f"got {images.dtype} {list(images.shape)}"
        )
    if not 3 <= min(images.shape[1:]) <= max(images.shape[1:]) <= _MAX_SIDE:
        raise InputError(
            f"{path}: {images_key} must have sides of 3 to {_MAX_SIDE} px, "
            f"got {images.shape[1]}x{images.shape[2]}"
        )
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        raise InputError(
            f"{path}: {labels_key} must be {len(images)} integers, "
            f"got {labels.dtype} {list(labels.shape)}"
        )


def _read_npz(path: Path) -> dict[str, NDArray[Any]]:
    with _reading(path), zipfile.ZipFile(path) as archive:
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        wanted = ["x_train", "y_train", "x_test", "y_test"]
        if not members.keys() >= set(wanted):
            wanted = [key for key in _PAIR if key in members]
        if not wanted or wanted == ["labels"]:
            raise InputError(
                f"{path}: needs x_train, y_train, x_test and y_test, or images and perhaps labels; "
                f"it has {', '.join(map(repr, sorted(members)[:8])) or 'nothing'}"
            )
        if sum(members[key].file_size for key in wanted) > _MAX_BYTES:
            raise InputError(f"{path}: holds more than 1 GiB, which no set of glyphs needs")
        arrays = {}
        for key in wanted:
            with archive.open(members[key]) as member:
                arrays[key] = _read_npy(member, members[key].file_size)
    return arrays


def _read_npy(member: IO[bytes], size: int) -> NDArray[Any]:
    """An array of numbers whose header promises no more than the member holds."""
    version = np.lib.format.read_magic(member)
    if version == (1, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
    elif version == (2, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_2_0(member)
    else:
        raise ValueError(f"npy version {version}")
    if dtype.kind not in "biuf" or not shape:
        raise ValueError(f"an array of {dtype}, shape {list(shape)}")
    wanted = math.prod(shape) * dtype.itemsize
    if min(shape) < 0 or wanted > size:
        raise ValueError(f"an array of shape {list(shape)} in {size} bytes")
    data = member.read(wanted)
    if len(data) < wanted:
        raise ValueError("an array is cut short")
    array: NDArray[Any] = np.frombuffer(data, dtype=dtype)
    return array.reshape(shape, order="F" if fortran else "C")


def _labels_beside(path: Path) -> Path | None:
    """`train-images-idx3-ubyte.gz` has its labels in `train-labels-idx1-ubyte`, gzipped or not."""
    name = path.name.removesuffix(".gz")
    for dot in ("-", "."):
        renamed = name.replace(f"images{dot}idx3", f"labels{dot}idx1")
        if renamed != name:
            for candidate in (path.with_name(f"{renamed}.gz"), path.with_name(renamed)):
                if candidate.is_file():
                    return candidate
    return None


def _read_idx_array(path: Path) -> NDArray[Any]:
    """Unsigned bytes in IDX form: two zeros, type 8, the number of axes, lengths, data."""
    with _reading(path):
        with path.open("rb") as raw:
            zipped = raw.read(2) == b"\x1f\x8b"
        with gzip.open(path) if zipped else path.open("rb") as file:
            head = file.read(4)
            if len(head) < 4 or head[:3] != b"\0\0\x08" or not 1 <= head[3] <= 4:
                raise ValueError("it starts like neither")
            shape = struct.unpack(f">{head[3]}I", file.read(4 * head[3]))
            size = math.prod(shape)
            if size > _MAX_BYTES:
                raise InputError(f"{path}: holds more than 1 GiB, which no set of glyphs needs")
            data = file.read(size + 1)
            if len(data) != size:
                raise ValueError(f"its header promises {size} bytes of data, not {len(data)}")
        return np.frombuffer(data, dtype=np.uint8).reshape(shape)
