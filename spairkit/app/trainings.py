"""A training of SPAIR on the folder, as a process of its own, and how it goes."""

import re
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, Literal

from spairkit.errors import InputError
from spairkit.report.signs import has_failed
from spairkit.storage.runs import Run, new_folder

_LINES, _SHOWN = 200, 8  # of its output that are kept, and shown
_MAX_LINE = 2000  # characters
_POINTS = 240  # of a curve
_STEP = re.compile(r"(?:^|after )step (\d{1,12})\b")

Start = Callable[[Sequence[str]], "subprocess.Popen[bytes]"]
"""Starts `spairkit` with these words, its output in one pipe; it ends when this process ends."""

Status = Literal["running", "stopping", "done", "stopped", "failed"]


class Training:
    """`spairkit train --data FOLDER` and its run, `runs/folder-quick-N`.

    Raises:
        InputError: the folder of the run cannot be made.
    """

    def __init__(self, folder: Path, start: Start) -> None:
        self.run = new_folder(None, "folder-quick")
        self._lines: deque[str] = deque(maxlen=_LINES)
        self._stops = False
        self._step = 0
        self._process = start(["train", "--data", str(folder), "--out", str(self.run)])
        assert self._process.stdout is not None
        self._reader = threading.Thread(
            target=self._read, args=(self._process.stdout,), daemon=True
        )
        self._reader.start()

    @property
    def status(self) -> Status:
        """`failed` if it ended with an error, or in a model that is no good."""
        code = self._process.poll()
        if code is None:
            return "stopping" if self._stops else "running"
        if code == 0:
            return "done"
        return "stopped" if self._stops else "failed"

    @property
    def has_model(self) -> bool:
        """Whether there is a checkpoint."""
        return any((self.run / "checkpoints").glob("step-*"))

    def to_json(self) -> dict[str, Any]:
        """Where it is, for the page."""
        steps, records = self._validations()
        every = -(-len(records) // _POINTS) or 1
        names = ("step", "found", "elbo", "ap")
        return {
            "run": str(self.run),
            "status": self.status,
            "step": max([self._step, *(record["step"] for record in records)]),
            "steps": steps,
            "lines": list(self._lines)[-_SHOWN:],
            "curve": [{name: r.get(name) for name in names} for r in records[::every]],
            "has_model": self.status not in ("running", "stopping") and self.has_model,
            "is_doubtful": has_failed(self.run),
        }

    def stop(self) -> None:
        """Asks it to save and end."""
        if self._process.poll() is None:
            self._stops = True
            self._process.send_signal(signal.SIGTERM)

    def close(self) -> None:
        """Stops it, and waits until it has saved."""
        self.stop()
        self._process.wait()
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _read(self, output: IO[bytes]) -> None:
        for data in iter(lambda: output.readline(_MAX_LINE), b""):
            line = data.decode(errors="replace").strip()
            if line:
                self._lines.append(line)
            if match := _STEP.search(line):
                self._step = max(self._step, int(match[1]))

    def _validations(self) -> tuple[int, list[dict[str, Any]]]:
        """The number of updates, 0 before it has begun, and the figures of each validation."""
        try:
            run = Run.open(self.run)
            records = [r for r in run.metrics() if r.get("kind") == "validation"]
        except InputError:  # it has not begun
            return 0, []
        return run.config.train.steps, records
