"""Which implementation of an operator runs, and compiled kernels as functions with a gradient."""

import os
import warnings
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Backend = Literal["auto", "torch", "cpu", "triton"]
"""`torch`: plain torch, any device and dtype. `cpu`: Numba. `triton`: GPUs, or, with
TRITON_INTERPRET=1 in the environment, CPU tensors. `auto`: by device."""

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton too reads it once, at import
_tried: dict[str, bool] = {}


def chosen_backend(
    backend: Backend, tensor: Tensor, name: str
) -> Literal["torch", "cpu", "triton"]:
    """The implementation for `tensor`, which errors call `name`.

    "auto" takes Triton on a GPU and Numba on the CPU, plain torch for float64 and elsewhere, and
    also, after one warning, where Triton or Numba is missing or broken.

    Raises:
        ValueError: no such backend, or one that cannot run on the device or dtype of `tensor`.
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
        raise ValueError(f"{name} must not be float64 on backend {backend!r}: use 'torch'")
    if backend != natural and not (backend == "triton" and device == "cpu" and _INTERPRETED):
        rule = "the CPU" if backend == "cpu" else "a GPU, or TRITON_INTERPRET=1 before the start"
        raise ValueError(f"backend {backend!r} needs {name} on {rule}, got {tensor.device}")
    return backend


def runs_compiled(*tensors: Tensor) -> bool:
    """Whether Numba computes what there is to compute of these tensors, beside the operators.

    It does for float32 on the CPU, but not in a trace: the compiler that traces fuses by itself.
    """
    if torch.compiler.is_compiling():
        return False
    if any(tensor.device.type != "cpu" or tensor.dtype != torch.float32 for tensor in tensors):
        return False
    return chosen_backend("auto", tensors[0], "tensors") == "cpu"


def _works(backend: Literal["cpu", "triton"]) -> bool:
    """Whether the backend can be used: it is tried out once in a process."""
    if backend not in _tried:
        if torch.compiler.is_compiling():
            return True  # no trace goes through a trial; if this is wrong the operator raises
        _tried[backend] = _try(backend)
    return _tried[backend]


def _try(backend: Literal["cpu", "triton"]) -> bool:
    try:
        if backend == "cpu":
            from spairkit.kernels.threads import probe
        else:
            from spairkit.kernels.launch import probe
        probe()
    # a broken installation fails in its own way: whatever it raises, plain torch still works
    except Exception as error:
        package = "numba" if backend == "cpu" else "triton"
        warnings.warn(
            f"{package} does not work here, so spairkit's operators run in plain torch, many "
            f"times slower: {type(error).__name__}: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


def fused(
    plain: Callable[..., Tensor],
    forward: Callable[..., Tensor],
    backward: Callable[..., tuple[Tensor | None, ...]],
    inputs: tuple[Tensor, ...],
    constants: tuple[Any, ...] = (),
) -> Tensor:
    """What `forward(*inputs, *constants)` gives, as autograd sees it.

    Args:
        plain: the same in plain torch. It gives the gradients where they are to be derived in turn.
        forward: a kernel.
        backward: a kernel that takes the gradient of the value, the value, inputs and constants,
            and gives the gradient of each input; None for one that has none.
        inputs: those that require gradients must be among the ones that `backward` gives.
        constants: what is no tensor.
    """
    value: Tensor = _Fused.apply(  # type: ignore[no-untyped-call]
        plain, forward, backward, constants, *inputs
    )
    return value


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        plain: Callable[..., Tensor],
        forward: Callable[..., Tensor],
        backward: Callable[..., tuple[Tensor | None, ...]],
        constants: tuple[Any, ...],
        *inputs: Tensor,
    ) -> Tensor:
        value = forward(*inputs, *constants)
        ctx.plain, ctx.kernel, ctx.constants = plain, backward, constants
        ctx.save_for_backward(value, *inputs)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        value, *inputs = ctx.saved_tensors
        if torch.is_grad_enabled():
            grads = _differentiable(ctx.plain, inputs, ctx.constants, grad)
        else:
            grads = ctx.kernel(grad, value, *inputs, *ctx.constants)
        return None, None, None, None, *grads


def _differentiable(
    plain: Callable[..., Tensor], inputs: list[Tensor], constants: tuple[Any, ...], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients of the inputs, with a record of how they came about."""
    wanted = [x for x in inputs if x.requires_grad]
    grads = torch.autograd.grad(plain(*inputs, *constants), wanted, grad, create_graph=True)
    found = iter(grads)
    return tuple(next(found) if x.requires_grad else None for x in inputs)
