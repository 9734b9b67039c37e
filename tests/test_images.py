"""Every mode of every format against arithmetic on its pixels; hostile files give InputError."""

import io
import os
import random
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from spairkit import deep_pixels
from spairkit import images as images_module
from spairkit.config import PrepareConfig
from spairkit.errors import InputError
from spairkit.images import (
    MAX_PIXELS,
    as_image,
    commonest_colour,
    image_size,
    is_picture,
    list_images,
    num_channels,
    read_image,
    read_pixels,
    shows,
    skipped_files,
    stored_form,
    upright,
    upright_boxes,
    write_picture,
    write_png,
)
from spairkit.preparation import fixed_levels

RGB = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype(np.uint8)
GREY = RGB[:, :, 0]


def saved(path: Path, array: NDArray[Any], **options: Any) -> Path:
    Image.fromarray(array).save(path, **options)
    return path


def planes(rgb: NDArray[Any]) -> torch.Tensor:
    return torch.tensor(np.asarray(rgb, dtype=np.float64) / 255).permute(2, 0, 1).float()


@pytest.mark.parametrize("suffix", ["png", "bmp", "ppm", "tif"])
def test_colour_images_are_read(tmp_path: Path, suffix: str) -> None:
    image = read_image(saved(tmp_path / f"x.{suffix}", RGB))
    assert image.dtype == torch.float32
    torch.testing.assert_close(image, planes(RGB))


def test_path_may_be_a_string(tmp_path: Path) -> None:
    name = str(tmp_path / "x.png")
    write_png(name, planes(RGB))
    torch.testing.assert_close(read_image(name), planes(RGB))
    assert image_size(name) == (5, 7)
    assert list_images(str(tmp_path)) == [Path(name)]


@pytest.mark.parametrize("suffix", ["png", "bmp", "pgm", "tif"])
def test_grey_becomes_three_equal_channels(tmp_path: Path, suffix: str) -> None:
    path = saved(tmp_path / f"x.{suffix}", GREY)
    torch.testing.assert_close(read_image(path), planes(np.stack([GREY] * 3, 2)))
    assert read_pixels(path).shape == (1, 5, 7)


def test_jpeg_is_read_in_rgb_grey_and_cmyk(tmp_path: Path) -> None:
    flat = np.full((16, 16, 3), (200, 90, 40), np.uint8)
    for mode in ("RGB", "L", "CMYK"):
        picture = Image.fromarray(flat).convert(mode)
        picture.save(tmp_path / "x.jpg", quality=95)
        expected = planes(np.asarray(picture.convert("RGB")))
        assert (read_image(tmp_path / "x.jpg") - expected).abs().max() < 0.02


def test_bilevel_and_palette_images_are_read(tmp_path: Path) -> None:
    saved(tmp_path / "bits.png", GREY > 127)
    black_and_white = np.where(GREY > 127, 255, 0)
    torch.testing.assert_close(
        read_image(tmp_path / "bits.png"), planes(np.stack([black_and_white] * 3, 2))
    )
    palette = Image.fromarray(RGB).quantize(16)
    palette.save(tmp_path / "palette.png")
    torch.testing.assert_close(
        read_image(tmp_path / "palette.png"), planes(np.asarray(palette.convert("RGB")))
    )


