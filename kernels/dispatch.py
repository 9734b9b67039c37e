"""Operators of torch that call their kernel directly where nothing needs torch's dispatcher."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


def registered(name: str, kernel: Callable[..., Any]) -> tuple[Any, Callable[..., Any]]:
    """Registers a kernel with torch: the operator, and a function that calls it where needed.

    The function calls the kernel directly if nothing records a gradient or traces the call. The
    first call of a custom operator imports torch's compiler, which takes a second, and a process
    that only detects objects never needs it.
    """
    operator = torch.library.custom_op(name, mutates_args=())(kernel)

    @functools.wraps(kernel)
    def call(*arguments: Any) -> Any:
        return operator(*arguments) if _is_watched(arguments) else kernel(*arguments)

    return operator, call


def _is_watched(arguments: Iterable[Any]) -> bool:
    """Whether autograd, a compiler or another tracer has to see the call."""
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return True
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return True
    # subclasses and forward-mode derivatives, which the operator serves or refuses
    return any(
        type(tensor) not in (Tensor, torch.nn.Parameter) or unpack_dual(tensor).tangent is not None
        for tensor in tensors
    )
