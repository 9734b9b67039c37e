"""Functions of tensors that compiled kernels take over from plain torch, gradients included.

In plain torch each is a chain of small operations; autograd records every one, and every one
fills fresh memory.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


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
