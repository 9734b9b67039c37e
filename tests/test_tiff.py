"""TIFFs of every layout that tifffile writes: read equal to the array, or refused by name."""

import itertools
import logging
import struct
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import tifffile
import torch
from numpy.typing import NDArray

from spairkit import images as images_module
from spairkit import tiff as tiff_module
from spairkit.errors import ImageFileError
from spairkit.images import image_size, read_image, read_pixels, upright

Array = NDArray[Any]
HEIGHT, WIDTH = 19, 23  # no multiple of a tile or a strip

COMPRESSIONS = (None, "lzw", "adobe_deflate", "deflate", "packbits")
DTYPES = (
    "bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float16",
    "float32", "float64", "complex64",
)  # fmt: skip
UNASSOCIATED, ASSOCIATED, UNSPECIFIED = "unassalpha", "assocalpha", "unspecified"
COLOURS: tuple[tuple[str, int, tuple[str, ...]], ...] = (
    ("minisblack", 1, ()),
    ("miniswhite", 1, ()),
    ("rgb", 3, ()),
    ("rgb", 4, (UNSPECIFIED,)),
    ("rgb", 4, (UNASSOCIATED,)),
    ("rgb", 4, (ASSOCIATED,)),
    ("rgb", 5, (UNSPECIFIED,) * 2),
    ("minisblack", 2, (UNSPECIFIED,)),
    ("minisblack", 2, (UNASSOCIATED,)),
    ("miniswhite", 2, (UNASSOCIATED,)),
    ("minisblack", 3, (UNSPECIFIED,) * 2),
    ("minisblack", 5, (UNSPECIFIED,) * 4),
    ("separated", 4, ()),
    ("palette", 1, ()),
    ("ycbcr", 3, ()),
    ("cielab", 3, ()),
)


ORDERS: tuple[Literal["<", ">"], ...] = ("<", ">")


@dataclass(frozen=True)
class Layout:
    """How an array [H, W, S] is stored."""

    dtype: str
    photometric: str = "minisblack"
    samples: int = 1
    extra: tuple[str, ...] = ()
    separate: bool = False
    compression: str | None = None
    order: Literal["<", ">"] = "<"
    tiled: bool = False
    predictor: bool = False
    bits: int = 0  # packed; 0: those of the type
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def full(self) -> int:
        """The value of white; 0 if the type has none."""
        if self.bits:
            return int((1 << self.bits) - 1)
        return {"bool": 1, "uint8": 255, "uint16": 65535}.get(self.dtype, 0)

    def array(self) -> Array:  # [H, W, S]
        rng = np.random.default_rng(list(repr(self).encode()))
        shape = HEIGHT, WIDTH, self.samples
        dtype = np.dtype(self.dtype)
        if dtype.kind in "fc":
            return (rng.normal(size=shape) * 50).astype(dtype)
        if dtype.kind == "b":
            return rng.random(shape) > 0.5
        least, most = (0, self.full) if self.bits else (np.iinfo(dtype).min, np.iinfo(dtype).max)
        values = rng.integers(least, most, shape, dtype, endpoint=True)
        values[3:9] = values[3, 0]  # runs, and strings that repeat
        return values

    def write(self, path: Path, array: Array) -> None:
        options: dict[str, Any] = {"photometric": self.photometric, **self.options}
        if self.samples > 1:
            options["planarconfig"] = "separate" if self.separate else "contig"
        if self.extra:
            options["extrasamples"] = self.extra
        if self.bits:
            options["bitspersample"] = self.bits
        if self.tiled:
            options["tile"] = (16, 16)
        else:
            options["rowsperstrip"] = 5
        if self.photometric == "palette":
            options["colormap"] = COLORMAP
        stored = array.transpose(2, 0, 1) if self.separate else array
        stored = stored.squeeze(axis=0 if self.separate else 2) if self.samples == 1 else stored
        tifffile.imwrite(
            path, stored, byteorder=self.order, compression=self.compression,
            predictor=self.predictor, metadata=None, **options,
        )  # fmt: skip

    def refusal(self) -> str:
        """A word of the message that refuses this layout; empty for one that is read."""
        colours = {"minisblack": 1, "miniswhite": 1, "rgb": 3, "palette": 1, "separated": 4}
        if self.dtype.startswith("complex"):
            return "complex float samples"
        if self.photometric not in colours:
            return f"interpretation {self.photometric}"
        others = self.samples - colours[self.photometric]
        if others > 1 or (others == 1 and self.samples == 2 and self.extra == (UNSPECIFIED,)):
            return f"of {self.samples} channels"
        special = self.photometric in ("palette", "separated") or self.extra == (UNASSOCIATED,)
        if special and not self.full:
            return "with transparency"
        if self.photometric == "palette" and self.full != 255:
            return "a palette of 16 bits"
        if self.samples > 1 and self.dtype == "bool":
            return "1-bit colours"
        return ""

    def expected(self, array: Array) -> Array:  # [H, W, S] -> [H, W, 1 or 3] in [0, 1]
        colours = 3 if self.photometric == "rgb" else 1
        if self.photometric == "palette":
            return (COLORMAP[:, array[..., 0]].transpose(1, 2, 0) >> 8) / 255
        values = array.astype(np.float64)
        if not self.full:
            values = values[..., :colours]
            values = (values / 2 - values.min() / 2) / (values.max() / 2 - values.min() / 2)
        else:
            values /= self.full
        if self.photometric == "separated":
            return (1 - values[..., :3]) * (1 - values[..., 3:])
        if self.photometric == "miniswhite":
            values[..., :1] = 1 - values[..., :1]
        if self.extra == (UNASSOCIATED,):
            values = values * values[..., -1:]
        return values[..., :colours]


