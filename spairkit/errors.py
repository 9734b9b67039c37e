"""The exception for errors that the user can fix."""


class InputError(ValueError):
    """A file, option, config or checkpoint cannot be used.

    The message is one line: the name of the thing, the reason, and the remedy. The command line
    prints it and exits with status 2; other exceptions are internal errors (1).
    """


class ImageFileError(InputError):
    """An image file cannot be read: it is damaged, or not an image. The message begins with it."""


class DivergedError(InputError):
    """Training has diverged: its losses are no longer finite."""
