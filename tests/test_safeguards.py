"""`break_safeguards.py` can still break what it names."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parent


def safeguards() -> list[Any]:
    spec = importlib.util.spec_from_file_location("break_safeguards", TESTS / "break_safeguards.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return list(module.SAFEGUARDS)


@pytest.mark.parametrize("safeguard", safeguards(), ids=lambda safeguard: safeguard.name)
def test_text_to_break_is_there_once(safeguard: Any) -> None:
    assert (TESTS.parent / safeguard.file).read_text().count(safeguard.text) == 1
    assert safeguard.text != safeguard.broken
    assert all((TESTS / name).is_file() for name in safeguard.tests)
