"""Glyph files, splits and resizing against exact fractions; hostile files give InputError."""

import gzip
import io
import os
import random
import zipfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from spairkit.config import DataConfig
from spairkit.data.datasets import data_settings
from spairkit.data.glyphs import Split, load_glyphs, resize
from spairkit.errors import InputError

SPLITS: tuple[Split, ...] = ("train", "validation", "test")


def numbered(count: int, side: int = 6) -> NDArray[np.uint8]:
    """Images that encode their number in two pixels inside the rim."""
    images = np.zeros((count, side, side), np.uint8)
    images[:, 2, 2] = np.arange(count) // 256
    images[:, 2, 3] = np.arange(count) % 256
    images[:, 3, 3] = 255
    return images


def numbers(images: NDArray[np.uint8]) -> list[int]:
    bright = [np.argwhere(image == 255)[-1] for image in images]
    return [
        int(image[y - 1, x - 1]) * 256 + int(image[y - 1, x])
        for image, (y, x) in zip(images, bright, strict=True)
    ]


def idx(array: NDArray[np.uint8]) -> bytes:
    lengths = b"".join(length.to_bytes(4, "big") for length in array.shape)
    return bytes([0, 0, 8, array.ndim]) + lengths + array.tobytes()


def npz(**arrays: Any) -> bytes:
    data = io.BytesIO()
    np.savez_compressed(data, **arrays)
    return data.getvalue()


def mnist(path: Path, split: Split = "train") -> Any:
    return load_glyphs(DataConfig(name="mnist", path=str(path)), split)


def resized_by_fractions(image: NDArray[np.uint8], side: int) -> list[list[int]]:
    """Normalised triangular filters around new pixels' centres, as wide as the coarser pixels."""

    def weights(old: int) -> list[dict[int, Fraction]]:
        scale = max(Fraction(old, side), Fraction(1))
        rows = []
        for i in range(side):
            centre = (i + Fraction(1, 2)) * Fraction(old, side)
            row = {j: 1 - abs(j + Fraction(1, 2) - centre) / scale for j in range(old)}
            row = {j: weight for j, weight in row.items() if weight > 0}
            rows.append({j: weight / sum(row.values()) for j, weight in row.items()})
        return rows

    down, across = weights(image.shape[0]), weights(image.shape[1])
    return [
        [
            int(
                sum(
                    (p * q * int(image[y, x]) for y, p in row.items() for x, q in column.items()),
                    Fraction(1, 2),
                )
            )
            for column in across
        ]
        for row in down
    ]


@pytest.mark.parametrize(
    ("height", "width", "side"), [(8, 8, 14), (26, 26, 14), (7, 11, 5), (9, 9, 9), (28, 20, 23)]
)
def test_resizing_matches_fractions(height: int, width: int, side: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, height, width)).astype(np.uint8)
    for image, resized in zip(images, resize(images, side), strict=True):
        assert resized.tolist() == resized_by_fractions(image, side)


def test_resizing_matches_torch_to_one_level() -> None:
    images = np.random.default_rng(1).integers(0, 256, (16, 26, 26)).astype(np.uint8)
    theirs = torch.nn.functional.interpolate(
        torch.from_numpy(images).float()[:, None], (14, 14), mode="bilinear", antialias=True
    )[:, 0]
    assert (torch.from_numpy(resize(images, 14)).float() - theirs).abs().max() <= 0.501


def test_full_level_is_scaled_to_255() -> None:
    levels = np.arange(17, dtype=np.uint8).reshape(17, 1, 1).repeat(4, 1).repeat(4, 2)
    assert resize(levels, 4, full=16)[:, 0, 0].tolist() == [
        (255 * level + 8) // 16 for level in range(17)
    ]


def test_every_digit_is_in_exactly_one_split() -> None:
    loaded = [load_glyphs(DataConfig(), split) for split in SPLITS]
    assert sum(map(len, loaded)) == 1797
    kept = [{image.tobytes() for image in glyphs.images} for glyphs in loaded]
    assert not kept[0] & kept[1]
    assert not kept[0] & kept[2]
    assert not kept[1] & kept[2]
    for glyphs, share in zip(loaded, (0.8, 0.1, 0.1), strict=True):
        assert np.bincount(glyphs.labels, minlength=10) == pytest.approx(
            np.full(10, 179.7 * share), abs=6
        )


def test_splits_divide_each_class_in_file_order(tmp_path: Path) -> None:
    labels = np.array([3] * 10 + [5] * 30 + [3] * 10)
    path = tmp_path / "glyphs.npz"
    path.write_bytes(npz(images=numbered(50), labels=labels))
    threes, fives = [*range(10), *range(40, 50)], list(range(10, 40))
    expected = {
        "train": threes[:16] + fives[:24],
        "validation": threes[16:18] + fives[24:27],
        "test": threes[18:] + fives[27:],
    }
    for split in SPLITS:
        glyphs = mnist(path, split)
        assert numbers(glyphs.images) == sorted(expected[split])
        assert glyphs.labels.tolist() == labels[sorted(expected[split])].tolist()


def test_separate_test_set_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "mnist.npz"
    images, labels = numbered(60), np.arange(60, dtype=np.uint8) % 2
    path.write_bytes(
        npz(x_train=images[:40], y_train=labels[:40], x_test=images[40:], y_test=labels[40:])
    )
    assert numbers(mnist(path, "train").images) == list(range(36))
    assert numbers(mnist(path, "validation").images) == list(range(36, 40))
    assert numbers(mnist(path, "test").images) == list(range(40, 60))


