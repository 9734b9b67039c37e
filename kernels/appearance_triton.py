"""Triton twin of `scaled_squash`, float32: the sigmoid of scaled and clipped logits."""

import triton
import triton.language as tl
from torch import Tensor

from spairkit.kernels.constants import LOGIT_LIMIT
from spairkit.kernels.launch import on

SQUASH_BLOCK, SQUASH_WARPS = 1024, 4
_LIMIT = tl.constexpr(LOGIT_LIMIT)


@triton.jit
def _squash_kernel(
    logits_ptr,  # [R, n]
    scale_ptr,  # [n]
    bias_ptr,  # [n]
    values_ptr,  # [R, n] to be filled
    total,  # R n
    size,  # n
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists, k = i < total, i % size
    scale = tl.load(scale_ptr + k, mask=exists, other=0.0)
    bias = tl.load(bias_ptr + k, mask=exists, other=0.0)
    logit = tl.load(logits_ptr + i, mask=exists, other=0.0) * scale + bias
    logit = tl.where(logit > _LIMIT, _LIMIT, tl.where(logit < -_LIMIT, -_LIMIT, logit))
    tl.store(values_ptr + i, 1.0 / (1.0 + tl.exp(-logit)), mask=exists)


@triton.jit
def _squash_backward_kernel(
    grad_values_ptr,  # [R, n]
    values_ptr,
    logits_ptr,
    scale_ptr,
    bias_ptr,
    grad_logits_ptr,  # [R, n] to be filled
    total,
    size,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists, k = i < total, i % size
    scale = tl.load(scale_ptr + k, mask=exists, other=0.0)
    bias = tl.load(bias_ptr + k, mask=exists, other=0.0)
    logit = tl.load(logits_ptr + i, mask=exists, other=0.0) * scale + bias
    value = tl.load(values_ptr + i, mask=exists, other=0.0)
    slope = tl.where(tl.abs(logit) <= _LIMIT, value * (1.0 - value) * scale, 0.0)
    grad = tl.load(grad_values_ptr + i, mask=exists, other=0.0)
    tl.store(grad_logits_ptr + i, grad * slope, mask=exists)


def squash_triton(logits: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """squash(logits * scale + bias), where scale and bias have the last axes of the logits."""
    values, total = logits.new_empty(logits.shape), logits.numel()
    if total:
        with on(logits.device):
            _squash_kernel[(triton.cdiv(total, SQUASH_BLOCK),)](
                logits.contiguous(), scale.contiguous(), bias.contiguous(), values, total,
                scale.numel(), BLOCK=SQUASH_BLOCK, num_warps=SQUASH_WARPS,
            )  # fmt: skip
    return values


def squash_backward_triton(
    grad_values: Tensor, values: Tensor, logits: Tensor, scale: Tensor, bias: Tensor
) -> tuple[Tensor, None, None]:
    """The gradient of the logits, and None for scale and bias."""
    grad_logits, total = logits.new_empty(logits.shape), logits.numel()
    if total:
        with on(logits.device):
            _squash_backward_kernel[(triton.cdiv(total, SQUASH_BLOCK),)](
                grad_values.contiguous(), values, logits.contiguous(), scale.contiguous(),
                bias.contiguous(), grad_logits, total, scale.numel(), BLOCK=SQUASH_BLOCK,
                num_warps=SQUASH_WARPS,
            )  # fmt: skip
    return grad_logits, None, None