COLORMAP = np.random.default_rng(5).integers(0, 65536, (3, 256)).astype(np.uint16)


def layouts() -> Iterator[Layout]:
    """Every combination that tifffile can write."""
    for dtype, (photometric, samples, extra) in itertools.product(DTYPES, COLOURS):
        for separate, compression, order, tiled, predictor in itertools.product(
            (False, True), COMPRESSIONS, ORDERS, (False, True), (False, True)
        ):
            if separate and samples == 1:
                continue
            if predictor and (compression in (None, "packbits") or dtype in ("bool", "complex64")):
                continue
            if dtype == "bool" and samples > 1 and compression is not None:
                continue
            if photometric == "palette" and dtype not in ("uint8", "uint16"):
                continue
            if photometric == "palette" and dtype == "uint16":
                continue  # needs a colour map of its own
            yield Layout(
                dtype, photometric, samples, extra, separate, compression, order, tiled, predictor
            )
    for bits, compression, order, tiled in itertools.product(
        (2, 3, 4, 5, 7, 10, 12, 14), (None, "lzw", "adobe_deflate"), ORDERS, (False, True)
    ):
        dtype = "uint8" if bits < 8 else "uint16"
        if order == ">" and bits > 8:
            continue  # tifffile writes them wrong, and reads them back wrong too
        yield Layout(dtype, "minisblack", 1, (), False, compression, order, tiled, False, bits)
        yield Layout(dtype, "miniswhite", 1, (), False, compression, order, tiled, False, bits)


def check(layout: Layout, path: Path) -> str:
    """Writes, reads and compares one; "read", "refused" or, if tifffile cannot, "not written"."""
    array = layout.array()
    try:
        layout.write(path, array)
    except (ValueError, NotImplementedError, TypeError, KeyError, struct.error):
        return "not written"
    refusal = layout.refusal()
    try:
        image = read_image(path)
    except ImageFileError as error:
        message = str(error)
        assert refusal, f"{layout}: {message}"
        assert refusal in message, f"{layout}: {message}"
        assert "a TIFF of" in message
        assert "a damaged image" not in message
        return "refused"
    assert not refusal, f"{layout} was read"
    expected = np.broadcast_to(layout.expected(array), (HEIGHT, WIDTH, 3)).transpose(2, 0, 1)
    # colours of several samples are rounded to a step of the type
    step = 0.51 / layout.full if layout.full and layout.samples in (2, 4) else 1e-6
    difference = np.abs(image.double().numpy() - expected).max()
    assert difference <= step, f"{layout}: {difference}"
    return "read"


LAYOUTS = list(layouts())


def compare(chosen: list[Layout], folder: Path) -> dict[str, int]:
    outcomes = [check(layout, folder / "x.tif") for layout in chosen]
    return {outcome: outcomes.count(outcome) for outcome in set(outcomes)}


