"""Ctrl-C and SIGTERM while something runs that first has to be saved."""

import os
import signal
from types import FrameType
from typing import Any, Self


class Interrupts:
    """Notes the first signal to end and lets the second one end at once, as a context.

    Not so under torchrun, which passes on a signal that a scheduler may have sent to all: one that
    left alone would leave the others waiting. It kills them itself, 30 s after.
    """

    number: int | None = None

    def __init__(self, doing: str = "saving", *, quiet: bool = False) -> None:
        self.doing, self.quiet = doing, quiet

    def __enter__(self) -> Self:
        self._before: dict[int, Any] = {}
        for number in (signal.SIGINT, signal.SIGTERM):
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
            os.write(2, f"{below}{self.doing}; once more leaves at once\n".encode())