def test_transparency_is_composited_on_black(tmp_path: Path) -> None:
    alpha = np.linspace(0, 255, 35).round().astype(np.uint8).reshape(5, 7)
    saved(tmp_path / "rgba.png", np.dstack([RGB, alpha]))
    shaded = RGB * (alpha[:, :, None] / 255)
    assert (read_image(tmp_path / "rgba.png") - planes(shaded)).abs().max() <= 1.01 / 255
    saved(tmp_path / "la.png", np.dstack([GREY, alpha]))
    shaded = np.stack([GREY * (alpha / 255)] * 3, 2)
    assert (read_image(tmp_path / "la.png") - planes(shaded)).abs().max() <= 1.01 / 255
    # one colour declared transparent
    holes = np.where(GREY > 127, 200, 90).astype(np.uint8)
    Image.fromarray(holes).save(tmp_path / "key.png", transparency=200)
    assert read_pixels(tmp_path / "key.png").unique().tolist() == [0, 90]


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_images_keep_their_range_and_depth(tmp_path: Path, suffix: str) -> None:
    levels = np.array([[0, 1, 256], [32768, 65534, 65535]], np.uint16)
    image = read_image(saved(tmp_path / f"x.{suffix}", levels))
    torch.testing.assert_close(image[1], torch.tensor(levels / 65535).float(), rtol=1e-6, atol=0)
    assert len(image.unique()) == 6


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_32_bit_images_are_stretched(tmp_path: Path, kind: type) -> None:
    image = read_image(saved(tmp_path / "x.tif", np.array([[-50, 0], [50, 150]], kind)))
    assert image[0].tolist() == [[0.0, 0.25], [0.5, 1.0]]
    assert read_image(saved(tmp_path / "x.tif", np.full((2, 2), 7, kind))).abs().sum() == 0


def test_largest_range_of_float32_is_stretched(tmp_path: Path) -> None:
    most = float(np.finfo(np.float32).max)
    image = read_image(saved(tmp_path / "x.tif", np.array([[-most, 0, most]], np.float32)))
    assert image[0].tolist() == [[0.0, 0.5, 1.0]]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_pixels_are_refused(tmp_path: Path, value: float) -> None:
    path = saved(tmp_path / "x.tif", np.array([[0.0, value]], np.float32))
    with pytest.raises(InputError, match="contains NaN or infinity"):
        read_image(path)


