"""Implementations of an operator, kernels as functions with gradients, precision of GPUs."""

import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Backend = Literal["auto", "torch", "cpu", "triton"]
"""`torch`: plain torch, any device and dtype. `cpu`: Numba. `triton`: Triton on a GPU, or its
interpreter on the CPU if TRITON_INTERPRET=1 is in the environment. `auto`: chosen by device."""

Precision = Literal["float32", "tf32", "bf16"]
"""Values of `train.precision`. With bf16, products that stay float32 are exact float32."""

# the older flag of torch, and the newer settings that it covers
_PRODUCTS: tuple[tuple[Any, tuple[Any, ...]], ...] = (
    (torch.backends.cuda.matmul, (torch.backends.cuda.matmul,)),
    (
        torch.backends.cudnn,
        (torch.backends.cudnn.conv, torch.backends.cudnn.rnn),  # type: ignore[attr-defined]
    ),
)

_PRECISION_LOCK = threading.RLock()
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # read once, as Triton does
_tried: dict[str, bool] = {}


def chosen_backend(
    backend: Backend, tensor: Tensor, name: str
) -> Literal["torch", "cpu", "triton"]:
    """The implementation for `tensor`, which error messages call `name`.

    "auto" is Triton on a GPU, Numba on the CPU, and plain torch for float64 and other devices. If
    Triton or Numba is missing or broken it is plain torch too, after one warning.

    Raises:
        ValueError: the backend is unknown, or cannot run on the device or dtype of `tensor`.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {', '.join(get_args(Backend))}, got {backend!r}")
    device = tensor.device.type
    natural: Literal["torch", "cpu", "triton"] = "torch"
    if device == "cpu":
        natural = "cpu"
    elif device == "cuda":
        natural = "triton"
    if backend == "torch":
        return "torch"
    if backend == "auto":
        if natural == "torch" or tensor.dtype == torch.float64 or not _works(natural):
            return "torch"
        return natural
    if tensor.dtype == torch.float64:
        raise ValueError(
            f"{name} is float64, which backend {backend!r} does not support: use backend='torch'"
        )
    if backend != natural and not (backend == "triton" and device == "cpu" and _INTERPRETED):
        rule = "the CPU" if backend == "cpu" else "a GPU (or start with TRITON_INTERPRET=1)"
        raise ValueError(f"backend {backend!r} needs {name} on {rule}, got {tensor.device}")
    return backend


def runs_compiled(*tensors: Tensor) -> bool:
    """Whether functions other than the operators use Numba for these tensors.

    True for float32 on the CPU, but not while tracing: the compiler fuses them by itself.
    """
    if torch.compiler.is_compiling():
        return False
    if any(tensor.device.type != "cpu" or tensor.dtype != torch.float32 for tensor in tensors):
        return False
    return chosen_backend("auto", tensors[0], "tensors") == "cpu"


def compiled_backend(backend: Backend, *tensors: Tensor) -> Literal["torch", "cpu", "triton"]:
    """The implementation of training's functions other than the operators.

    "auto" is Numba for float32 on the CPU, and plain torch elsewhere: their Triton kernels were
    never run on a GPU, so there "triton" has to be named. Plain torch also serves tracing, and
    tensors that are not all float32 on one device.

    Raises:
        ValueError: as `chosen_backend`.
    """
    if backend == "auto":
        return "cpu" if runs_compiled(*tensors) else "torch"
    if torch.compiler.is_compiling():
        return "torch"
    chosen = chosen_backend(backend, tensors[0], "the first tensor")
    here = tensors[0].device
    fits = all(tensor.device == here and tensor.dtype == torch.float32 for tensor in tensors)
    return chosen if fits else "torch"


def _works(backend: Literal["cpu", "triton"]) -> bool:
    """Whether the backend can be used; tried once in each process."""
    if backend not in _tried:
        if torch.compiler.is_compiling():
            return True  # a trial cannot be traced; a broken backend raises when it runs
        _tried[backend] = _try(backend)
    return _tried[backend]


def _try(backend: Literal["cpu", "triton"]) -> bool:
    try:
        if backend == "cpu":
            from spairkit.kernels.threads import probe
        else:
            from spairkit.kernels.launch import probe
        probe()
    # a broken installation may raise anything, and plain torch still works
    except Exception as error:
        package = "numba" if backend == "cpu" else "triton"
        warnings.warn(
            f"{package} does not work here: {type(error).__name__}: {error}. spairkit uses plain "
            "torch instead, which is many times slower; reinstalling the package may help.",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


def fused(
    forward: Callable[..., Tensor],
    backward: Callable[..., tuple[Tensor | None, ...]],
    inputs: tuple[Tensor, ...],
    constants: tuple[Any, ...] = (),
) -> Tensor:
    """`forward(*inputs, *constants)` with a gradient; a second derivative raises RuntimeError.

    Args:
        forward: the kernel.
        backward: a kernel from the gradient of the value, the value, inputs and constants to the
            gradients of all inputs, None for an input without one.
        inputs: tensors. `backward` must return a gradient for each that requires one.
        constants: arguments that are not tensors.
    """
    value: Tensor = _Fused.apply(forward, backward, constants, *inputs)  # type: ignore[no-untyped-call]
    return value


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        forward: Callable[..., Tensor],
        backward: Callable[..., tuple[Tensor | None, ...]],
        constants: tuple[Any, ...],
        *inputs: Tensor,
    ) -> Tensor:
        value = forward(*inputs, *constants)
        ctx.kernel, ctx.constants = backward, constants
        ctx.save_for_backward(value, *inputs)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("compiled functions have no second derivatives: use float64")
        value, *inputs = ctx.saved_tensors
        return None, None, None, *ctx.kernel(grad, value, *inputs, *ctx.constants)


def set_precision(precision: Precision, device: torch.device) -> None:
    """Sets the precision of float32 products on a GPU, and makes convolutions deterministic.

    Torch's older flags, `allow_tf32`, and its newer settings, `fp32_precision`, are set alike:
    reading a flag that contradicts the setting raises.
    """
    if device.type == "cuda":
        _ignore_age_of_flags()
        torch.backends.cudnn.deterministic = True
        # torch's default is tf32 for convolutions only
        for flag, settings in _PRODUCTS:
            flag.allow_tf32 = precision == "tf32"
            for products in settings:
                products.fp32_precision = "tf32" if precision == "tf32" else "ieee"


@contextmanager
def computing_in(precision: Precision, device: torch.device) -> Iterator[None]:
    """`set_precision` inside a `with` block; the earlier settings are restored.

    The settings are torch's own for the whole process, so one thread at a time is inside. For
    devices other than GPUs nothing is set.
    """
    if device.type != "cuda":
        yield
        return
    with _PRECISION_LOCK:
        _ignore_age_of_flags()
        deterministic = torch.backends.cudnn.deterministic
        before = [
            (flag, _allows_tf32(flag), [(products, products.fp32_precision) for products in some])
            for flag, some in _PRODUCTS
        ]
        set_precision(precision, device)
        try:
            yield
        finally:
            torch.backends.cudnn.deterministic = deterministic
            for flag, allowed, settings in before:
                if allowed is not None:
                    flag.allow_tf32 = allowed
                for products, value in settings:
                    products.fp32_precision = value


@cache
def _ignore_age_of_flags() -> None:
    """Torch 2.9 warns at each process's first use of the older flags."""
    message = "Please use the new API settings to control TF32"
    warnings.filterwarnings("ignore", message=message, category=UserWarning)


def _allows_tf32(flag: Any) -> bool | None:
    """An older flag of torch; None where it contradicts the newer settings and cannot be read."""
    try:
        return bool(flag.allow_tf32)
    except RuntimeError:
        return None