def test_some_layouts_are_read_right_or_refused(tmp_path: Path) -> None:
    outcomes = compare(LAYOUTS[::29], tmp_path)
    assert outcomes["read"] > 60, outcomes
    assert outcomes["refused"] > 20, outcomes


@pytest.mark.long
def test_every_layout_is_read_right_or_refused(tmp_path: Path) -> None:
    outcomes = compare(LAYOUTS, tmp_path)
    print(outcomes)
    assert outcomes["read"] > 1500, outcomes
    assert outcomes["refused"] > 800, outcomes


def test_spots_are_found_in_either_byte_order(tmp_path: Path) -> None:
    """Signed and floating-point pixels, compressed: case 01 of the reported ones."""
    y, x = np.mgrid[:60, :72]
    spots = sum(np.exp(-((y - a) ** 2 + (x - b) ** 2) / 18) for a, b in ((15, 15), (15, 50)))
    path = tmp_path / "x.tif"
    for array in (spots * 20000, spots * 2e9, spots * 4000):
        whole = array.astype({20000: "i2", 2e9: "i4"}.get(array.max().round(), "f4"))
        for order, compression in itertools.product(ORDERS, COMPRESSIONS):
            tifffile.imwrite(path, whole, byteorder=order, compression=compression)
            found = read_pixels(path)[0].double().numpy()
            assert np.abs(found - spots / spots.max()).max() < 1e-4


def test_separate_planes_of_16_bits_are_read(tmp_path: Path) -> None:
    levels = np.arange(60 * 72 * 3).reshape(3, 60, 72).astype(np.uint16) * 5
    for compression in COMPRESSIONS:
        tifffile.imwrite(
            tmp_path / "x.tif", levels, photometric="rgb", planarconfig="separate",
            compression=compression,
        )  # fmt: skip
        found = read_pixels(tmp_path / "x.tif")
        assert found.dtype == torch.uint16
        assert np.array_equal(found.numpy(), levels)


def test_signed_bytes_are_stretched(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "x.tif", np.array([[-128, -1], [0, 127]], np.int8))
    expected = torch.tensor([[0, 127 / 255], [128 / 255, 1]])
    torch.testing.assert_close(read_pixels(tmp_path / "x.tif")[0], expected)


@pytest.mark.parametrize("compression", ["zstd", "lzma", "jpeg", "webp", "png", "jpeg2000"])
def test_other_compressions_are_refused_by_name(tmp_path: Path, compression: str) -> None:
    path = tmp_path / "x.tif"
    tifffile.imwrite(path, np.zeros((32, 32, 3), np.uint8), compression=compression)
    with pytest.raises(ImageFileError, match=f"a TIFF compressed by {compression}; save it"):
        image_size(path)


def tags_of(path: Path) -> dict[int, int]:
    """The place of each tag of the first page."""
    with tifffile.TiffFile(path) as tiff:
        return {tag.code: tag.offset for tag in tiff.pages.first.tags}


def patch(path: Path, place: int, data: bytes) -> None:
    whole = bytearray(path.read_bytes())
    whole[place : place + len(data)] = data
    path.write_bytes(whole)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    levels = np.arange(35, dtype=np.uint16).reshape(5, 7)
    path = tmp_path / "x.tif"
    tifffile.imwrite(path, levels, extratags=[(274, 3, 1, orientation, True)])
    found = read_pixels(path)
    assert torch.equal(found, upright(torch.from_numpy(levels[None].copy()), orientation))
    assert image_size(path) == tuple(found.shape[1:]) == ((7, 5) if orientation > 4 else (5, 7))


def test_file_without_an_interpretation_is_grey_or_rgb(tmp_path: Path) -> None:
    path = tmp_path / "x.tif"
    for shape, photometric in (((5, 7), "miniswhite"), ((5, 7, 3), "rgb")):
        levels = np.arange(np.prod(shape)).reshape(shape).astype(np.uint8)
        tifffile.imwrite(path, levels, photometric=photometric)
        patch(path, tags_of(path)[262], struct.pack("<H", 65000))  # a private tag
        expected = np.broadcast_to(levels.reshape(5, 7, -1), (5, 7, 3)).transpose(2, 0, 1) / 255
        torch.testing.assert_close(read_image(path), torch.tensor(expected).float())