@pytest.mark.parametrize("suffix", ["png", "tif", "jpg"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int, suffix: str) -> None:
    """Compares with flips and transpositions of rows and columns."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100, "subsampling": 0} if suffix == "jpg" else {}
    path = saved(tmp_path / f"x.{suffix}", RGB, exif=exif, **options)
    turned = {
        1: RGB,
        2: RGB[:, ::-1],
        3: RGB[::-1, ::-1],
        4: RGB[::-1],
        5: RGB.swapaxes(0, 1),
        6: RGB[::-1].swapaxes(0, 1),
        7: RGB[::-1, ::-1].swapaxes(0, 1),
        8: RGB[:, ::-1].swapaxes(0, 1),
    }[orientation]
    assert read_image(path).shape[1:] == turned.shape[:2]
    assert (read_image(path) - planes(turned)).abs().max() < 0.02
    assert image_size(path) == turned.shape[:2]
    assert stored_form(path) == ((5, 7), orientation)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_turn_with_the_image(orientation: int) -> None:
    stored = torch.zeros(1, 5, 7, dtype=torch.uint8)
    boxes = torch.tensor([[1.0, 2.0, 5.0, 3.0], [0.0, 0.0, 2.0, 4.0]])
    found = upright_boxes(boxes, orientation, (5, 7))
    for (x1, y1, x2, y2), (u1, v1, u2, v2) in zip(
        boxes.int().tolist(), found.int().tolist(), strict=True
    ):
        marked = stored.clone()
        marked[:, y1:y2, x1:x2] = 1
        turned = upright(marked, orientation)
        assert turned[:, v1:v2, u1:u2].all()
        assert turned.sum() == marked.sum()


@pytest.mark.parametrize("form", ["apng", "mpo", "ppm"])
def test_first_frame_is_read_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.setattr(images_module, "_told_of_pages", [])
    flat = np.full((16, 16, 3), 90, np.uint8)
    path = tmp_path / "x"
    if form == "ppm":
        path.write_bytes(encoded("PPM", flat) + b"\n" + encoded("PPM", 255 - flat))
    else:
        kind = {"apng": "PNG", "mpo": "MPO"}[form]
        frames = [Image.fromarray(flat), Image.fromarray(255 - flat)]
        frames[0].save(path, format=kind, save_all=True, append_images=frames[1:])
    with pytest.warns(UserWarning, match=r"x: holds further images .* not read"):
        image = read_image(path)
    assert (image - planes(flat)).abs().max() < 0.02


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1)])
def test_one_pixel_wide_images_are_read(tmp_path: Path, shape: tuple[int, int]) -> None:
    assert read_image(saved(tmp_path / "x.png", np.zeros(shape, np.uint8))).shape == (3, *shape)


def png_header(width: int, height: int) -> bytes:
    """A PNG whose header declares this size, without data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def encoded(form: str, array: NDArray[Any] = RGB) -> bytes:
    data = io.BytesIO()
    Image.fromarray(array).save(data, format=form)
    return data.getvalue()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not an image"),
        (b"hello", "not an image"),
        (png_header(60000, 60000), "178 million"),
        (png_header(14000, 14000), "178 million"),
        (png_header(1 << 31, 2), "cut it into smaller images"),
        (png_header(30, 30), "damaged"),
        (b"P6 20000 20000 255\n", "178 million"),
        (encoded("PNG")[:60], "damaged"),
        (encoded("GIF"), "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    ],
)
def test_hostile_files_give_one_line_errors(tmp_path: Path, data: bytes, reason: str) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(data)
    with pytest.raises(InputError, match=reason) as caught:
        read_image(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_size_limit_applies_to_pixels_not_sides(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(png_header(MAX_PIXELS, 1))
    assert image_size(path) == (1, MAX_PIXELS)
    path.write_bytes(png_header(MAX_PIXELS + 1, 1))
    with pytest.raises(InputError, match="178 million"):
        image_size(path)


def test_pillows_tiffs_are_read(tmp_path: Path) -> None:
    for compression in ("raw", "packbits", "tiff_lzw", "tiff_deflate", "tiff_adobe_deflate"):
        path = saved(tmp_path / "x.tif", RGB, compression=compression)
        torch.testing.assert_close(read_image(path), planes(RGB))


DEEP = np.random.default_rng(3).integers(0, 65536, (6, 9, 4)).astype(np.uint16)


def deep_png(levels: NDArray[Any], interlaced: bool = False, key: bytes = b"") -> bytes:
    """A PNG of 16 bits written by hand, with a filter of its own in each row."""
    height, width, channels = levels.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    data = b""
    # Adam7 in two of its passes: every eighth column and row, and the rest of one pixel's image
    passes = [levels]
    if interlaced:
        steps = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2))
        passes = [levels[y::down, x::across] for y, x, down, across in steps] + [levels[1::2]]
    for part in passes:
        if not part.size:
            continue
        raw = part.astype(">u2").view(np.uint8).reshape(len(part), -1).astype(int)
        above = np.zeros_like(raw[0])
        for number, row in enumerate(raw):
            filter_ = number % 3
            before = np.concatenate([np.zeros(2 * channels, int), row[: -2 * channels]])
            other = (0, before, above)[filter_]
            data += bytes([filter_]) + ((row - other) % 256).astype(np.uint8).tobytes()
            above = row
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, interlaced))]
    chunks += [(b"tRNS", key)] if key else []
    compressed = zlib.compress(data)
    chunks += [(b"IDAT", compressed[:40]), (b"IDAT", compressed[40:]), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_png_of_16_bits_keeps_its_depth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, channels: int, interlaced: bool
) -> None:
    path = tmp_path / "x.png"
    levels = DEEP[..., :channels]
    path.write_bytes(deep_png(levels, interlaced))
    colours = levels[..., : 1 if channels < 3 else 3].astype(np.float64)
    if channels in (2, 4):
        colours *= levels[..., -1:] / 65535
    found = read_pixels(path)
    assert found.dtype == torch.uint16
    assert np.abs(found.permute(1, 2, 0).numpy() - colours).max() <= 0.51
    monkeypatch.setattr(deep_pixels, "_STRIP_PIXELS", 20)
    assert torch.equal(read_pixels(path), found)


