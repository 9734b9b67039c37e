"""A sweep by several processes of one machine, each of one CPU thread."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from spairkit.errors import InputError
from spairkit.sweeps.sweep import Ended, Progress, Sweep


def work_in_processes(
    sweep: Sweep, trials: int, device: torch.device, processes: int, stop: Callable[[], bool]
) -> Iterator[Progress | Ended | int]:
    """`Sweep.work` in so many processes of one thread; yields what happens in any of them.

    A process that dies is told of by its exit status, an int; the others go on, and make its
    trial too.

    Raises:
        InputError: as `Sweep.work`; the other processes have saved and ended.
    """
    context = multiprocessing.get_context("spawn")
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # read when a process starts
    workers: dict[Connection, Any] = {}
    error: str | None = None
    stopping = False
    try:
        for _ in range(processes):
            here, there = context.Pipe(duplex=False)
            arguments = (there, sweep.path, sweep.storage, trials, str(device))
            worker = context.Process(target=_work_for, args=arguments, daemon=True)
            worker.start()
            there.close()
            workers[here] = worker
        while workers:
            for connection in wait(list(workers), timeout=0.2):
                assert isinstance(connection, Connection)
                try:
                    event = connection.recv()
                except (EOFError, ConnectionError):
                    worker = workers.pop(connection)
                    worker.join()
                    if worker.exitcode and not error:
                        yield worker.exitcode
                    continue
                if isinstance(event, str):
                    error = error or event
                else:
                    yield event
            if not stopping and (error or stop()):
                stopping = True
                for worker in workers.values():
                    worker.terminate()
    finally:
        for worker in workers.values():
            worker.kill()
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
    if error:
        raise InputError(error)


def _work_for(
    connection: Connection, path: Path, storage: str | None, trials: int, device: str
) -> None:
    """What a process of `work_in_processes` does; an error goes to the parent as a word."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent has it too, and says what to do
    parent, stopped = os.getppid(), False

    def note(number: int, frame: object) -> None:
        nonlocal stopped
        stopped = True

    def is_over() -> bool:
        return stopped or os.getppid() != parent

    signal.signal(signal.SIGTERM, note)
    torch.set_num_threads(1)
    try:
        sweep = Sweep.find(path, storage)
        if sweep is None:
            raise InputError(f"{path}: no sweep is here any more")
        sweep.work(trials, torch.device(device), is_over, connection.send)
    except InputError as error:
        connection.send(str(error))
