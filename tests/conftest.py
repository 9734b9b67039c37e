"""Fixtures for all tests: fresh memory is NaN, and kernels run where this machine can run them."""

import gc
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Triton warns, once a compile, that its default will change; the gate counts registers under this
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

# a shell has what it starts in the background ignore Ctrl-C, of which some tests are
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True, scope="module")
def _imports_are_no_garbage() -> None:
    """Collecting garbage takes a third of a second while it also looks through torch's compiler."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _poison_fresh_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """An element that nobody wrote is NaN, so that it cannot pass for a result."""

    def poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def allocate_nan(*args: Any, **kwargs: Any) -> torch.Tensor:
            fresh = allocate(*args, **kwargs)
            # inside torch.compile the call must stay what it is
            if torch.compiler.is_compiling() or not fresh.is_floating_point():
                return fresh
            return fresh.fill_(float("nan"))

        return allocate_nan

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


@pytest.fixture
def float64_by_default() -> Callable[[], AbstractContextManager[None]]:
    """A context in which new tensors are float64 where nobody says what they should be."""

    @contextmanager
    def context() -> Iterator[None]:
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(before)

    return context


def kernel_backends() -> list[str]:
    """The compiled backends that this process can run."""
    if torch.cuda.is_available():
        return ["cpu", "triton"]
    # Triton decides at import between compiler and interpreter, so a process has one of the two
    return ["triton"] if os.environ.get("TRITON_INTERPRET") == "1" else ["cpu"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "kernel" in metafunc.fixturenames:
        metafunc.parametrize("kernel", kernel_backends())


@pytest.fixture
def kernel_device(kernel: str) -> torch.device:
    """Where the tensors for the backend `kernel` live."""
    return torch.device("cuda" if kernel == "triton" and torch.cuda.is_available() else "cpu")


class _NoWaiting(TorchDispatchMode):
    """Refuses what would make the host wait for a device: values and shapes that depend on data.

    Tensors from numbers in Python (`lift_fresh`) too, which are copied to the device at once.
    """

    WAITING = (
        torch.ops.aten._local_scalar_dense,
        torch.ops.aten.lift_fresh,
        torch.ops.aten.nonzero,
        torch.ops.aten.masked_select,
        torch.ops.aten.equal,
        torch.ops.aten.unique_dim,
        torch.ops.aten._unique2,
    )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket not in self.WAITING, f"{func} waits for the device"
        if func.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put_):
            assert all(index is None or index.dtype != torch.bool for index in args[1])
        return func(*args, **(kwargs or {}))


@pytest.fixture
def no_waiting() -> type[_NoWaiting]:
    """A context in which what waits for a device fails."""
    return _NoWaiting
