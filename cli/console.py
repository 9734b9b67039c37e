"""Messages and progress on stderr, results on stdout."""

import csv
import io
import json
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from spairkit.names import printable, printable_lines

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


LINE_EVERY_SECONDS = 10.0
"""Time between two lines of progress where there is no bar, as in a log file."""

_TABLE_WIDTH = 80  # of the figures by number of objects
_LONG_SECONDS = 2.0  # of a search, after which its own progress is shown


def say(message: str) -> None:
    """One line on stderr; unprintable characters, as in file names, are escaped."""
    typer.echo(printable(" ".join(message.split("\n"))), err=True)


def echo(text: object) -> None:
    """Lines for people on stdout; unprintable characters, as in file names, are escaped."""
    typer.echo(printable_lines(str(text)))


def print_document(text: str) -> None:
    """A document for programs on stdout; on a terminal unprintable characters are escaped."""
    typer.echo(printable_lines(text) if sys.stdout.isatty() else text, nl=False)


def several(number: int, word: str) -> str:
    """1 run, 2 runs."""
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def csv_line(values: Iterable[object]) -> str:
    """A line of CSV."""
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(values)
    return line.getvalue()


def json_text(value: Any) -> str:
    """An indented JSON document."""
    return json.dumps(value, indent=2, allow_nan=False)


def print_json(value: Any) -> None:
    """A JSON document on stdout."""
    print_document(f"{json_text(value)}\n")


def results(least_width: int = _TABLE_WIDTH) -> "Console":
    """A console on stdout for tables, wide enough that rich cuts no figure off.

    It writes no styles, and escapes the unprintable characters of strings.
    """
    from rich.console import Console

    class Plain(Console):
        def print(self, *objects: Any, **options: Any) -> None:
            shown = (printable_lines(item) if isinstance(item, str) else item for item in objects)
            super().print(*shown, **options)

    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else 100
    width = max(columns, least_width)
    return Plain(file=sys.stdout, width=width, color_system=None, highlight=False, markup=False)


def table_of(columns: Iterable[str], first: str | None = None) -> "Table":
    """An empty table with right-aligned columns; `first` is a left-aligned one before them."""
    from rich import box
    from rich.table import Table

    table = Table(*([] if first is None else [first]), box=box.SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        table.add_column(name, justify="right")
    return table


def progress_bar(*, quiet: bool = False) -> Any:
    """A rich progress bar on stderr, as a context; hidden where the terminal cannot redraw a line.

    Its note takes lines of its own below the bar; its method `say` prints a line above it.
    """
    from rich.console import Console, RenderableType
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Noted(Progress):
        def say(self, text: str) -> None:
            if not quiet:
                self.console.print(printable(text), soft_wrap=True)

        def get_renderables(self) -> Iterable[RenderableType]:
            yield self.make_tasks_table(self.tasks)
            yield from (Text(task.fields["note"]) for task in self.tasks if task.fields["note"])

    console = Console(file=sys.stderr, highlight=False, markup=False)
    return Noted(
        SpinnerColumn("line"),  # moves while nothing else does
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=quiet or not sys.stderr.isatty() or console.is_dumb_terminal,
    )


class Counter:
    """A progress bar of things done, and below it one of a search that takes long.

    Where no bar can be drawn, a line is printed every ten seconds.
    """

    def __init__(self, bar: Any, description: str, total: int | None) -> None:
        self.bar, self.began = bar, time.monotonic()
        self.task = bar.add_task(description, total=total, note="")
        self.part = bar.add_task("", total=100, visible=False, note="")
        self._line_at = self.began

    def __call__(self, done: int, description: str | None = None) -> None:
        """Shows that so many are done, and what is done now if that has changed."""
        self.began = time.monotonic()
        self.bar.update(self.task, completed=done, description=description)
        self.bar.update(self.part, visible=False)
        self._line()

    def search(self, phase: str, share: float) -> None:
        """Shows the share of a phase that is done, if the search began a while ago."""
        slow = time.monotonic() - self.began > _LONG_SECONDS
        percent = round(100 * share)
        self.bar.update(self.part, description=phase, completed=percent, visible=slow)
        self._line(f", {phase} {percent} %" if slow else "")

    def _line(self, search: str = "") -> None:
        now = time.monotonic()
        if self.bar.disable and now - self._line_at >= LINE_EVERY_SECONDS:
            self._line_at = now
            task = next(task for task in self.bar.tasks if task.id == self.task)
            total = "" if task.total is None else f" of {task.total:.0f}"
            self.bar.say(f"{task.description}: {task.completed:.0f}{total}{search}")


@contextmanager
def counted(description: str, total: int | None, *, quiet: bool) -> Iterator[Counter]:
    """A progress bar, or lines of progress, as a `Counter`."""
    with progress_bar(quiet=quiet) as bar:
        yield Counter(bar, description, total)