def test_key_of_a_png_of_16_bits_is_transparent(tmp_path: Path) -> None:
    levels = DEEP[..., :3].copy()
    levels[2, 3] = levels[4, 5] = (300, 301, 302)
    (tmp_path / "x.png").write_bytes(deep_png(levels, key=struct.pack(">HHH", 300, 301, 302)))
    levels[2, 3] = levels[4, 5] = 0
    assert np.array_equal(read_pixels(tmp_path / "x.png").permute(1, 2, 0).numpy(), levels)


def test_damaged_png_of_16_bits_is_refused(tmp_path: Path) -> None:
    whole = deep_png(DEEP)
    for at in (20, 60, 90, len(whole) // 2, len(whole) - 20):
        data = bytearray(whole)
        data[at] ^= 0x41
        (tmp_path / "x.png").write_bytes(data)
        with pytest.raises(InputError, match=r"a damaged image|not an image"):
            read_image(tmp_path / "x.png")


@pytest.mark.parametrize("full", [1, 7, 15, 100, 255, 256, 1023, 4095, 65535])
@pytest.mark.parametrize("channels", [1, 3])
def test_netpbm_is_scaled_by_the_value_of_its_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, channels: int, full: int
) -> None:
    path = tmp_path / "x.pnm"
    levels = np.random.default_rng(full).integers(0, full + 1, (5, 7, channels))
    levels[0, 0], levels[0, 1] = 0, full
    head = b"# made by hand\n7 5\n%d\n" % full
    data = levels.astype(">u2" if full > 255 else np.uint8).tobytes()
    path.write_bytes((b"P5 " if channels == 1 else b"P6 ") + head + data)
    expected = torch.tensor(levels / full).permute(2, 0, 1).float().expand(3, -1, -1)
    torch.testing.assert_close(read_image(path), expected, rtol=0, atol=1e-7)
    assert read_pixels(path).dtype == {
        1: torch.uint8, 7: torch.float32, 15: torch.uint8, 255: torch.uint8, 65535: torch.uint16
    }.get(full, torch.float32)  # fmt: skip
    monkeypatch.setattr(deep_pixels, "_STRIP_PIXELS", 15)
    torch.testing.assert_close(read_image(path), expected, rtol=0, atol=1e-7)
    numbers = " ".join(map(str, levels.flatten())).encode()
    path.write_bytes((b"P2 " if channels == 1 else b"P3 ") + head + numbers)
    if channels == 3 and full > 255:
        with pytest.raises(InputError, match="colours of more than 8 bits; save it as PNG"):
            read_image(path)
    else:
        step = 0.51 / (65535 if full > 255 else 255)
        torch.testing.assert_close(read_image(path), expected, rtol=0, atol=step)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"P5 2 2 15 \x01\x02\x10\x03", "a value is above 15"),
        (b"P5 2 2 300 \x01\x02\x10\x03", "ends too early"),
        (b"P6 2 2 255 \x01\x02\x10\x03", "ends too early"),
        (b"P5 2 2 70000 \x01\x02\x10\x03", "less than 65536"),
        (b"P2 9000 9000 255 1 2 3", "decimal numbers for over 16 million pixels"),
    ],
)
def test_wrong_netpbm_is_refused(tmp_path: Path, data: bytes, reason: str) -> None:
    (tmp_path / "x.pgm").write_bytes(data)
    with pytest.raises(InputError, match=reason):
        read_image(tmp_path / "x.pgm")


def test_grey_of_16_bits_is_the_same_in_every_format(tmp_path: Path) -> None:
    """The noise of a dark frame stays dark: case 04 of the reported ones."""
    dark = (300 + 30 * np.random.default_rng(0).standard_normal((96, 96))).astype(np.uint16)
    for suffix in ("png", "pgm", "tif"):
        path = saved(tmp_path / f"x.{suffix}", dark)
        assert np.array_equal(read_pixels(path)[0].numpy(), dark)
    with Image.open(tmp_path / "x.pgm") as picture:
        assert torch.equal(as_image(picture), read_image(tmp_path / "x.png"))


