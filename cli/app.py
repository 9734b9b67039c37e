"""`spairkit app`: a page in the browser to look at objects and correct them."""

import os
import secrets
import socket
import subprocess
import sys
import threading
import webbrowser
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spairkit.cli import options
from spairkit.cli.console import echo, say
from spairkit.cli.files import check_output
from spairkit.cli.workers import start_worker
from spairkit.errors import InputError

if TYPE_CHECKING:
    from spairkit.app.session import Session

_BACKLOG = 128
_SHUTDOWN_SECONDS = 2


def app_page(
    folder: Annotated[
        Path | None, typer.Argument(metavar="[FOLDER]", help="The folder of images.")
    ] = None,
    checkpoint: Annotated[
        Path | None,
        options.model_option(
            help="A run or a checkpoint. Default: the newest run under ./runs that was trained on "
            "the folder and did not fail, or else a watershed, which needs no training."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        options.output_option(
            help="The file that corrections are kept in. Default: FOLDER/spairkit-corrections.json."
        ),
    ] = None,
    port: Annotated[
        int, options.machine_option(min=0, max=65535, help="The port; 0 takes a free one.")
    ] = 0,
    no_browser: Annotated[
        bool, options.machine_option("--no-browser", help="Only print the address.")
    ] = False,
    device: options.DeviceOption = options.Device.AUTO,
) -> None:
    """Open a page in the browser to look at the objects in a folder, correct and export them.

    The page is served on this machine only, and its address holds a token. Ctrl-C ends it.
    Needs the extra `app`: pip install 'spairkit[app]'.
    """
    for package in ("starlette", "uvicorn"):
        _check_installed(package)
    with ExitStack() as stack:
        listening = stack.enter_context(_listening(port))
        session = None
        if folder is not None:
            session = _session(folder, checkpoint, out, device)
            stack.push(partial(_close, session))
        _serve(session, listening, browser=not no_browser)


@contextmanager
def _listening(port: int) -> Iterator[socket.socket]:
    """A socket that only this machine reaches."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listening:
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(("127.0.0.1", port))
            listening.listen(_BACKLOG)
        except OSError as error:
            raise InputError(f"--port {port}: {error.strerror}; choose another") from None
        yield listening


def _session(
    folder: Path, checkpoint: Path | None, out: Path | None, device: options.Device
) -> "Session":
    from spairkit.app.corrections import CORRECTIONS
    from spairkit.app.session import Session
    from spairkit.report.signs import failed_run
    from spairkit.storage.runs import newest_run

    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; name a folder of images")
    path = folder / CORRECTIONS if out is None else out
    check_output(path)
    if checkpoint is None:
        newest = newest_run(data=folder)
        checkpoint = newest if newest is None or failed_run(newest) is None else None
        if checkpoint is not None and (rest := options.unfinished(checkpoint)):
            say(f"using the newest run on these images: {checkpoint}{rest}")
    else:
        checkpoint = options.choose_checkpoint(checkpoint)
    return Session(folder, path, checkpoint, options.choose_device(device), _start)


def _close(session: "Session", kind: object, ended: BaseException | None, *_: object) -> None:
    """Ends a session; `ended` says why."""
    if session.training is not None and session.training.status == "running":
        say("saving the training; press Ctrl-C again to quit now")
    if not session.close():
        # the interpreter must not be dismantled under a thread that is in compiled code
        say("stopped in the middle of an image")
        os._exit(ended.code if isinstance(ended, SystemExit) and isinstance(ended.code, int) else 1)


def _check_installed(package: str) -> None:
    from importlib.util import find_spec

    if find_spec(package) is None:
        raise InputError(f"app needs {package}; install it: pip install 'spairkit[app]'")


def _serve(session: "Session | None", listening: socket.socket, *, browser: bool) -> None:
    """Serves until a signal ends the process."""
    import uvicorn

    from spairkit.app.server import build_app

    token, once = secrets.token_urlsafe(24), secrets.token_urlsafe(24)
    address = f"http://127.0.0.1:{listening.getsockname()[1]}/?token="
    echo(f"{address}{token}")
    sys.stdout.flush()
    say("open this address in a browser on this machine; Ctrl-C ends the page")
    config = uvicorn.Config(
        build_app(session, token, once),
        log_level="critical",  # the page shows errors
        access_log=False,
        ws="none",
        lifespan="off",
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=_SHUTDOWN_SECONDS,
    )
    if browser and (sys.platform == "darwin" or _has_display()):
        # a browser may take seconds to start
        threading.Thread(target=webbrowser.open, args=(address + once,), daemon=True).start()
    uvicorn.Server(config).run(sockets=[listening])


def _has_display() -> bool:
    """Whether there is a screen; a browser of text would take the terminal."""
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def _start(words: Sequence[str]) -> "subprocess.Popen[Any]":
    return start_worker(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
