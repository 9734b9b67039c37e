"""Shared fixtures: uninitialised memory is NaN; `kernel` runs over this machine's backends."""

import gc
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

# otherwise every compilation by Triton warns that this default will change
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

# processes that a shell starts in the background ignore Ctrl-C, which some tests send
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True, scope="module")
def _exclude_imports_from_garbage_collection() -> None:
    """Scanning torch's compiler would add a third of a second to each collection."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _poison_fresh_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills fresh floating-point tensors with NaN, so that an unwritten element is noticed."""

    def poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def allocate_nan(*args: Any, **kwargs: Any) -> torch.Tensor:
            fresh = allocate(*args, **kwargs)
            # torch.compile must trace the original call
            if torch.compiler.is_compiling() or not fresh.is_floating_point():
                return fresh
            return fresh.fill_(float("nan"))

        return allocate_nan

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


@pytest.fixture
def float64_by_default() -> Callable[[], AbstractContextManager[None]]:
    """A context in which the default dtype of new tensors is float64."""

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
    # Triton chooses compiler or interpreter when it is imported: a process has only one of them
    return ["triton"] if os.environ.get("TRITON_INTERPRET") == "1" else ["cpu"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "kernel" in metafunc.fixturenames:
        metafunc.parametrize("kernel", kernel_backends())


@pytest.fixture
def kernel_device(kernel: str) -> torch.device:
    """The device of tensors for the backend `kernel`."""
    return torch.device("cuda" if kernel == "triton" and torch.cuda.is_available() else "cpu")


class _NoSync(TorchDispatchMode):
    """Fails on operations that synchronise with a device: their values or shapes depend on data.

    `lift_fresh` is one of them: it copies a tensor of Python numbers to the device at once.
    """

    SYNCHRONISING = (
        torch.ops.aten._local_scalar_dense,
        torch.ops.aten.lift_fresh,
        torch.ops.aten.nonzero,
        torch.ops.aten.masked_select,
        torch.ops.aten.equal,
        torch.ops.aten.unique_dim,
        torch.ops.aten._unique2,
    )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket not in self.SYNCHRONISING, f"{func} synchronises with the device"
        if func.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put_):
            assert all(index is None or index.dtype != torch.bool for index in args[1])
        return func(*args, **(kwargs or {}))


@pytest.fixture
def no_sync() -> type[_NoSync]:
    """A context in which an operation that synchronises with a device fails."""
    return _NoSync
