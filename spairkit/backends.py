"""Which implementation of an operator runs, and the one warning when it is not the wished one."""

from typing import Literal, get_args

Backend = Literal["auto", "torch", "cpu", "triton"]
"""`torch`: plain torch, any device and dtype. `cpu`: Numba. `triton`: GPUs. `auto`: by device."""


def check_backend(backend: str) -> None:
    """Raises ValueError unless `backend` is one of the four names."""
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {', '.join(get_args(Backend))}, got {backend!r}")