def test_stretching_maps_levels_to_0_and_1() -> None:
    image = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.6])[None, None].expand(2, 3, 4, 5)
    found = fixed_levels(image, PrepareConfig(black=0.2, white=0.4))
    assert torch.allclose(found[0, 0, 0], torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0]), atol=1e-6)
    assert found.shape == image.shape
    assert torch.equal(fixed_levels(image, PrepareConfig()), image)


def test_missing_special_and_oversized_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_image(tmp_path / "absent.png")
    with pytest.raises(InputError, match="not a regular file"):
        read_image(tmp_path)
    with pytest.raises(InputError, match="not a regular file"):
        read_image(Path("/dev/zero"))
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(InputError, match="not a regular file"):
        read_image(tmp_path / "pipe.png")
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(1 << 34)
    with pytest.raises(InputError, match="larger than 1 GiB"):
        read_image(tmp_path / "huge.png")
    with pytest.raises(InputError):
        read_image(tmp_path / ("x" * 5000))


def test_any_file_name_is_printed_on_one_line(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/new\nline \xff\x1b[31m.png"))
    path.write_bytes(b"")
    with pytest.raises(InputError, match=r"new\\nline \\udcff\\x1b\[31m\.png") as caught:
        read_image(path)
    str(caught.value).encode()


@pytest.mark.parametrize("form", ["PNG", "JPEG", "BMP", "PPM", "TIFF"])
def test_damaged_images_load_or_are_refused(tmp_path: Path, form: str) -> None:
    rng = random.Random(form)
    array = np.random.default_rng(1).integers(0, 256, (24, 32, 3)).astype(np.uint8)
    whole = encoded(form, array)
    path = tmp_path / "x"
    read, reasons = 0, []
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 1, 2, 8))):
            # at least half of the changes hit the header
            at = rng.randrange(len(data) if rng.random() < 0.5 else min(64, len(data)))
            data[at] = rng.randrange(256)
        path.write_bytes(data[: rng.choice((len(data), len(data), rng.randrange(len(data))))])
        try:
            image = read_image(path)
            assert image.shape[0] == 3
            assert image.isfinite().all()
            assert (image >= 0).all()
            assert (image <= 1).all()
            read += 1
        except InputError as error:
            reasons.append(str(error))
    assert read + len(reasons) == 150
    assert len(reasons) > 20
    assert not any("\n" in reason for reason in reasons)


