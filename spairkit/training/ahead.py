"""Batches that a thread makes one update ahead, while a GPU computes."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Made = TypeVar("Made")


class Ahead(Generic[Made]):
    """Calls `make` for consecutive steps, for the next one while the result of this one is used.

    Only one thread at a time is inside `make`, and steps are made in the order in which they are
    asked for, so results and errors are those of plain calls. The thread ends with this object or
    with Python, after the batch that it is making.

    Args:
        make: the batch of a step, or what is left to be done for it.
        end: the step after the last one that is asked for.
    """

    def __init__(self, make: Callable[[int], Made], end: int) -> None:
        self._make, self._end = make, end
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="spairkit-batch")
        self._next: tuple[int, Future[Made]] | None = None

    def __call__(self, step: int) -> Made:
        """The batch of `step`; raises what `make` raised for it."""
        expected, coming = self._next or (None, None)
        self._next = None
        if coming is None or expected != step:
            # after the one that is being made and that nobody wants
            coming = self._thread.submit(self._make, step)
        batch = coming.result()
        if step + 1 < self._end:
            self._next = step + 1, self._thread.submit(self._make, step + 1)
        return batch
