"""The figures of a benchmark: shown at its end, however it ends, and added to the ledger."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from spairkit.cli.console import print_json, say


@contextmanager
def recorded(
    about: dict[str, Any],
    print_tables: Callable[[dict[str, Any], list[Any]], None],
    ledger: Path,
    *,
    json: bool,
) -> Iterator[list[Any]]:
    """A list for the figures, which are dataclasses; shown and written down when the block ends.

    Those of a benchmark that is broken off (Ctrl-C, no memory) too: they are marked as partial.

    Args:
        about: what they depend on; read when the block ends.
        print_tables: shows that and the figures to a person.
        ledger: the file that gets one more line.
        json: shows them as a JSON document in place of tables.

    Raises:
        InputError: the ledger cannot be written, which shows before the block begins.
    """
    from spairkit.benchmarks.timing import append_to_ledger, check_ledger

    check_ledger(ledger)
    figures: list[Any] = []
    partial = {"partial": True}
    try:
        yield figures
        partial = {}
    finally:
        if figures:
            shown = about | partial
            append_to_ledger(ledger, shown, figures)  # first: to print may fail, into a closed pipe
            if json:
                print_json(shown | {"figures": [asdict(figure) for figure in figures]})
            else:
                print_tables(shown, figures)
            say(f"added to {ledger}")
