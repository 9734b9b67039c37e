"""Numba on the CPU: how functions are compiled, and how a batch is spread over threads.

Compiled functions let go of the interpreter's lock and take a range of images, so that plain
Python threads run them side by side. This needs none of Numba's own threading layers, which
differ from machine to machine, may not be entered by two threads at once and do not survive a fork.
"""

import functools
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from numba import njit
from threadpoolctl import OpenBLASController, ThreadpoolController

_OPTIONS: dict[str, Any] = {
    "nogil": True,
    "error_model": "numpy",  # a division by zero is inf, not an exception
    "fastmath": {"contract", "nsz", "arcp", "reassoc"},  # none that assumes away NaN or inf
}


def compiled(function: Callable[..., Any]) -> Any:
    """The function, compiled at its first call and kept on disk where there is a place to."""
    try:
        return njit(function, cache=True, **_OPTIONS)
    except RuntimeError:  # no folder that Numba could write its cache to
        return njit(function, **_OPTIONS)


def inlined(function: Callable[..., Any]) -> Callable[..., Any]:
    """A part of compiled functions; it is kept on disk with them."""
    dispatcher: Callable[..., Any] = njit(function, inline="always", **_OPTIONS)
    return dispatcher


def part(function: Callable[..., Any]) -> Callable[..., Any]:
    """A part of compiled functions as `inlined`, but by LLVM, which takes less time for large ones.

    A part that is called would be compiled twice, by itself and with its caller, and which of the
    two ran would depend on whether the caller came from disk: with other roundings.
    """
    dispatcher: Callable[..., Any] = njit(function, forceinline=True, **_OPTIONS)
    return dispatcher


def over_images(function: Callable[..., None], num_images: int, *arguments: Any) -> None:
    """Calls `function(start, stop, *arguments)` on ranges of images, one to a torch thread."""
    num_threads = max(1, min(torch.get_num_threads(), num_images))
    edges = [num_images * i // num_threads for i in range(num_threads + 1)]
    if num_threads == 1:
        function(0, num_images, *arguments)
        return
    pool = _pool(os.getpid(), num_threads - 1)
    rest = [pool.submit(function, *edges[i : i + 2], *arguments) for i in range(1, num_threads)]
    function(*edges[:2], *arguments)
    for job in rest:
        job.result()


@contextmanager
def single_threaded_blas() -> Iterator[None]:
    """Lets matrix products in compiled functions run on the thread that asks for them.

    The limit is the whole process's, so one Python thread at a time may be inside.
    """
    with _BLAS_LOCK:
        try:
            with _blas_controller().limit(limits=1):
                yield
        finally:
            # else no other thread could set a limit as long as this one lives
            OpenBLASController.clear_controlling_thread(force=True)


_BLAS_LOCK = threading.Lock()


@functools.cache
def _blas_controller() -> Any:
    import scipy.linalg  # noqa: F401 # whose BLAS Numba calls: it must be there to be found

    return ThreadpoolController().select(user_api="blas")


@functools.lru_cache(maxsize=4)
def _pool(process: int, num_threads: int) -> ThreadPoolExecutor:
    # a pool belongs to the process that started it: its threads do not live on in a fork
    return ThreadPoolExecutor(num_threads, thread_name_prefix=f"spairkit-{process}")


def probe() -> None:
    """Runs the least function, from the cache on disk if it is there.

    Raises:
        Exception: whatever a broken installation of Numba raises.
    """
    if _successor(1) != 2:
        raise RuntimeError("numba computes wrong results")


@compiled
def _successor(number: int) -> int:
    return number + 1
