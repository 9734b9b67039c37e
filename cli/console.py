"""What goes to the person: messages and progress on stderr, results on stdout."""

import json
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


_TABLE_WIDTH = 80  # that of the figures by number of objects


def say(message: str) -> None:
    """One line on stderr; what is not printable in it (a file's name, say) is escaped."""
    line = " ".join(message.split("\n"))
    typer.echo("".join(c if c.isprintable() else ascii(c)[1:-1] for c in line), err=True)


def several(number: int, word: str) -> str:
    """1 run, 2 runs."""
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def as_json(value: Any) -> str:
    """A JSON document for people to read too."""
    return json.dumps(value, indent=2, allow_nan=False)


def print_json(value: Any) -> None:
    """A JSON document on stdout."""
    typer.echo(as_json(value))


def results(least_width: int = _TABLE_WIDTH) -> "Console":
    """Where tables go: stdout, never so narrow that rich would cut figures off."""
    from rich.console import Console

    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else 100
    width = max(columns, least_width)
    return Console(file=sys.stdout, width=width, highlight=False, markup=False)


def progress_bar(*, quiet: bool = False, auto_refresh: bool = True) -> "Progress":
    """A bar on stderr, to be used as a context; none without a terminal that can redraw a line.

    Its note stands on lines of its own, so that it takes no room from the bar. Without
    `auto_refresh` it is redrawn when it is told to, and no thread does so while something is timed.
    """
    from rich.console import Console, RenderableType
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Noted(Progress):
        def get_renderables(self) -> Iterable[RenderableType]:
            yield self.make_tasks_table(self.tasks)
            yield from (Text(task.fields["note"]) for task in self.tasks if task.fields["note"])

    console = Console(file=sys.stderr, highlight=False, markup=False)
    return Noted(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        auto_refresh=auto_refresh,
        transient=True,
        disable=quiet or not sys.stderr.isatty() or console.is_dumb_terminal,
    )


@contextmanager
def counted(description: str, total: int | None, *, quiet: bool) -> Iterator[Any]:
    """A bar and a function that sets how many are done."""
    with progress_bar(quiet=quiet) as bar:
        task = bar.add_task(description, total=total, note="")
        yield lambda done: bar.update(task, completed=done)
