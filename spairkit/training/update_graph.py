"""An update of training as a CUDA graph: recorded once, then handed to the GPU as a whole.

Launched one by one, the hundreds of small kernels of an update keep a GPU waiting for the host.
"""

import gc
import warnings
from collections.abc import Callable
from functools import cache

import torch

from spairkit.models.elbo import Losses

WARM_UP = 3
"""Updates before the recording: kernels are compiled and chosen, what is cached is made."""


class UpdateGraph:
    """Calls of `update`, of which all but the first three are played from a record.

    Where nothing can be recorded there is one warning, and every call is `update` itself.

    Args:
        update: reads and writes tensors that stay where they are, and waits for no result. What
            it reads of Python is as in the call that is recorded, for good.
        device: where, a GPU.
    """

    def __init__(self, update: Callable[[], Losses], device: torch.device) -> None:
        self._update, self._device = update, device
        self._calls = 0
        self._play: Callable[[], Losses] | None = None

    def __call__(self) -> Losses:
        """One update. From the fourth call on its losses lie in the memory of the last one's."""
        self._calls += 1
        if self._calls <= WARM_UP:
            return _aside(self._update, self._device)
        if self._play is None:
            try:
                self._play = _record(self._update, self._device)
            except RuntimeError as error:
                # what broke the record comes first, and then that there is none
                reason = error.__context__ or error
                warnings.warn(
                    "an update could not be recorded as a CUDA graph, so all of them are launched "
                    f"kernel by kernel, which is slower: {reason}",
                    RuntimeWarning,
                    stacklevel=2,
                )
                self._play = self._update
        return self._play()

    @property
    def plays(self) -> bool:
        """Whether there is a record."""
        return self._play not in (None, self._update)


@cache
def _own_stream(index: int) -> torch.cuda.Stream:
    """One of each GPU for all records: every stream has workspaces of cuBLAS, for good."""
    return torch.cuda.Stream(index)


def _aside(update: Callable[[], Losses], device: torch.device) -> Losses:
    """On a stream of its own: autograd's nodes must not stay tied to the default stream."""
    with torch.cuda.device(device):
        here, aside = torch.cuda.current_stream(), _own_stream(torch.cuda.current_device())
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            losses = update()
        here.wait_stream(aside)
    return losses


def _record(update: Callable[[], Losses], device: torch.device) -> Callable[[], Losses]:
    """What plays the record, and gives the losses that it writes; nothing is computed yet."""
    graph = torch.cuda.CUDAGraph()
    # a graph that is destroyed while another one is recorded breaks the record
    gc.collect()
    collects = gc.isenabled()
    gc.disable()
    with torch.cuda.device(device):
        here, aside = torch.cuda.current_stream(), _own_stream(torch.cuda.current_device())
        try:
            with torch.cuda.graph(graph, stream=aside):
                losses = update()
        finally:
            torch.cuda.set_stream(here)  # torch stays on the other one where the record breaks
            if collects:
                gc.enable()

    def play() -> Losses:
        graph.replay()
        return losses

    return play
