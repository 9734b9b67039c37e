"""The figures of a benchmark: written to a ledger as they are measured, printed at the end."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from spairkit.cli.console import print_json, results, say
from spairkit.errors import InputError

_TABLE_WIDTH = 160


@contextmanager
def recorded(
    about: dict[str, Any], show: Callable[[list[Any]], None], ledger: Path, *, as_json: bool
) -> Iterator[Callable[[Any], None]]:
    """Gives a function that appends a figure, a dataclass, to the ledger as a line of JSON.

    All figures are printed when the block ends, by `show` or as one JSON document. Those of an
    interrupted benchmark are marked as partial. `about` describes the machine and the options, and
    is part of every line. Raises InputError before the block runs if the ledger is not writable.
    """
    if ledger.is_file() and not _is_ledger(ledger):
        raise InputError(
            f"--ledger {ledger}: holds no figures of spairkit bench; name another file"
        )
    try:
        file = ledger.open("a", encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"{ledger}: cannot append to the ledger ({error.strerror}); choose another file with "
            "--ledger"
        ) from error
    figures: list[Any] = []

    def record(figure: Any) -> None:
        file.write(json.dumps(about | asdict(figure)) + "\n")
        file.flush()
        figures.append(figure)

    partial = {"partial": True}
    with file:
        try:
            yield record
            partial = {}
        finally:
            if figures and as_json:
                print_json(about | partial | {"figures": [asdict(figure) for figure in figures]})
            elif figures:
                line = ", ".join(f"{key} {value}" for key, value in (about | partial).items())
                results().print(line, soft_wrap=True)
                show(figures)
            if figures:
                say(f"added to {ledger}")


def _is_ledger(path: Path) -> bool:
    """Whether a file is empty, or begins as a line of JSON does."""
    with path.open("rb") as file:
        head = file.read(1)
    return head in (b"", b"{")


def print_table(columns: list[str], rows: list[list[str]], note: str) -> None:
    """Prints a table without lines, and a note below it."""
    from rich.table import Table

    table = Table(*columns, box=None)
    for row in rows:
        table.add_row(*row)
    console = results(_TABLE_WIDTH)
    console.print(table)
    console.print(note, soft_wrap=True)
