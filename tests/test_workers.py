"""Worker processes end with their parent."""

import os
import subprocess
import sys
import time

BUSY = """
import sys, time
from spairkit.cli import options, workers

workers._GRACE_SECONDS = float(sys.argv[1])

def work(stop, busy):
    print("began", flush=True)
    while not (sys.argv[2] == "saves" and stop()):
        time.sleep(0.01)
    print("saved", flush=True)
    yield from ()

workers.run_shared(work, 1, 1, [], options.Device.CPU, quiet=True)
"""


def worker(grace: float, manner: str) -> "subprocess.Popen[str]":
    """A worker whose parent is this process; it saves when it is asked to stop, or is deaf."""
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY, str(grace), manner],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "SPAIRKIT_PARENT": str(os.getpid())},
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "began\n"
    return process


def test_orphan_saves_and_ends() -> None:
    with worker(1000, "saves") as process:
        assert process.stdin is not None
        process.stdin.close()  # as the system does when a process is killed
        assert process.wait(timeout=60) == 0
        assert process.stdout is not None
        assert process.stdout.read() == "saved\n"


def test_orphan_that_is_busy_ends_all_the_same() -> None:
    with worker(0.1, "is deaf") as process:
        time.sleep(0.2)
        assert process.poll() is None, "its parent lives"
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(timeout=60) == 143
