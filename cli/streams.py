"""Standard streams that may be closed, full or gone: what cannot be shown is dropped, and the work
goes on.
"""

import io
import os
import select
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO


class Closed(io.TextIOWrapper):
    """In place of a stream that was closed before the start; drops everything."""


class _Descriptor(io.RawIOBase):
    """A file descriptor. After a write that failed, everything is dropped."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.error: OSError | None = None

    def fileno(self) -> int:
        return self.number

    def isatty(self) -> bool:
        return os.isatty(self.number)

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        while self.error is None:
            try:
                return os.write(self.number, data)
            except BlockingIOError:
                select.select([], [self.number], [])
            except OSError as error:
                self.error = error
        return memoryview(data).nbytes


@contextmanager
def guarded() -> Iterator[Callable[[], OSError | None]]:
    """Guards stdin, stdout and stderr; yields a function that gives the error of stdout, if any.

    File names may hold any bytes: those that the encoding lacks are escaped.
    """
    before = sys.stdin, sys.stdout, sys.stderr
    if sys.stdin is None:
        _occupy()
        sys.stdin = io.StringIO()
    output, stdout = _guarded(sys.stdout)
    _, stderr = _guarded(sys.stderr)
    sys.stdout, sys.stderr = stdout, stderr

    def error() -> OSError | None:
        stdout.flush()
        stderr.flush()
        return output.error if output else None

    try:
        yield error
    finally:
        error()
        sys.stdin, sys.stdout, sys.stderr = before


def _guarded(stream: TextIO | None) -> tuple[_Descriptor | None, TextIO]:
    if stream is None:
        _occupy()
        return None, Closed(io.BufferedWriter(_Descriptor(-1)))
    try:
        number = stream.fileno()
    except OSError:  # not a file, as in tests
        return None, stream
    stream.flush()
    descriptor = _Descriptor(number)
    guarded = io.TextIOWrapper(
        io.BufferedWriter(descriptor),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.isatty() or stream is sys.stderr,
    )
    return descriptor, guarded


def _occupy() -> None:
    """Opens the null device as the first free descriptor, or another file would be opened there."""
    descriptor = os.open(os.devnull, os.O_RDWR)
    if descriptor > 2:
        os.close(descriptor)  # another file is there already
