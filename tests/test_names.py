"""Names of files in messages: what is not printable is escaped."""

import pytest

from spairkit.errors import DivergedError, InputError
from spairkit.names import printable, printable_lines


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("über <b> 核.png", "über <b> 核.png"),
        ("\x1b[2Jgone", "\\x1b[2Jgone"),
        ("\x9b31mred", "\\x9b31mred"),
        ("two\nlines\r\t", "two\\nlines\\r\\t"),
        ("n\udcfcclei", "n\\udcfcclei"),
        ("gnp.\u202etxt", "gnp.\\u202etxt"),
    ],
)
def test_only_printable_characters_are_shown(name: str, shown: str) -> None:
    assert printable(name) == shown
    assert printable(shown) == shown


def test_lines_stay_lines() -> None:
    assert printable_lines("a\x07\nb\n") == "a\\x07\nb\n"


def test_errors_are_one_printable_line() -> None:
    assert str(InputError("evil\n\x1b[31mname\udcff.png: é")) == "evil \\x1b[31mname\\udcff.png: é"
    assert str(DivergedError("a\x07")) == "a\\x07"
