"""Ctrl-C, SIGTERM and SIGHUP during work that is saved before it ends."""

import os
import signal
from contextlib import suppress
from types import FrameType
from typing import Any, Self


class Interrupts:
    """As a context: notes the first signal, and lets the second one end the process at once.

    Under torchrun the second signal is ignored: a process that left alone would keep the others
    waiting. Torchrun itself kills them after 30 s.
    """

    number: int | None = None

    def __init__(self, doing: str = "saving", *, quiet: bool = False) -> None:
        self.doing, self.quiet = doing, quiet

    def __enter__(self) -> Self:
        self._before: dict[int, Any] = {}
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:
            if "TORCHELASTIC_RUN_ID" in os.environ:
                return
            self._before[number](number, frame)
        self.number = number
        if not self.quiet:
            # print could be in the middle of printing
            below = "\n" if os.isatty(2) else ""  # the terminal has shown ^C on the line
            with suppress(OSError):  # the terminal may be gone
                os.write(2, f"{below}{self.doing}; press Ctrl-C again to quit now\n".encode())
