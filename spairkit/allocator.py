"""What this process does with the memory that tensors on the CPU free."""

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # parameters of glibc's mallopt


def keep_freed_memory() -> bool:
    """Keeps for later tensors what earlier ones have freed, until the process ends.

    glibc gives large blocks back to the system at once, so that every update of training would
    have its pages made, and filled with zeros, anew. Says whether it could be done: where there
    is another C library nothing changes.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, -1))
