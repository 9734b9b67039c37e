"""Fixtures for all tests: fresh memory is NaN, and kernels run where this machine can run them."""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

# Triton warns, once a compile, that its default will change; the gate counts registers under this
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


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
