"""Triton twin of the weighted KL divergences of normals, float32, forward and backward.

The formula is that of `spairkit.kernels.normal_kl_cpu`. Forward, one program sums an image; the
backward pass has a program for each few cells.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from spairkit.kernels.launch import on

KL_BLOCK, KL_ROWS, KL_COLUMNS, KL_WARPS = 512, 16, 64, 4


@triton.jit
def _divergence(ratio, distance):
    return 0.5 * (ratio * ratio + distance * distance - 1.0) - tl.log(ratio)


@triton.jit
def _weighted_kls_kernel(
    mean_ptr,  # [B, K, M]
    std_ptr,  # [B, K, M]
    weight_ptr,  # [B, K]
    priors_ptr,  # [3, M] means, stds, and the number of the group
    sums_ptr,  # [B, G] to be filled
    num_cells,
    size,  # M
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    mean_ptr += b * num_cells * size
    std_ptr += b * num_cells * size
    for g in tl.static_range(GROUPS):
        total = tl.zeros([BLOCK], tl.float32)
        begin = 0
        while begin < num_cells * size:
            i = begin + tl.arange(0, BLOCK)
            m = i % size
            here = i < num_cells * size
            here = here & (tl.load(priors_ptr + 2 * size + m, mask=here, other=-1.0) == g)
            prior_mean = tl.load(priors_ptr + m, mask=here, other=0.0)
            prior_std = tl.load(priors_ptr + size + m, mask=here, other=1.0)
            distance = (tl.load(mean_ptr + i, mask=here, other=0.0) - prior_mean) / prior_std
            ratio = tl.load(std_ptr + i, mask=here, other=1.0) / prior_std
            weight = tl.load(weight_ptr + b * num_cells + i // size, mask=here, other=0.0)
            total += tl.where(here, weight * _divergence(ratio, distance), 0.0)
            begin += BLOCK
        tl.store(sums_ptr + b * GROUPS + g, tl.sum(total, 0))


@triton.jit
def _weighted_kls_backward_kernel(
    grad_sums_ptr,  # [B, G]
    mean_ptr,
    std_ptr,
    weight_ptr,
    priors_ptr,
    grad_mean_ptr,  # [B, K, M] to be filled, as are the next two
    grad_std_ptr,
    grad_weight_ptr,  # [B, K]
    num_rows,  # B K
    num_cells,
    size,  # M
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = r < num_rows
    weight = tl.load(weight_ptr + r, mask=exists, other=0.0)
    total = tl.zeros([ROWS], tl.float32)
    begin = 0
    while begin < size:
        m = begin + tl.arange(0, COLUMNS)
        inside = m < size
        mask = exists[:, None] & inside[None, :]
        prior_mean = tl.load(priors_ptr + m, mask=inside, other=0.0)[None, :]
        prior_std = tl.load(priors_ptr + size + m, mask=inside, other=1.0)[None, :]
        group = tl.load(priors_ptr + 2 * size + m, mask=inside, other=0.0).to(tl.int32)
        grad = grad_sums_ptr + (r // num_cells * GROUPS)[:, None] + group[None, :]
        grad = tl.load(grad, mask=mask, other=0.0)
        place = (r * size)[:, None] + m[None, :]
        distance = (tl.load(mean_ptr + place, mask=mask, other=0.0) - prior_mean) / prior_std
        ratio = tl.load(std_ptr + place, mask=mask, other=1.0) / prior_std
        total += tl.sum(tl.where(mask, grad * _divergence(ratio, distance), 0.0), 1)
        slope = grad * weight[:, None] / prior_std
        tl.store(grad_mean_ptr + place, slope * distance, mask=mask)
        tl.store(grad_std_ptr + place, slope * (ratio - 1.0 / ratio), mask=mask)
        begin += COLUMNS
    tl.store(grad_weight_ptr + r, total, mask=exists)


def weighted_kls_triton(
    mean: Tensor, std: Tensor, weight: Tensor, *groups: tuple[int, float, float]
) -> Tensor:  # [B, G]
    """Divergences in nats of groups: number of dimensions, mean and std of their prior."""
    batch, num_cells, size = mean.shape
    sums = mean.new_empty(batch, len(groups))
    priors = _priors(groups, mean.device)
    if batch:
        with on(mean.device):
            _weighted_kls_kernel[(batch,)](
                mean.contiguous(), std.contiguous(), weight.contiguous(), priors, sums, num_cells,
                size, GROUPS=len(groups), BLOCK=KL_BLOCK, num_warps=KL_WARPS,
            )  # fmt: skip
    return sums


def weighted_kls_backward_triton(
    grad_sums: Tensor, sums: Tensor, mean: Tensor, std: Tensor, weight: Tensor,
    *groups: tuple[int, float, float],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of mean, std and weight."""
    batch, num_cells, size = mean.shape
    grads = mean.new_empty(mean.shape), mean.new_empty(mean.shape), mean.new_empty(weight.shape)
    rows = batch * num_cells
    if rows:
        with on(mean.device):
            _weighted_kls_backward_kernel[(triton.cdiv(rows, KL_ROWS),)](
                grad_sums.contiguous(), mean.contiguous(), std.contiguous(), weight.contiguous(),
                _priors(groups, mean.device), *grads, rows, num_cells, size, GROUPS=len(groups),
                ROWS=KL_ROWS, COLUMNS=KL_COLUMNS, num_warps=KL_WARPS,
            )  # fmt: skip
    return grads


@cache  # without limit: a recorded CUDA graph reads from their addresses
@torch.inference_mode(False)  # the cache outlives the mode
def _priors(groups: tuple[tuple[int, float, float], ...], device: torch.device) -> Tensor:
    rows = [(mean, std, g) for g, (size, mean, std) in enumerate(groups) for _ in range(size)]
    return torch.tensor(rows, dtype=torch.float32, device=device).t().contiguous()
