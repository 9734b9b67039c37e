"""Names of files in text that people read: they may hold any character, and any byte."""


def printable(text: object) -> str:
    """A name, or a message of one line, with unprintable characters escaped.

    Among these are line feeds, the sequences that command a terminal, marks that turn the direction
    of writing, and bytes that are not UTF-8.
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def printable_lines(text: str) -> str:
    """`printable` of each line."""
    return "\n".join(map(printable, text.split("\n")))


def in_utf8(name: str) -> str:
    """A name with the bytes escaped that are not UTF-8, for files of text."""
    return name.encode(errors="backslashreplace").decode()


def is_utf8(name: str) -> bool:
    """Whether a name can be written into a file of text as it is."""
    return in_utf8(name) == name
