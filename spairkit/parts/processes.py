"""Parts computed by several processes of this machine."""

import os
import signal
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import get_context, parent_process, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from spairkit.errors import InputError
from spairkit.names import printable
from spairkit.parts.plan import Part, Result
from spairkit.parts.work import Job, Worker

_MOST_DEATHS = 2
"""Processes that may end while they work on one part."""

_GRACE_SECONDS = 5.0


def in_processes(
    job: Job,
    parts: Sequence[Part],
    workers: int,
    *,
    on_images: Callable[[int], None] = lambda _: None,
    say: Callable[[str], None] = lambda _: None,
) -> Iterator[tuple[Part, Result]]:
    """Computes the parts in `workers` processes, and yields each with its result when it is done.

    The part of a process that ends is given to a new one. All processes end with the iterator, or
    with this process if it is killed.

    Args:
        job: what to compute.
        parts: in the order in which they are begun.
        workers: number of processes, at most; each computes a part at a time.
        on_images: called with the number of further images done; negative if a process has ended.
        say: called with a message when a process has ended.

    Raises:
        InputError: as `Worker`, or two processes have ended while they worked on the same part.
    """
    team: dict[Connection, _Process] = {}
    left = list(reversed(parts))
    deaths: Counter[Part] = Counter()
    try:
        while left or team:
            while left and len(team) < workers:
                process = _Process(job, _free(team.values(), workers))
                team[process.connection] = process
                process.begin(left.pop())
            for process in [team[place] for place in _ready(team)]:
                part = process.part
                try:
                    message = process.connection.recv()
                except (EOFError, OSError):
                    del team[process.connection]
                    status = process.end()
                    on_images(-process.images)
                    deaths[part] += 1
                    if deaths[part] == _MOST_DEATHS:
                        raise InputError(_blame(part, status)) from None
                    say(f"worker process {process.pid} ended ({status}); its part is done again")
                    left.append(part)
                    continue
                if isinstance(message, Exception):
                    raise message
                if message is None:
                    process.images += 1
                    on_images(1)
                    continue
                result, warned = message
                for text in warned:
                    warnings.warn(text, stacklevel=2)
                if left:
                    process.begin(left.pop())
                else:
                    del team[process.connection]
                    process.end()
                yield part, result
    finally:
        for process in team.values():
            process.end()


def _ready(team: "Iterable[Connection]") -> list[Connection]:
    """Waits for connections with a message, or whose process has ended."""
    return [place for place in wait(list(team)) if isinstance(place, Connection)]


def _free(team: "Iterable[_Process]", workers: int) -> int:
    """The least index that no process has."""
    used = {process.index for process in team}
    return min(set(range(workers)) - used)


def _blame(part: Part, status: str) -> str:
    names = part[0].name if len(part) == 1 else f"{part[0].name} to {part[-1].name}"
    return (
        f"{names}: {_MOST_DEATHS} worker processes ended here ({status}); if memory is short, use "
        "fewer --workers"
    )


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Sets variables for processes that are started in the block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ |= values
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Holds Ctrl-C back; processes that are started in the block never see it."""
    resource_tracker.ensure_running()  # to start it in the block would let Ctrl-C through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Process:
    """A process, and the part that it works on."""

    part: Part = ()
    images = 0

    def __init__(self, job: Job, index: int) -> None:
        context = get_context("spawn")  # threads of torch do not survive a fork
        self.index = index
        self.connection, theirs = context.Pipe()
        self._process: BaseProcess = context.Process(
            target=_serve, args=(theirs, job, index), daemon=True
        )
        with _environment(OMP_NUM_THREADS=str(job.threads)), _interrupts_held():
            self._process.start()
        theirs.close()  # so that the end of the process ends the connection
        self.pid = self._process.pid

    def begin(self, part: Part) -> None:
        """Gives it a part. A process that has ended is noticed when its answer is waited for."""
        self.part, self.images = part, 0
        with suppress(OSError):
            self.connection.send(part)

    def end(self) -> str:
        """Ends it, and says how it ended."""
        self.connection.close()
        self._process.terminate()
        self._process.join(_GRACE_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        code = self._process.exitcode or 0
        return signal.Signals(-code).name if code < 0 else f"status {code}"


def _serve(connection: Connection, job: Job, index: int) -> None:
    """The whole life of a worker process: computes the parts that come, until none comes.

    Ctrl-C is for the parent, which then ends it.
    """
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            worker = Worker(job, index=index)
            while True:
                part = connection.recv()
                result = worker.result(part, lambda: connection.send(None))
                connection.send((result, [printable(warning.message) for warning in caught]))
                caught.clear()
    except EOFError:
        return
    except Exception as error:
        with suppress(OSError):
            connection.send(error)


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(128 + signal.SIGTERM)
