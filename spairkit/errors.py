"""The one exception that means: the person at the keyboard can fix this."""


class InputError(ValueError):
    """A file, option, config or checkpoint that cannot be used as it is.

    Its message is one line, names the thing, says what is wrong with it and what to do. The
    command line prints it and ends with exit status 2; everything else is a bug of ours (1).
    """


class DivergedError(InputError):
    """Training whose losses are not finite any more: other settings may do better."""