def test_written_png_reads_back_identically(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    pixels = torch.from_numpy(RGB).permute(2, 0, 1)
    write_png(path, pixels)
    assert torch.equal(read_pixels(path), pixels)
    write_png(path, pixels / 255)
    assert torch.equal(read_pixels(path), pixels)
    write_png(path, torch.tensor([-1.0, 0.5, 2.0])[:, None, None])
    assert read_pixels(path).flatten().tolist() == [0, 128, 255]
    assert [file.name for file in tmp_path.iterdir()] == ["x.png"]


def test_pictures_are_marked_and_know_their_image(tmp_path: Path) -> None:
    pixels = torch.from_numpy(RGB).permute(2, 0, 1)
    write_png(tmp_path / "a.png", pixels)
    write_picture(tmp_path / "b.png", pixels)
    write_picture(tmp_path / "c.png", pixels, tmp_path / "a.png")
    assert torch.equal(read_pixels(tmp_path / "c.png"), pixels)
    assert [is_picture(tmp_path / f"{name}.png") for name in "abcd"] == [False, True, True, False]
    assert shows(tmp_path / "c.png", tmp_path / "sub" / ".." / "a.png")
    for picture, image in (("c", "b"), ("b", "a"), ("a", "a"), ("d", "a")):
        assert not shows(tmp_path / f"{picture}.png", tmp_path / f"{image}.png")
    assert str(tmp_path).encode() not in (tmp_path / "c.png").read_bytes()
    assert list_images(tmp_path) == [tmp_path / "a.png"]
    (tmp_path / "a.png").unlink()
    with pytest.raises(InputError, match="no images in this folder besides 2 that spairkit drew"):
        list_images(tmp_path)
    assert list_images(tmp_path / "b.png") == [tmp_path / "b.png"], "a file that is named is taken"


def test_skipped_files_are_named_in_one_line() -> None:
    reasons = [f"{name}.png: not an image" for name in "abcde"]
    assert skipped_files(reasons[:1], 13) == "skipped 1 of 13: a.png: not an image"
    assert skipped_files(reasons, 13).startswith("skipped 5 of 13: a.png: not an image; b.png: ")
    assert skipped_files(reasons, 13).endswith("c.png: not an image; and 2 more")


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "I;16", "I", "F"])
def test_large_images_are_converted_in_strips(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """In strips of two rows the pixels are those of the whole."""
    form = {"CMYK": "jpg", "I": "tif", "F": "tif"}.get(mode, "png")
    if mode in ("I;16", "I", "F"):
        dtype = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
        picture = Image.fromarray(np.arange(35).reshape(5, 7).astype(dtype) ** 2 * 3)
    else:
        picture = Image.fromarray(np.dstack([RGB, GREY])).convert("RGB" if mode == "P" else "RGBA")
        picture = picture.quantize(16) if mode == "P" else picture.convert(mode)
    assert picture.mode == mode
    path = tmp_path / f"x.{form}"
    options: dict[str, Any] = {"transparency": 3} if mode == "P" else {}
    picture.save(path, **options)
    whole = read_pixels(path)
    with Image.open(path) as opened:  # TIFF is not read by Pillow, but users may open one with it
        unread = as_image(opened)
    monkeypatch.setattr(images_module, "_STRIP_PIXELS", 15)
    assert torch.equal(read_pixels(path), whole)
    assert whole.shape[1:] == (5, 7)
    with Image.open(path) as opened:
        assert torch.equal(as_image(opened), unread)


def test_invalid_tensors_are_not_written(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    for wrong in (torch.zeros(1, 4, 4), torch.zeros(3, 4), torch.zeros(3, 0, 4)):
        with pytest.raises(ValueError, match=r"\[3, H, W\]"):
            write_png(path, wrong)
    with pytest.raises(ValueError, match="uint8 or floating point"):
        write_png(path, torch.zeros(3, 4, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="NaN"):
        write_png(path, torch.full((3, 4, 4), torch.nan))
    assert not path.exists()


def test_images_are_listed_by_suffix_in_order(tmp_path: Path) -> None:
    for name in (
        "b.PNG",
        "a.jpeg",
        "sub/c.tif",
        "notes.txt",
        ".hidden.png",
        ".git/d.png",
        "sub.png",
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop").symlink_to(tmp_path)
    found = [path.relative_to(tmp_path).as_posix() for path in list_images(tmp_path)]
    assert found == ["a.jpeg", "b.PNG", "sub.png", "sub/c.tif"]


def test_folder_without_images_is_reported(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no images"):
        list_images(tmp_path)
    with pytest.raises(InputError, match="No such file"):
        list_images(tmp_path / "absent")
    (tmp_path / "file").write_bytes(b"")
    assert list_images(tmp_path / "file") == [tmp_path / "file"]  # reading it tells why


def test_channels_of_grey_images_count_once() -> None:
    grey = torch.rand(1, 4, 5).expand(3, 4, 5)
    tinted = grey.clone()
    tinted[1, 3, 4] += 0.01
    images = torch.stack([grey, tinted, torch.zeros(3, 4, 5)])
    assert num_channels(images).tolist() == [1, 3, 1]


def test_commonest_colour_matches_a_count(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    levels = torch.randint(0, 3, (4, 3, 5, 6))
    pixels = [tuple(p) for p in levels.permute(0, 2, 3, 1).reshape(-1, 3).tolist()]
    expected = max(sorted(set(pixels)), key=pixels.count)
    for images in (levels / 255, levels.to(torch.uint8)):
        assert (commonest_colour(images) * 255).round().long().tolist() == list(expected)
        with monkeypatch.context() as patch:
            patch.setattr(images_module, "_STRIP_PIXELS", 30)  # as of a large image
            assert (commonest_colour(images) * 255).round().long().tolist() == list(expected)
