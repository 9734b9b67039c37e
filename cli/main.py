"""The `spairkit` command: its subcommands, and the place where every error becomes one line.

Exit status: 0; 2 for a user error; 1 for an internal error; 3 for a failed training; 129, 130 and
143 when stopped by SIGHUP, Ctrl-C and SIGTERM.
"""

import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from difflib import get_close_matches
from types import FrameType
from typing import Annotated, NoReturn, TextIO

import typer

from spairkit import __version__
from spairkit.cli import bench, config, data
from spairkit.cli.app import app_page
from spairkit.cli.compare import compare
from spairkit.cli.console import echo, say
from spairkit.cli.count import count_objects
from spairkit.cli.detect import detect
from spairkit.cli.doctor import doctor
from spairkit.cli.evaluate import evaluate
from spairkit.cli.experiment import experiment
from spairkit.cli.export import export
from spairkit.cli.report import report
from spairkit.cli.streams import guarded
from spairkit.cli.sweep import sweep
from spairkit.cli.track import track
from spairkit.cli.train import train
from spairkit.cli.viz import viz
from spairkit.errors import InputError, lacks_memory

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(train)
app.command("eval")(evaluate)
app.command()(viz)
app.command()(detect)
app.command("count")(count_objects)
app.command("app")(app_page)
app.command()(track)
app.command()(compare)
app.command()(experiment)
app.command()(report)
app.command()(sweep)
app.command()(export)
app.add_typer(data.app, name="data")
app.add_typer(config.app, name="config")
app.command()(doctor)
app.add_typer(bench.app, name="bench")


# raised by Typer for wrong words on the command line; it has no public name
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


# names that people try, and the commands that they mean
_SYNONYMS = {
    **dict.fromkeys(("predict", "infer", "find", "segment", "run"), "detect"),
    **dict.fromkeys(("evaluate", "test", "validate"), "eval"),
    **dict.fromkeys(("visualize", "visualise", "show", "plot", "draw"), "viz"),
    **dict.fromkeys(("fit", "learn"), "train"),
    **dict.fromkeys(("benchmark", "time"), "bench"),
    "version": "--version",
}


class _Stopped(SystemExit):
    """Stopped by a signal. Typer lets SystemExit pass."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number


def _print_version(wanted: bool) -> None:
    if wanted:
        echo(f"spairkit {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Find, box and count many small things in images, without labels.

    Start with `spairkit viz IMAGE` or `spairkit train --data FOLDER`.

    Exit status: 0: success; 1: internal error; 2: user error (one-line message); 3: a failed
    training; 129, 130 and 143: stopped by SIGHUP, Ctrl-C and SIGTERM.
    """


def main(arguments: list[str] | None = None) -> NoReturn:
    """Runs the command and ends the process with its exit status."""
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    before = {number: signal.getsignal(number) for number in numbers}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _stop)
    try:
        with guarded() as output_error, warnings.catch_warnings():
            warnings.showwarning = _show_warning
            sys.exit(_run(arguments, output_error))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run(arguments: list[str] | None, output_error: Callable[[], OSError | None]) -> int:
    """Runs the command, prints its error, and gives the exit status."""
    try:
        status = _exit_status(arguments)
    except _Stopped as stopped:
        say(f"spairkit: stopped by {signal.Signals(stopped.number).name}")
        return 128 + stopped.number
    except Exception as error:
        return _explained(error)
    lost = output_error()
    if lost is None or status:
        return status
    if isinstance(lost, BrokenPipeError):
        return 1  # the reader of our output has gone, as `head` does
    say(f"spairkit: standard output cannot be written: {lost.strerror}")
    return 2


def _explained(error: Exception) -> int:
    """Prints an error as one line, and gives the exit status."""
    debug = os.environ.get("SPAIRKIT_DEBUG") == "1"
    if debug:
        traceback.print_exc()
    if isinstance(error, InputError):
        say(f"spairkit: {error}")
        return 2
    if isinstance(error, _UsageError):
        _say_usage(error)
        return 2
    if lacks_memory(error):
        say("spairkit: not enough memory; try a lower train.batch_size, or smaller images")
        return 2
    if package := _broken_package(error):
        reason = f"{type(error).__name__}: {error}"
        say(f"spairkit: {package} does not work here: {reason}; reinstall it")
        return 2
    if isinstance(error, OSError):
        reason = error.strerror or str(error)
        say(f"spairkit: {f'{error.filename}: ' if error.filename else ''}{reason}")
        return 2
    advice = "" if debug else "; set SPAIRKIT_DEBUG=1 for the traceback"
    say(f"spairkit: internal error: {type(error).__name__}: {error}{advice}")
    return 1


def _broken_package(error: Exception) -> str | None:
    """The installed package that failed, or was not found, when it was imported; None if none."""
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if frame.f_code.co_name == "<module>" and package != "spairkit":
            return package
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition(".")[0]
        return None if package == "spairkit" else package
    return None


def _say_usage(error: Exception) -> None:
    """One line in place of Typer's box. Without a message, help has been printed already."""
    message = " ".join(getattr(error, "format_message", error.__str__)().split()).rstrip(".?")
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "spairkit"
    if not message:
        return
    message = message.replace("Value error, ", "").replace("'. Did you mean", "'; did you mean")
    if options := re.search(r"No such option: (\S+) \(Possible options: (.*)\)", message):
        close = get_close_matches(options[1], options[2].split(", "), n=1, cutoff=0.0)
        message = f"No such option: {options[1]}; did you mean {close[0]}"
    if meant := _SYNONYMS.get(next(iter(re.findall("No such command '(.*?)'$", message)), "")):
        message += f"; did you mean '{meant}'"
    end = "?" if "did you mean" in message else ";"
    say(f"spairkit: {message[:1].lower()}{message[1:]}{end} see {command} --help")


def _exit_status(arguments: list[str] | None) -> int:
    try:
        status = app(arguments, prog_name="spairkit", standalone_mode=False)
    except _Stopped:
        raise
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 0
    return status if isinstance(status, int) else 0


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise _Stopped(number)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    say(f"spairkit: warning: {message}")
