"""The exception for errors that the user can fix, and the message for lack of memory."""

import errno

from spairkit.names import printable


class InputError(ValueError):
    """A file, option, config or checkpoint cannot be used.

    The message is one line: the name of the thing, the reason, and the remedy. The command line
    prints it and exits with status 2; other exceptions are internal errors (1). Unprintable
    characters, as in names of files, are escaped.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(" ".join(str(message).split("\n"))))


class ImageFileError(InputError):
    """An image file cannot be read: it is damaged, or not an image. The message begins with it."""


class DivergedError(InputError):
    """Training has diverged: its losses are no longer finite."""


def lacks_memory(error: BaseException) -> bool:
    """Whether Python, NumPy, torch or the system says that there is not enough memory."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    # torch has no type of its own for the memory of CPUs
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
