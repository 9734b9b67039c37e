"""Settings of the whole process: the precision of GPU products, and memory kept on the CPU."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

Precision = Literal["float32", "tf32", "bf16"]
"""Values of `train.precision`. With bf16, products that stay float32 are exact float32."""

_PRODUCTS: tuple[Any, ...] = (
    torch.backends.cuda.matmul,
    torch.backends.cudnn.conv,  # type: ignore[attr-defined]
)

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # parameters of glibc's mallopt


def set_precision(precision: Precision, device: torch.device) -> None:
    """Sets the precision of float32 products on a GPU, and makes convolutions deterministic.

    Reading torch's older flags, `allow_tf32`, raises afterwards: they cannot express the setting.
    """
    if device.type == "cuda":
        # torch's default is tf32 for convolutions only
        torch.backends.cudnn.deterministic = True
        for products in _PRODUCTS:
            products.fp32_precision = "tf32" if precision == "tf32" else "ieee"


@contextmanager
def computing_in(precision: Precision, device: torch.device) -> Iterator[None]:
    """`set_precision` inside a `with` block; the earlier settings are restored."""
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
    """Keeps freed memory of the process for later tensors; returns whether that is possible.

    By default glibc returns large blocks to the system at once, so that the pages of every update
    would be mapped and zeroed again. With another C library nothing changes.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, -1))