def test_reversed_bits_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.tif"
    levels = np.arange(35, dtype=np.uint8).reshape(5, 7) * 7
    backwards = np.packbits(np.unpackbits(levels[..., None], axis=-1)[..., ::-1], axis=-1)[..., 0]
    tifffile.imwrite(path, backwards, extratags=[(65000, 3, 1, 2, True)])
    patch(path, tags_of(path)[65000], struct.pack("<H", 266))
    assert np.array_equal(read_pixels(path)[0].numpy(), levels)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("compression", [None, "lzw", "adobe_deflate"])
@pytest.mark.parametrize("tiled", [False, True])
def test_large_images_are_read_in_bands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, compression: str, tiled: bool
) -> None:
    """In bands of two rows the pixels are those of the whole, in BigTIFF and one strip too."""
    path = tmp_path / "x.tif"
    colours: list[Layout] = [
        Layout(dtype, photometric, samples, extra, compression=compression, tiled=tiled,
               predictor=compression is not None, options={"bigtiff": True})
        for photometric, samples, extra in COLOURS[:8]
    ]  # fmt: skip
    for layout in colours:
        if layout.refusal():
            continue
        array = layout.array()
        layout.write(path, array)
        whole = read_pixels(path)
        monkeypatch.setattr(tiff_module, "_STRIP_PIXELS", 2 * WIDTH)
        assert torch.equal(read_pixels(path), whole)
        monkeypatch.undo()


@pytest.fixture
def _nothing_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images_module, "_told_of_pages", [])


STACK = np.arange(5 * 35, dtype=np.uint16).reshape(5, 5, 7)


@pytest.mark.usefixtures("_nothing_told")
def test_warning_names_three_files(tmp_path: Path) -> None:
    for n in range(5):
        with tifffile.TiffWriter(tmp_path / f"{n}.tif") as writer:
            writer.write(STACK[0], photometric="minisblack")
            writer.write(STACK[1, ::2], photometric="minisblack")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for n in range(5):
            read_pixels(tmp_path / f"{n}.tif")
    names = [Path(str(warning.message).split(": ")[0]).name for warning in told]
    assert names == ["0.tif", "1.tif", "2.tif"]
    assert str(told[-1].message).endswith("further such files are not named")


def test_thumbnails_and_pyramids_are_no_pages(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "x.tif") as writer:
        writer.write(STACK[0], photometric="minisblack")
        for factor in (2, 4):
            writer.write(STACK[0, ::factor, ::factor], photometric="minisblack", subfiletype=1)
    assert np.array_equal(read_pixels(tmp_path / "x.tif")[0].numpy(), STACK[0])


@pytest.mark.usefixtures("_nothing_told")
def test_damaged_second_page_does_not_hide_the_first(tmp_path: Path) -> None:
    path = tmp_path / "x.tif"
    tifffile.imwrite(path, STACK[:2], photometric="minisblack")
    with tifffile.TiffFile(path) as tiff:
        second = tiff.pages[1]
        assert isinstance(second, (tifffile.TiffPage, tifffile.TiffFrame))
    patch(path, second.offset, b"\xff\xff")
    with pytest.warns(UserWarning, match="holds further images"):
        assert np.array_equal(read_pixels(path)[0].numpy(), STACK[0])


def refused(path: Path) -> str:
    with pytest.raises(ImageFileError) as caught:
        read_pixels(path)
    assert str(caught.value).isprintable()
    return str(caught.value)


def test_files_that_promise_too_much_are_refused_before_any_memory_is_taken(
    tmp_path: Path,
) -> None:
    path = tmp_path / "x.tif"
    for compression in COMPRESSIONS:
        tifffile.imwrite(path, np.zeros((8, 8), np.uint8), compression=compression)
        tags = tags_of(path)
        for tag in (257, 278):  # length, and rows per strip
            patch(path, tags[tag] + 8, struct.pack("<I", 20_000_000))
        assert "too short" in refused(path)
        patch(path, tags[257] + 8, struct.pack("<I", 1 << 31))
        assert "more than 178 million" in refused(path)
    tifffile.imwrite(path, np.zeros((8, 8, 3), np.float32), photometric="rgb")
    for tag, value in ((256, 8192), (257, 20_000)):
        patch(path, tags_of(path)[tag] + 8, struct.pack("<I", value))
    assert "are more than 1 GB" in refused(path)


