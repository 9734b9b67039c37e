"""What every launch of a Triton kernel needs: the right device, and a trial of the installation."""

import contextlib

import torch
import triton
import triton.language as tl


def on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@triton.jit
def _successor_kernel(number_ptr):
    tl.store(number_ptr, tl.load(number_ptr) + 1)


def probe() -> None:
    """Compiles and runs the least kernel: raises what a broken Triton raises."""
    number = torch.ones(1, dtype=torch.int32, device="cuda")
    _successor_kernel[(1,)](number)
    if int(number) != 2:
        raise RuntimeError("triton computes wrong results")
