"""Finds the pages of an untrusted TIFF, by its chain of directories."""

import io
import struct
from dataclasses import dataclass
from typing import Any, BinaryIO

MOST_PAGES = 100_000
"""Pages of a file, at most."""

_MAX_TAG_BYTES = 1 << 25
_REDUCED, _MASK = 1, 4  # of NewSubfileType: not a page
_SUBFILE_TYPE, _WIDTH, _LENGTH = 254, 256, 257


@dataclass(frozen=True)
class Pages:
    """The pages of a TIFF."""

    offsets: tuple[int, ...]
    """Where the headers of the first page and of those of its size begin, in bytes."""
    others: bool
    """Whether there are pages of another size."""


def page_offsets(file: BinaryIO) -> Pages:
    """Finds the pages of a TIFF; thumbnails, masks and the levels of a pyramid do not count.

    Raises:
        ValueError, OSError, struct.error: the file is damaged, or has over 100,000 pages.
    """
    head = Head(file)
    file.seek(0)
    magic = file.read(4)
    order, big = "<" if magic[:1] == b"I" else ">", 43 in magic[2:4]
    count_format, entry_format, offset_format = (
        (f"{order}Q", f"{order}HHQ8s", f"{order}Q")
        if big
        else (f"{order}H", f"{order}HHI4s", f"{order}I")
    )
    end = file.seek(0, io.SEEK_END)
    file.seek(8 if big else 4)
    (offset,) = _unpacked_from(head, offset_format)
    offsets: list[int] = []
    seen: set[int] = set()
    first, others = None, False
    while 0 < offset < end:
        if offset in seen or len(seen) == MOST_PAGES:
            raise ValueError("its pages have no end, or are more than 100,000")
        seen.add(offset)
        file.seek(offset)
        try:
            (count,) = _unpacked_from(head, count_format)
            table = _read_all(head, count * struct.calcsize(entry_format))
            (following,) = _unpacked_from(head, offset_format)
        except (struct.error, EOFError):
            if not offsets:
                raise
            others = True  # it is there, but damaged
            break
        tags = {tag: value for tag, *value in struct.iter_unpack(entry_format, table)}
        kind = _number(tags.get(_SUBFILE_TYPE), order) or 0
        size = tuple(_number(tags.get(tag), order) for tag in (_LENGTH, _WIDTH))
        if first is None:
            first = size
            offsets.append(offset)
        elif not kind & (_REDUCED | _MASK):
            if size == first:
                offsets.append(offset)
            else:
                others = True
        offset = following
    return Pages(tuple(offsets), others)


def _unpacked_from(file: io.RawIOBase, form: str) -> tuple[int, ...]:
    return struct.unpack(form, _read_all(file, struct.calcsize(form)))


def _read_all(file: io.RawIOBase, size: int) -> bytes:
    if size > _MAX_TAG_BYTES:
        raise ValueError("more than 32 MiB of tags")
    data = file.read(size) or b""
    if len(data) != size:
        raise EOFError("the file ends too early")
    return data


def _number(entry: list[Any] | None, order: str) -> int | None:
    """The value of a tag of one number, as bytes, 16, 32 or 64 bits; None of others."""
    if entry is None:
        return None
    kind, count, value = entry
    form = {1: "B", 3: "H", 4: "I", 16: "Q"}.get(kind)
    if form is None or count != 1:
        return None
    number: int = struct.unpack_from(order + form, value.ljust(8, b"\0"))[0]
    return number


def several_pages(number: int) -> str:
    """`1 page` or `2 pages`."""
    return f"{number} page{'s' * (number != 1)}"


class Head(io.RawIOBase):
    """A view of a file of which only so many bytes can be read: those of tags."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._left = file, _MAX_TAG_BYTES

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: Any) -> int:
        self._left -= len(buffer)
        if self._left < 0:
            raise ValueError("more than 32 MiB of tags")
        data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)