def test_deflate_does_not_unpack_more_than_the_tags_promise(tmp_path: Path) -> None:
    path = tmp_path / "x.tif"
    bomb = zlib.compress(bytes(50_000_000), 9)
    tifffile.imwrite(path, np.zeros((8, 8), np.uint8), compression="adobe_deflate")
    tags = tags_of(path)
    end = path.stat().st_size
    path.write_bytes(path.read_bytes() + bomb)
    patch(path, tags[273] + 8, struct.pack("<I", end))
    patch(path, tags[279] + 8, struct.pack("<I", len(bomb)))
    assert read_pixels(path).sum() == 0  # the rest of the block is never unpacked


def test_more_tags_than_memory_are_refused(tmp_path: Path) -> None:
    """A sparse file of offsets, which would take gigabytes as Python's integers."""
    path = tmp_path / "x.tif"
    tifffile.imwrite(path, np.zeros((8, 8), np.uint8))
    place = tags_of(path)[273]
    patch(path, place, struct.pack("<HHII", 273, 4, 200_000_000, 16))
    with path.open("r+b") as file:
        file.truncate(900_000_000)
    assert "more than 32 MiB of tags" in refused(path)


def test_lzw_without_numba_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.tif"
    tifffile.imwrite(path, np.zeros((8, 8), np.uint8), compression="lzw")
    monkeypatch.setattr(tiff_module, "runs_compiled", lambda tensor: False)
    assert refused(path).endswith("LZW needs Numba, which does not work here; save it as PNG")


def test_damaged_blocks_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.tif"
    array = Layout("uint8").array()[..., 0]
    for compression in COMPRESSIONS[1:]:
        tifffile.imwrite(path, array, compression=compression)
        whole = path.read_bytes()
        with tifffile.TiffFile(path) as tiff:
            start = tiff.pages.first.dataoffsets[0]
        path.write_bytes(whole[: start + 20] + bytes([255]) * (len(whole) - start - 20))
        assert "damaged" in refused(path)
        patch(path, tags_of(path)[273] + 8, bytes(4))
        assert "a block is missing" in refused(path)
    # the bits of codes were in the other order
    tifffile.imwrite(path, array, compression="lzw")
    with tifffile.TiffFile(path) as tiff:
        start = tiff.pages.first.dataoffsets[0]
    patch(path, start, b"\0\1")
    assert "LZW as before 1991" in refused(path)


@pytest.mark.filterwarnings("ignore:.*holds further images:UserWarning")
def test_damaged_tiffs_are_read_or_refused_without_a_line_on_stderr(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    check_mutations(tmp_path, 400)
    assert capfd.readouterr() == ("", "")


@pytest.mark.long
def test_many_damaged_tiffs_are_read_or_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    check_mutations(tmp_path, 10_000)
    assert capfd.readouterr() == ("", "")


def check_mutations(folder: Path, number: int) -> None:
    rng = np.random.default_rng(0)
    path = folder / "x.tif"
    readable = [layout for layout in LAYOUTS[::53] if check(layout, path) == "read"]
    logging.getLogger("tifffile").propagate = False  # else pytest keeps every line
    outcomes = [0, 0]
    for n in range(number):
        if n % 20 == 0:
            layout = readable[n // 20 % len(readable)]
            layout.write(path, layout.array())
            whole = path.read_bytes()
        data = np.frombuffer(whole, np.uint8).copy()
        reach = len(data) if rng.random() < 0.3 else 400  # most changes hit the tags
        places = rng.integers(0, min(reach, len(data)), rng.choice([1, 1, 2, 8]))
        data[places] = rng.integers(0, 256, len(places))
        path.write_bytes(data[: rng.integers(len(data)) if rng.random() < 0.2 else None].tobytes())
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*holds (several pages|further images)")
            reason = damage_of(path)
        assert reason.isprintable()
        outcomes[reason == ""] += 1
    assert min(outcomes) > number / 10, outcomes


def damage_of(path: Path) -> str:
    """Why an image is refused; if it is read, its pixels must be sound."""
    try:
        image = read_image(path)
    except ImageFileError as error:
        return str(error)
    assert image.isfinite().all()
    assert 0 <= image.min() <= image.max() <= 1
    return ""
