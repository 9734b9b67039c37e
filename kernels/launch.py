"""Launches of Triton kernels: the device they run on, and a test of the installation."""

import contextlib
import os

import torch
import triton
import triton.language as tl

# fused multiply-add, as the gate compiles it: Triton 3.9 warns if unset, and 3.10 turns it off
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


def on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Makes `device` the current one, on which Triton launches."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@triton.jit
def _successor_kernel(number_ptr):
    tl.store(number_ptr, tl.load(number_ptr) + 1)


def probe() -> None:
    """Compiles and runs the least kernel.

    Raises:
        Exception: whatever a broken installation of Triton raises.
    """
    number = torch.ones(1, dtype=torch.int32, device="cuda")
    _successor_kernel[(1,)](number)
    if int(number) != 2:
        raise RuntimeError("triton computes wrong results")
