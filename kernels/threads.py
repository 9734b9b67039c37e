"""Numba on the CPU: how functions are compiled, and how a batch is spread over threads.

Compiled functions release the interpreter's lock and take a range of images, so Python threads run
them in parallel. Numba's own threading layers differ from machine to machine, must not be entered
by two threads at once and do not survive a fork.
"""

import functools
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numba import njit
from threadpoolctl import OpenBLASController, ThreadpoolController
from torch import Tensor

_OPTIONS: dict[str, Any] = {
    "nogil": True,
    "error_model": "numpy",  # a division by zero is inf, not an exception
    "fastmath": {"contract", "nsz", "arcp", "reassoc"},  # none that assumes away NaN or inf
}

# Python never calls a part, and wrappers for it take a tenth of the time of compiling
_PART: dict[str, Any] = _OPTIONS | {
    "forceinline": True, "no_cpython_wrapper": True, "no_cfunc_wrapper": True,
}  # fmt: skip


def compiled(function: Callable[..., Any]) -> Any:
    """The function, compiled at its first call and cached on disk if there is a writable folder."""
    try:
        return njit(function, cache=True, **_OPTIONS)
    except RuntimeError:  # Numba found no folder for its cache
        return njit(function, **_OPTIONS)


def inlined(function: Callable[..., Any]) -> Any:
    """The function, inlined by Numba into compiled functions and cached with them."""
    return njit(function, inline="always", **_OPTIONS)


def part(function: Callable[..., Any]) -> Any:
    """The function, inlined by LLVM into compiled functions: faster to compile if it is large.

    Without inlining it would be compiled twice, alone and with its caller. Which of the two runs,
    with different rounding, would depend on whether the caller came from the cache.
    """
    return njit(function, **_PART)


def over_images(function: Callable[..., None], num_images: int, *arguments: Any) -> None:
    """Calls `function(start, stop, *arguments)` on ranges of images, one for each torch thread."""
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


def arrays(*tensors: Tensor) -> list[np.ndarray]:
    """Contiguous float32 arrays for compiled functions; a copy only where needed."""
    return [tensor.detach().float().contiguous().numpy() for tensor in tensors]


@contextmanager
def single_threaded_blas() -> Iterator[None]:
    """Has matrix products in compiled functions run on the thread that calls them.

    The limit holds for the whole process, so one Python thread at a time may be inside.
    """
    with _BLAS_LOCK:
        try:
            with _blas_controller().limit(limits=1):
                yield
        finally:
            # otherwise no other thread could set a limit while this one lives
            OpenBLASController.clear_controlling_thread(force=True)


_BLAS_LOCK = threading.Lock()


@functools.cache
def _blas_controller() -> Any:
    import scipy.linalg  # noqa: F401 # Numba calls its BLAS, so it has to be loaded here

    return ThreadpoolController().select(user_api="blas")


@functools.lru_cache(maxsize=4)
def _pool(process: int, num_threads: int) -> ThreadPoolExecutor:
    # threads do not survive a fork, so a pool belongs to the process that started it
    return ThreadPoolExecutor(num_threads, thread_name_prefix=f"spairkit-{process}")


def probe() -> None:
    """Runs the least function, which is compiled or comes from the cache.

    Raises:
        Exception: whatever a broken installation of Numba raises.
    """
    if _successor(1) != 2:
        raise RuntimeError("numba computes wrong results")


@compiled
def _successor(number: int) -> int:
    return number + 1
