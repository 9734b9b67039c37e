"""Stacks written by tifffile and NumPy: each frame is an image of its own."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from numpy.typing import NDArray

import spairkit
from spairkit import images
from spairkit.config import DataConfig
from spairkit.data.files import data_files, sha256_of
from spairkit.data.folder import ImageFolder
from spairkit.errors import ImageFileError
from spairkit.frames import file_of, frames_of
from spairkit.images import image_size, list_images, pixel_size, read_pixels, write_png
from spairkit.tiff_pages import page_offsets

STACK = np.random.default_rng(0).integers(0, 65536, (12, 9, 14)).astype(np.uint16)


def read_all(path: Path) -> NDArray[np.uint16]:
    return np.stack([read_pixels(frame).numpy()[0] for frame in frames_of(path)])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bigtiff": True},
        {"byteorder": ">"},
        {"compression": "zlib"},
        {"ome": True, "metadata": {"axes": "TYX"}},
        {"imagej": True, "metadata": {"axes": "TYX"}},
        {"imagej": True, "metadata": {"axes": "ZYX"}, "byteorder": ">"},
        {"tile": (16, 16)},
    ],
)
def test_pages_of_a_tiff_are_images(tmp_path: Path, options: dict[str, object]) -> None:
    path = tmp_path / "cells.tif"
    tifffile.imwrite(path, STACK, **options)  # type: ignore[arg-type]
    assert [str(frame) for frame in list_images(path)] == [f"{path}/{i:02}" for i in range(1, 13)]
    assert list_images(tmp_path) == list_images(path)
    np.testing.assert_array_equal(read_all(path), STACK)
    assert image_size(path / "3") == (9, 14)  # a frame may be named without the zero


def test_planes_behind_a_single_page_of_imagej_are_images(tmp_path: Path) -> None:
    path = tmp_path / "large.tif"
    data = STACK.astype(">u2").tobytes()
    tifffile.imwrite(
        path,
        STACK[0],
        byteorder=">",
        metadata=None,
        description="ImageJ=1.54\nimages=12\nslices=12\n",
    )
    written = path.read_bytes()
    first = data[: STACK[0].nbytes]
    assert written.endswith(first)
    path.write_bytes(written + data[len(first) :])
    np.testing.assert_array_equal(read_all(path), STACK)
    path.write_bytes(written)  # the planes are missing
    assert len(frames_of(path)) == 12
    with pytest.raises(ImageFileError, match="ends too early"):
        read_pixels(path / "02")


def test_thumbnails_masks_and_pages_of_another_size_are_no_frames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cells.tif"
    with tifffile.TiffWriter(path) as writer:
        writer.write(STACK[0], metadata=None)
        writer.write(STACK[1], subfiletype=1, metadata=None)
        writer.write(STACK[2], metadata=None)
        writer.write(STACK[3][:4], metadata=None)
    monkeypatch.setattr(images, "_told_of_pages", [])
    with pytest.warns(UserWarning, match="of another size"):
        np.testing.assert_array_equal(read_all(path), STACK[[0, 2]])


@pytest.mark.parametrize("options", [{"ome": True}, {"imagej": True}])
def test_pages_of_several_channels_are_not_mixed(tmp_path: Path, options: dict[str, bool]) -> None:
    path = tmp_path / "cells.tif"
    metadata = {"axes": "TCYX"}
    tifffile.imwrite(path, STACK.reshape(6, 2, 9, 14), metadata=metadata, **options)  # type: ignore[arg-type]
    assert list_images(path) == [path]
    with pytest.raises(
        ImageFileError, match=r"12 pages of 2 channels; name the pages .*cells.tif/01"
    ):
        read_pixels(path)
    np.testing.assert_array_equal(read_pixels(path / "04").numpy()[0], STACK[3])


def test_colours_in_a_page_are_no_channels_of_a_stack(tmp_path: Path) -> None:
    path = tmp_path / "cells.tif"
    colours = STACK.astype(np.uint8)[:3].transpose(1, 2, 0)
    tifffile.imwrite(path, np.stack([colours, colours[::-1]]), photometric="rgb", ome=True)
    assert len(frames_of(path)) == 2
    np.testing.assert_array_equal(read_pixels(path / "2").numpy(), colours[::-1].transpose(2, 0, 1))


@pytest.mark.parametrize(
    ("array", "frames"),
    [
        (STACK, STACK[:, None]),
        (np.asfortranarray(STACK), STACK[:, None]),
        (STACK.astype(">u2"), STACK[:, None]),
        (STACK[0], STACK[:1, None]),
        (STACK.astype(np.uint8).reshape(2, 6, 9, 14)[:, :3].transpose(0, 2, 3, 1),
         STACK.astype(np.uint8).reshape(2, 6, 9, 14)[:, :3]),
        (STACK > 30000, (STACK[:, None] > 30000) * np.uint8(255)),
    ],
)  # fmt: skip
def test_numpy_files_hold_images(
    tmp_path: Path, array: NDArray[np.generic], frames: NDArray[np.generic]
) -> None:
    path = tmp_path / "cells.npy"
    np.save(path, array)
    read = [read_pixels(frame).numpy() for frame in list_images(path)]
    np.testing.assert_array_equal(np.stack(read), frames)
    assert read[0].dtype == frames.dtype


def test_floats_of_numpy_are_stretched_frame_by_frame(tmp_path: Path) -> None:
    np.save(tmp_path / "cells.npy", np.stack([STACK[0] / 7.0, STACK[1] * 3.0]))
    for k in (0, 1):
        values = STACK[k].astype(np.float64)
        expected = (values - values.min()) / np.ptp(values)
        read = read_pixels(tmp_path / "cells.npy" / f"{k + 1}").numpy()[0]
        np.testing.assert_allclose(read, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((2, 2, 2, 5, 5), np.uint8), "shape"),
        (np.zeros(5, np.uint8), "shape"),
        (np.zeros((0, 5), np.uint8), "empty"),
        (np.zeros((5, 5), complex), "complex"),
        (np.full((5, 5), np.nan), "NaN"),
        (np.array([[1, "a"]], dtype=object), "NumPy array of object"),
    ],
)
def test_other_arrays_are_refused(tmp_path: Path, array: NDArray[np.generic], reason: str) -> None:
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    with pytest.raises(ImageFileError, match=reason):
        read_pixels(tmp_path / "a.npy")


def test_damaged_numpy_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    np.save(path, STACK)
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    last = frames_of(path)[-1]
    with pytest.raises(ImageFileError, match="the file ends too early"):
        read_pixels(last)
    assert np.array_equal(read_pixels(frames_of(path)[0])[0].numpy(), STACK[0])
    np.save(path, STACK[:4])  # meanwhile it has become shorter
    with pytest.raises(ImageFileError, match="there is no image 12; it has 4"):
        read_pixels(last)
    path.write_bytes(data[:6] + b"\x09" + data[7:])
    with pytest.raises(ImageFileError, match="damaged"):
        read_pixels(path)


def test_transparency_of_numpy_lies_on_black_or_is_refused(tmp_path: Path) -> None:
    colours = np.zeros((5, 6, 4), np.uint8)
    colours[..., 0], colours[..., 3] = 200, 51
    np.save(tmp_path / "x.npy", colours)
    assert read_pixels(tmp_path / "x.npy")[:, 0, 0].tolist() == [40, 0, 0]
    np.save(tmp_path / "x.npy", colours.astype(np.float32))
    with pytest.raises(ImageFileError, match="float32 with transparency"):
        read_pixels(tmp_path / "x.npy")


def test_numpy_files_beside_images_are_left_out(tmp_path: Path) -> None:
    np.save(tmp_path / "masks.npy", STACK)
    assert len(list_images(tmp_path)) == 12
    tifffile.imwrite(tmp_path / "cells.tif", STACK[0])
    assert list_images(tmp_path) == [tmp_path / "cells.tif"]


def test_a_stack_is_named_by_its_frames(tmp_path: Path) -> None:
    path = tmp_path / "cells.tif"
    tifffile.imwrite(path, STACK, resolution=(4, 2), resolutionunit="centimeter")
    with pytest.raises(ImageFileError, match=r"a stack of 12 pages; name one, as .*cells\.tif/01"):
        read_pixels(path)
    with pytest.raises(ImageFileError, match="there is no page 13; it has 12 pages"):
        read_pixels(path / "13")
    with pytest.raises(ImageFileError, match="there is no page 0; it has 12 pages"):
        read_pixels(path / "0")
    assert file_of(path / "13") == (path, 13)
    assert pixel_size(path / "02") == (2500, 5000)
    one = tmp_path / "one.png"
    write_png(one, torch.zeros(3, 9, 14))
    with pytest.raises(ImageFileError, match="is no stack"):
        read_pixels(one / "1")
    with pytest.raises(ImageFileError, match="no such file"):
        read_pixels(tmp_path / "1")


def test_a_folder_of_a_stack(tmp_path: Path) -> None:
    path = tmp_path / "cells.tif"
    tifffile.imwrite(path, STACK)
    for place in (path, tmp_path):
        config = DataConfig(name="folder", path=str(place), image_height=9, image_width=14)
        folder = ImageFolder(config, "test")
        read = list(folder.images())
        assert [name for name, *_ in read] == [f"cells.tif/{i:02}" for i in range(1, 13)]
        np.testing.assert_allclose(read[5][2][0].numpy(), STACK[5] / 65535, atol=1e-6)
        assert data_files(config) == {"cells.tif": path}
    before = sha256_of(path / "03")
    assert before == sha256_of(path)
    tifffile.imwrite(path, STACK[::-1])
    assert sha256_of(path / "03") != before


def test_detect_many_takes_a_stack(tmp_path: Path) -> None:
    path = tmp_path / "digits.npy"
    scenes = (np.random.default_rng(1).random((3, 48, 48)) * 200).astype(np.uint8)
    np.save(path, scenes)
    detector = spairkit.load(search="off")
    found = list(detector.detect_many(path, threshold=0.1))
    alone = [detector.detect(scene, threshold=0.1) for scene in scenes]
    assert [item.image for item in found] == [path / "1", path / "2", path / "3"]
    for one, other in zip(found, alone, strict=True):
        torch.testing.assert_close(one.boxes, other.boxes)


def test_pages_without_an_end_are_refused() -> None:
    file = io.BytesIO()
    tifffile.imwrite(file, STACK[:2], metadata=None)
    assert len(page_offsets(file).offsets) == 2
    data = bytearray(file.getvalue())
    offsets = page_offsets(file).offsets
    (count,) = struct.unpack_from("<H", data, offsets[1])
    struct.pack_into("<I", data, offsets[1] + 2 + 12 * count, offsets[0])
    with pytest.raises(ValueError, match="no end"):
        page_offsets(io.BytesIO(bytes(data)))
