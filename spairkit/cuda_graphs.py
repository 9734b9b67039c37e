"""CUDA graphs: calls of a function are recorded once, then launched as a whole.

Launched one by one, hundreds of small kernels keep a GPU waiting for the host.
"""

import gc
import threading
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, Generic, TypeVar

import torch

from spairkit.errors import InputError

WARM_UP = 3
"""Calls before the recording, in which kernels are compiled and caches are filled."""

Result = TypeVar("Result")

# what another thread launches on the stream of a recording would become part of it, and torch
# records one graph at a time
_ONE_AT_A_TIME = threading.Lock()


class Recorded(Generic[Result]):
    """Calls of `function`: the first three run it, the fourth records it, and later ones replay.

    Where recording fails there is one warning, and every call runs `function`.

    Args:
        function: reads and writes tensors that stay in one place, and waits for no result. Python
            values that it reads keep the value that they had when it was recorded.
        device: a GPU.
        name: of a call in the warning.
        pool: of memory for what is computed meanwhile, shared with other records of which no two
            are replayed at a time and whose results are not read afterwards; None: its own.
    """

    def __init__(
        self, function: Callable[[], Result], device: torch.device, name: str, pool: Any = None
    ) -> None:
        self._function, self._device, self._name, self._pool = function, device, name, pool
        self._calls = 0
        self._play: Callable[[], Result] | None = None

    def __call__(self) -> Result:
        """One call; from the fourth one on, the next one overwrites the tensors of its result."""
        self._calls += 1
        if self._calls <= WARM_UP:
            return _aside(self._function, self._device)
        if self._play is None:
            self._play, reason = self._function, "another process could not record its own"
            try:
                self._play = _record(self._function, self._device, self._pool)
            except (RuntimeError, InputError) as error:
                # the context names the operation or exchange that broke the recording
                reason = str(error.__context__ or error)
            if not self._agreed(self.plays):
                warnings.warn(
                    f"{self._name} could not be recorded as a CUDA graph and is launched kernel "
                    f"by kernel, which is slower: {reason}",
                    RuntimeWarning,
                    stacklevel=2,
                )
                self._play = self._function
        return self._play()

    @property
    def plays(self) -> bool:
        """Whether a record exists."""
        return self._play not in (None, self._function)

    def _agreed(self, plays: bool) -> bool:
        """Whether the record is to be used, if it exists here."""
        return plays


@cache
def _own_stream(index: int) -> torch.cuda.Stream:
    """One stream on each GPU for all records: cuBLAS keeps a workspace for every stream."""
    return torch.cuda.Stream(index)


def _aside(function: Callable[[], Result], device: torch.device) -> Result:
    """Runs `function` on another stream: autograd must not stay tied to the default one."""
    with _ONE_AT_A_TIME, torch.cuda.device(device):
        here, aside = torch.cuda.current_stream(), _own_stream(torch.cuda.current_device())
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            result = function()
        here.wait_stream(aside)
    return result


def _record(
    function: Callable[[], Result], device: torch.device, pool: Any
) -> Callable[[], Result]:
    """Records `function` without running it; returns the function that replays it."""
    graph = torch.cuda.CUDAGraph()
    with _ONE_AT_A_TIME, torch.cuda.device(device):
        here, aside = torch.cuda.current_stream(), _own_stream(torch.cuda.current_device())
        # destroying a graph during the recording would break it
        gc.collect()
        collects = gc.isenabled()
        gc.disable()
        try:
            # other threads, such as NCCL's, may wait for events meanwhile
            with torch.cuda.graph(
                graph, pool=pool, stream=aside, capture_error_mode="thread_local"
            ):
                result = function()
        finally:
            torch.cuda.set_stream(here)  # torch stays on the other stream if recording fails
            if collects:
                gc.enable()

    def play() -> Result:
        graph.replay()
        return result

    return play
