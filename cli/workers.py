"""Worker processes: of `sweep`, `compare` and `experiment` the same command, of `app` a training.

A worker ends with the process that started it, however that ends.
"""

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Annotated, Any

from spairkit.cli.console import LINE_EVERY_SECONDS, progress_bar, say
from spairkit.cli.figures import listed
from spairkit.cli.interrupts import Interrupts
from spairkit.cli.options import Device, runs_option

if TYPE_CHECKING:
    Work = Callable[[Callable[[], bool], Callable[[], bool]], Iterator[Any]]

WorkersOption = Annotated[
    int,
    runs_option(
        min=1, max=1024, help="Number of processes; if there are several, each uses one CPU thread."
    ),
]

_GRACE_SECONDS = 5.0  # in which an orphan saves its run
_PARENT = "SPAIRKIT_PARENT"  # in a worker's environment: the process that started it


def is_worker() -> bool:
    """Whether this process is a worker, which trains and leaves the results to its parent."""
    return _PARENT in os.environ


def run_shared(
    work: "Work", total: int, workers: int, words: list[str], device: Device, *, quiet: bool
) -> int | None:
    """Runs `work` here and in `workers - 1` processes of the command `words`; shows progress.

    `work` takes `stop` and `busy` and yields the events of `Sweep.work`; `total` is the number of
    runs. Returns the signal that interrupted it, or None.
    """
    orphaned = parent_ended()
    with Interrupts(quiet=is_worker()) as interrupts:

        def stop() -> bool:
            return interrupts.number is not None or orphaned.is_set()

        with _processes(workers - 1, [*words, "--device", device.value, "--quiet"]) as busy:
            _show(work(stop, busy), total, quiet=quiet)
    return interrupts.number


def parent_ended() -> threading.Event:
    """An event that is set when the parent of a worker ends; the worker is to save, and end.

    A worker that takes longer than five seconds is ended. Call it once in a process.
    """
    orphaned = threading.Event()
    if is_worker():
        threading.Thread(target=_watch_parent, args=(orphaned,), daemon=True).start()
    return orphaned


def start_worker(
    words: Sequence[str],
    environment: Mapping[str, str] | None = None,
    *,
    stdout: int = subprocess.DEVNULL,
    stderr: int | None = None,
) -> "subprocess.Popen[bytes]":
    """Starts `spairkit` with these words as a worker of this process.

    Args:
        words: of the command line.
        environment: variables besides those of this process.
        stdout, stderr: as in `subprocess.Popen`.
    """
    return subprocess.Popen(
        [sys.executable, "-m", "spairkit", *words],
        stdin=subprocess.PIPE,  # the system closes it when this process ends
        env={**os.environ, **(environment or {}), _PARENT: str(os.getpid())},
        stdout=stdout,
        stderr=stderr,
        start_new_session=True,  # or Ctrl-C would reach it too
    )


def _watch_parent(orphaned: threading.Event) -> None:
    """Waits for the end of the parent, which holds the other end of stdin; then ends the worker.

    A run is saved between two updates; an evaluation, or whatever takes longer, is broken off.
    """
    with suppress(OSError):
        while os.read(0, 1):
            pass
    orphaned.set()
    time.sleep(_GRACE_SECONDS)
    os._exit(128 + signal.SIGTERM)


def resume_command(*words: object) -> str:
    """The `spairkit` command of these words, quoted for a shell."""
    return shlex.join(["spairkit", *map(str, words)])


@contextmanager
def _processes(number: int, words: list[str]) -> Iterator[Callable[[], bool]]:
    """Starts workers, yields a function that tells whether any is alive, and stops them at the end.

    A worker saves its run when it receives SIGTERM.
    """
    import torch

    if number:
        torch.set_num_threads(1)
    started: list[subprocess.Popen[bytes]] = []
    try:
        for _ in range(number):
            started.append(start_worker(words, {"OMP_NUM_THREADS": "1"}))
        yield lambda: any(process.poll() is None for process in started)
    finally:
        running = [process for process in started if process.poll() is None]
        for process in running:
            process.terminate()
        for process in started:
            status = process.wait()
            assert process.stdin is not None
            process.stdin.close()
            if status and process not in running:
                say(f"worker process {process.pid} ended with status {process.returncode}")


def _show(events: Iterator[Any], total: int, *, quiet: bool) -> None:
    """Shows the start, progress and end of runs; runs that finished earlier are only counted."""
    from spairkit.experiments.shared_runs import Ended, Started
    from spairkit.training.loop import Step

    with progress_bar(quiet=quiet) as bar:
        runs = bar.add_task("runs", total=total, note="")
        current = bar.add_task("", total=None, visible=False, note="")
        name, done, line_at = "", 0, 0.0

        for event in events:
            if isinstance(event, Started):
                name, line_at = event.name, 0.0
                bar.reset(current, description=name, total=event.steps, visible=True)
                bar.say(f"{name}: {event.steps} {event.unit}; {done} of {total} runs finished")
            elif isinstance(event, Step):
                bar.update(current, completed=event.step)
                if bar.disable and event.seconds - line_at >= LINE_EVERY_SECONDS:
                    line_at = event.seconds
                    bar.say(f"{name}: step {event.step} of {event.steps}")
            elif isinstance(event, Ended):
                done += bool(event.figures or event.error)
                bar.update(runs, completed=done)
                if event.name == name:
                    bar.update(current, visible=False)
                if name:
                    failed = f"failed: {event.error}" if event.error else "stopped and saved"
                    bar.say(f"{event.name}: {listed(event.figures) or failed}")