def test_mnist_is_cropped_and_emnist_is_transposed(tmp_path: Path) -> None:
    path = tmp_path / "glyphs.npz"
    images = np.random.default_rng(2).integers(1, 256, (20, 7, 9)).astype(np.uint8)
    labels = np.array([1, 40] * 10)
    path.write_bytes(npz(images=images, labels=labels))
    assert np.array_equal(mnist(path).images, images[:16, 1:6, 1:8])
    upright = load_glyphs(DataConfig(name="emnist", path=str(path)), "train")
    assert np.array_equal(upright.images, images[0:16:2].swapaxes(1, 2))
    assert set(upright.labels.tolist()) == {1}


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("dot", ["-", "."])
def test_idx_files_are_read_with_their_labels(tmp_path: Path, zipped: bool, dot: str) -> None:
    pack, suffix = (gzip.compress, ".gz") if zipped else (bytes, "")
    images = tmp_path / f"train-images{dot}idx3-ubyte{suffix}"
    images.write_bytes(pack(idx(numbered(20))))
    assert mnist(images).labels.tolist() == [-1] * 16
    labels = tmp_path / f"train-labels{dot}idx1-ubyte"
    labels.write_bytes(idx(np.arange(20, dtype=np.uint8) % 2))
    assert mnist(images).labels.tolist() == [0, 1] * 8
    assert numbers(mnist(images, "test").images) == [18, 19]


def test_blank_glyphs_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "glyphs.npz"
    images = numbered(20)
    images[3] = 0
    path.write_bytes(npz(images=images))
    assert 3 not in numbers(mnist(path).images)
    assert len(mnist(path)) == 15


def npz_with_wrong_header() -> bytes:
    """A member whose npy header declares far more data than it has."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (1 << 40, 28, 28)}
    )
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("images.npy", header.getvalue())
    return data.getvalue()


def npz_bomb() -> bytes:
    """The zip directory declares two gigabytes for a member of a few bytes."""
    whole = bytearray(npz(images=numbered(20)))
    at = whole.rindex(b"PK\x01\x02")
    whole[at + 24 : at + 28] = (2 << 30).to_bytes(4, "little")
    return bytes(whole)


HOSTILE = {
    "empty": (b"", "starts like neither"),
    "text": (b"hello there", "starts like neither"),
    "truncated gzip": (gzip.compress(idx(numbered(20)))[:40], "not a readable"),
    "idx of 1 TB": (b"\0\0\x08\x03" + b"\0\x10\0\0" * 3, "more than 1 GiB"),
    "short idx": (idx(numbered(20))[:-1], "promises 720 bytes"),
    "long idx": (idx(numbered(20)) + b"x", "promises 720 bytes"),
    "truncated npz": (npz(images=numbered(20))[:-30], "not a zip file"),
    "wrong npy header": (npz_with_wrong_header(), "in 128 bytes"),
    "npz bomb": (npz_bomb(), "more than 1 GiB"),
    "objects": (npz(images=np.array([{}, {}], dtype=object)), "an array of object"),
    "floats": (npz(images=np.full((20, 8, 8), np.nan)), "must be uint8"),
    "flat": (npz(images=np.ones((20, 64), np.uint8)), "must be uint8"),
    "thin": (npz(images=np.ones((20, 64, 1), np.uint8)), "sides of 3 to 256"),
    "too few labels": (npz(images=numbered(20), labels=np.zeros(19, int)), "must be 20 integers"),
    "float labels": (npz(images=numbered(20), labels=np.zeros(20)), "must be 20 integers"),
    "other names": (npz(pictures=numbered(20)), "needs x_train"),
    "no glyphs": (npz(images=numbered(0)), "too few"),
    "one per class": (npz(images=numbered(3), labels=np.arange(3)), "too few"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files_give_one_line_errors(tmp_path: Path, kind: str) -> None:
    data, reason = HOSTILE[kind]
    path = tmp_path / "glyphs"
    path.write_bytes(data)
    with pytest.raises(InputError, match=reason) as caught:
        mnist(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_and_special_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        mnist(tmp_path / "absent.npz")
    with pytest.raises(InputError, match="not a regular file"):
        mnist(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="not a regular file"):
        mnist(tmp_path / "pipe")
    with pytest.raises(InputError, match=r"needs data\.path"):
        load_glyphs(DataConfig(name="mnist"), "train")


def test_damaged_labels_file_is_named(tmp_path: Path) -> None:
    images = tmp_path / "t10k-images-idx3-ubyte"
    images.write_bytes(idx(numbered(20)))
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(b"\x1f\x8bnot gzip")
    with pytest.raises(InputError, match=r"t10k-labels-idx1-ubyte\.gz"):
        mnist(images)


@pytest.mark.parametrize("form", ["npz", "idx", "gzip"])
def test_damaged_files_load_or_are_refused(tmp_path: Path, form: str) -> None:
    images = numbered(20)
    whole = {
        "npz": npz(images=images, labels=np.zeros(20, int)),
        "idx": idx(images),
        "gzip": gzip.compress(idx(images)),
    }[form]
    rng = random.Random(form)
    path = tmp_path / "glyphs"
    read, reasons = 0, []
    for _ in range(200):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 1, 3, 10))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data[: rng.choice((len(data), len(data), rng.randrange(len(data))))])
        try:
            assert mnist(path).images.dtype == np.uint8
            read += 1
        except InputError as error:
            reasons.append(str(error))
    assert read + len(reasons) == 200
    assert len(reasons) > 50
    assert not any("\n" in reason for reason in reasons)


@pytest.mark.parametrize(
    ("name", "kind"), [("mnist.npz", "mnist"), ("emnist.npz", "emnist"), ("EMNIST-A.npz", "emnist")]
)
def test_emnist_is_recognised_by_file_name(tmp_path: Path, name: str, kind: str) -> None:
    path = tmp_path / name
    path.touch()
    assert data_settings(str(path))["data"].items() >= {"name": kind, "path": str(path)}.items()
