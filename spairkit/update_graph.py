"""An update of training as a CUDA graph: recorded once, then handed to the GPU as a whole.

Launched one by one, the hundreds of small kernels of an update keep a GPU waiting for the host.
"""

from collections.abc import Callable

import torch

from spairkit.elbo import Losses

_WARM_UP = 3
"""Updates before the recording: kernels are compiled and chosen, what is cached is made."""


class UpdateGraph:
    """Calls of `update`, of which all but the first three are played from a record.

    Args:
        update: reads and writes tensors that stay where they are, and waits for no result. What
            it reads of Python is as in the call that is recorded, for good.
    """

    def __init__(self, update: Callable[[], Losses]) -> None:
        self._update = update
        self._calls = 0
        self._play: Callable[[], None] | None = None

    def __call__(self) -> Losses:
        """One update. From the fourth call on its losses lie in the memory of the last one's."""
        self._calls += 1
        if self._calls <= _WARM_UP:
            return _aside(self._update)
        if self._play is None:
            self._play, self._losses = _record(self._update)
        self._play()
        return self._losses


def _aside(update: Callable[[], Losses]) -> Losses:
    """On a stream of its own: autograd's nodes must not stay tied to the default stream."""
    here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
    aside.wait_stream(here)
    with torch.cuda.stream(aside):
        losses = update()
    here.wait_stream(aside)
    return losses


def _record(update: Callable[[], Losses]) -> tuple[Callable[[], None], Losses]:
    """What plays the record, and the losses that it writes; nothing is computed yet."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        losses = update()
    return graph.replay, losses
