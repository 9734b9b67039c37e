"""Settings of the whole process: the precision of GPU products, and memory kept on the CPU."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

Precision = Literal["float32", "tf32", "bf16"]
"""As `train.precision`. What bf16 leaves in float32 is computed as float32 is."""

_PRODUCTS: tuple[Any, ...] = (
    torch.backends.cuda.matmul,
    torch.backends.cudnn.conv,  # type: ignore[attr-defined]
)

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # parameters of glibc's mallopt


def set_precision(precision: Precision, device: torch.device) -> None:
    """Lets this process compute on a GPU as `precision` says, and alike each time.

    Torch's older flags, `allow_tf32`, can then not be read: they do not tell one from the other.
    """
    if device.type == "cuda":
        # torch's own choice is tf32 for convolutions alone
        torch.backends.cudnn.deterministic = True
        for products in _PRODUCTS:
            products.fp32_precision = "tf32" if precision == "tf32" else "ieee"


@contextmanager
def computing_in(precision: Precision, device: torch.device) -> Iterator[None]:
    """`set_precision` for a while; what was set before comes back."""
    deterministic = torch.backends.cudnn.deterministic
    before = [products.fp32_precision for products in _PRODUCTS]
    set_precision(precision, device)
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = deterministic
        for products, value in zip(_PRODUCTS, before, strict=True):
            products.fp32_precision = value


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
