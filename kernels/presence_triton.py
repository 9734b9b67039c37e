"""Triton twins of the presence prior, which `spairkit.presence` explains.

Hard samples: one program walks the cells of one image, block by block, and sums over the counts of
all cells of a block at once. Relaxed samples: one program walks the cells of one image with the
log-weights of all counts in registers, and a second one walks back. Both take O(n) memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from spairkit.kernels.constants import (
    IMPOSSIBLE,
    LARGE_SUM,
    MIN_PROBABILITY,
    NEGLIGIBLE_SHARE,
)
from spairkit.kernels.launch import on
from spairkit.kernels.presence_blocks import saved_shape, walk_block

_TERMS = 8  # summed between two looks at whether the rest matters
_IMPOSSIBLE = tl.constexpr(IMPOSSIBLE)
_LEAST = tl.constexpr(MIN_PROBABILITY)
_LARGE = tl.constexpr(LARGE_SUM)
_SMALL = tl.constexpr(1.0 / LARGE_SUM)
_SHARE = tl.constexpr(NEGLIGIBLE_SHARE)


@triton.jit
def _summed_odds(failure, cell, m, num_cells, exists, BLOCK: tl.constexpr, TERMS: tl.constexpr):
    """[BLOCK] float64 odds of cells after m objects, each by the quotient of two sums."""
    open_after = tl.where(exists, num_cells - cell - 1, 0).to(tl.float64)
    empty = tl.where(exists, num_cells - m, 2).to(tl.float64)
    objects = m.to(tl.float64)
    one = tl.full([BLOCK], 1.0, tl.float64)
    without, with_it, term, term_with = one, one, one, one
    start = 0
    matters = tl.max((open_after > 0).to(tl.int32), 0)
    while matters > 0:
        for following in range(TERMS):
            j = start + following
            exists_here = j < open_after
            share = failure * (open_after - j) / (j + 1)
            left = tl.where(exists_here, empty - j, 2.0)
            term = tl.where(exists_here, term * (share * (objects + (j + 1)) / left), 0.0)
            # after m + 1 objects one cell more is full, and one fewer is left to fill
            ratio = share * (objects + (j + 2)) / (left - 1.0)
            term_with = tl.where(exists_here, term_with * ratio, 0.0)
            without += term
            with_it += term_with
        start += TERMS
        rest = open_after - start
        more = (term * rest > without * _SHARE) | (term_with * rest > with_it * _SHARE)
        matters = tl.max(more.to(tl.int32), 0)
        scale = tl.where(with_it > _LARGE, one * _SMALL, one)
        term *= scale
        term_with *= scale
        without *= scale
        with_it *= scale
    return failure * (objects + 1.0) / empty * (with_it / without)


@triton.jit
def _presence_kl_kernel(
    logits_ptr,  # [B, n]
    samples_ptr,  # [B, n]
    success_ptr,  # [] float64
    kl_ptr,  # [B, n] float32
    prior_logit_ptr,  # [B, n] float64
    num_cells,
    BLOCK: tl.constexpr,
    TERMS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * num_cells
    success = tl.load(success_ptr)
    failure = tl.where((success > 0) & (success < 1), 1.0 - success, float("nan"))
    before, unknown = 0, 0
    start = 0
    while start < num_cells:
        k = start + tl.arange(0, BLOCK)
        exists = k < num_cells
        sample = tl.load(samples_ptr + row + k, mask=exists, other=0.0).to(tl.float32)
        present = (sample > 0.5).to(tl.int32)
        nan = (sample != sample).to(tl.int32)
        m = before + tl.cumsum(present, 0) - present
        poisoned = unknown + tl.cumsum(nan, 0) > 0
        odds = _summed_odds(failure, k, m, num_cells, exists, BLOCK, TERMS)
        prior_logit = tl.where(poisoned, float("nan"), tl.log(odds))
        logit = tl.load(logits_ptr + row + k, mask=exists, other=0.0).to(tl.float32)
        logit = logit.to(tl.float64)
        e = tl.exp(-tl.abs(logit))
        on = tl.where(logit >= 0, 1.0, e) / (1.0 + e)
        off = tl.where(logit >= 0, e, 1.0) / (1.0 + e)
        at_least_0 = tl.where(logit < 0, 0.0, logit)
        negative_entropy = on * (logit - at_least_0) - off * at_least_0 - tl.log(1.0 + e)
        kl = negative_entropy - on * prior_logit + tl.log(1.0 + odds)
        tl.store(kl_ptr + row + k, kl.to(tl.float32), mask=exists)
        tl.store(prior_logit_ptr + row + k, prior_logit, mask=exists)
        before += tl.sum(present, 0)
        unknown += tl.sum(nan, 0)
        start += BLOCK


@triton.jit
def _shares(counts, before, num_open):
    """[BLOCK, COUNTS] probability of on and of off given `counts`, and whether neither is clipped.

    `before` is float64. The rest is split into whole numbers and a part below 1, which is small
    where the probability is: float32 then loses nothing near 0 and 1.
    """
    whole = tl.floor(before)
    broken = (before - whole).to(tl.float32)[:, None]
    rest = (1.0 - (before - whole)).to(tl.float32)[:, None]
    left = counts[None, :] - whole.to(tl.float32)[:, None]
    cells = tl.maximum(num_open, 1).to(tl.float32)[:, None]
    on = tl.where(left > 0, (left - 1) + rest, left - broken) / cells
    off = tl.where(left > cells, ((cells - left) + 1) - rest, (cells - left) + broken) / cells
    between = (on >= 0) & (off >= 0)
    on = tl.where(on < 0, 0.0, tl.where(off < 0, 1.0, on))
    off = tl.where(off < 0, 0.0, tl.where(on == 0, 1.0, off))
    return on, off, between


@triton.jit
def _likelihoods(counts, before, num_open, sample, walked):
    """[BLOCK, COUNTS] likelihood of a cell's sample, its log, on - off, and `between`."""
    on, off, between = _shares(counts, before, num_open)
    likelihood = sample[:, None] * on + (1.0 - sample[:, None]) * off
    impossible = likelihood <= 0
    log = tl.where(impossible, _IMPOSSIBLE, tl.log(tl.where(impossible, 1.0, likelihood)))
    return likelihood, tl.where(walked[:, None], log, 0.0), on - off, between


@triton.jit
def _posterior(belief, log, on, off):
    """[BLOCK, COUNTS] weights of the counts, and [BLOCK] the probability of on and of off."""
    weights = belief[None, :] + tl.cumsum(log, 0)
    weight = tl.exp(weights - tl.max(weights, 1)[:, None])
    weight = weight / tl.sum(weight, 1)[:, None]
    return weight, tl.sum(weight * on, 1), tl.sum(weight * off, 1)


@triton.jit
def _count_posterior_kernel(
    samples_ptr,  # [B, n] float32
    success_ptr,  # [] float64
    prior_logit_ptr,  # [B, n] float64
    saved_ptr,  # [B, blocks, COUNTS] float32, log-weights at the start of each block
    num_cells,
    COUNTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    row = b * num_cells
    blocks = (num_cells + BLOCK - 1) // BLOCK
    c = tl.arange(0, COUNTS)
    counts = c.to(tl.float32)
    # float64: a count that is unlikely now may be the only one left in the end
    belief = c.to(tl.float64) * tl.log(1.0 - tl.load(success_ptr))
    belief = tl.where(c <= num_cells, belief, _IMPOSSIBLE)
    seen = tl.sum(tl.zeros([BLOCK], tl.float64), 0)
    start = 0
    while start < num_cells:
        shifted = (belief - tl.max(belief, 0)).to(tl.float32)
        shifted = tl.where(shifted < _IMPOSSIBLE, _IMPOSSIBLE, shifted)
        tl.store(saved_ptr + (b * blocks + start // BLOCK) * COUNTS + c, shifted)
        # each row conditions on the cell before it, so no log-weight has to be undone
        k = start + tl.arange(0, BLOCK)
        walked = (k >= 1) & (k <= num_cells)
        sample = tl.load(samples_ptr + row + k - 1, mask=walked, other=0.0)
        before = seen + tl.cumsum(sample.to(tl.float64), 0)
        on, off, _between = _shares(counts, before, num_cells - k)
        _likelihood, log, _difference, _between = _likelihoods(
            counts, before - sample.to(tl.float64), num_cells - k + 1, sample, walked
        )
        _weight, chance, rest = _posterior(shifted, log, on, off)
        chance = tl.where(chance < _LEAST, _LEAST, chance)
        rest = tl.where(rest < _LEAST, _LEAST, rest)
        prior_logit = (tl.log(chance) - tl.log(rest)).to(tl.float64)
        tl.store(prior_logit_ptr + row + k, prior_logit, mask=k < num_cells)
        belief += tl.sum(log, 0).to(tl.float64)
        belief = tl.where(belief < _IMPOSSIBLE, _IMPOSSIBLE, belief)
        seen += tl.sum(sample.to(tl.float64), 0)
        start += BLOCK


@triton.jit
def _count_posterior_backward_kernel(
    grad_logit_ptr,  # [B, n] float64
    samples_ptr,  # [B, n] float32
    saved_ptr,  # [B, blocks, COUNTS] float32
    grad_samples_ptr,  # [B, n] float32
    grad_log_failure_ptr,  # [B] float64
    num_cells,
    COUNTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    row = b * num_cells
    blocks = (num_cells + BLOCK - 1) // BLOCK
    c = tl.arange(0, COUNTS)
    counts = c.to(tl.float32)
    r = tl.arange(0, BLOCK)
    seen = tl.sum(tl.zeros([BLOCK], tl.float64), 0)
    start = 0
    while start < num_cells:
        k = start + r
        sample = tl.load(samples_ptr + row + k - 1, mask=(k >= 1) & (k <= num_cells), other=0.0)
        seen += tl.sum(sample.to(tl.float64), 0)
        start += BLOCK
    tail = tl.zeros([COUNTS], tl.float32)  # gradient of the log-weights after the block
    later = tl.sum(tl.zeros([BLOCK], tl.float32), 0)  # of the number before any later cell
    start -= BLOCK
    while start >= 0:
        shifted = tl.load(saved_ptr + (b * blocks + start // BLOCK) * COUNTS + c)
        k = start + r
        walked = (k >= 1) & (k <= num_cells)
        exists = k < num_cells
        sample = tl.load(samples_ptr + row + k - 1, mask=walked, other=0.0)
        seen -= tl.sum(sample.to(tl.float64), 0)
        before = seen + tl.cumsum(sample.to(tl.float64), 0)
        on, off, between = _shares(counts, before, num_cells - k)
        likelihood, log, difference, was_between = _likelihoods(
            counts, before - sample.to(tl.float64), num_cells - k + 1, sample, walked
        )
        weight, chance, rest = _posterior(shifted, log, on, off)
        grad = tl.load(grad_logit_ptr + row + k, mask=exists, other=0.0).to(tl.float32)
        # a probability below the floor is a constant
        grad_on = tl.where(chance < _LEAST, 0.0, grad / tl.where(chance < _LEAST, 1.0, chance))
        grad_off = tl.where(rest < _LEAST, 0.0, -grad / tl.where(rest < _LEAST, 1.0, rest))
        common = grad_on * chance + grad_off * rest
        grad_weights = weight * (grad_on[:, None] * on + grad_off[:, None] * off - common[:, None])
        # of the log-weights at row k, from rows k and later
        grad_belief = tl.cumsum(grad_weights, 0, reverse=True) + tail[None, :]
        tail += tl.sum(grad_weights, 0)
        possible = walked[:, None] & (likelihood > 0)
        grad_likelihood = tl.where(possible, grad_belief / tl.where(possible, likelihood, 1.0), 0.0)
        grad_sample = tl.sum(grad_likelihood * difference, 1)
        slope = (grad_off - grad_on)[:, None] * weight
        cells = tl.maximum(num_cells - k, 1).to(tl.float32)
        grad_before = tl.sum(tl.where(between, slope, 0.0), 1) / cells
        slope = grad_likelihood * (1.0 - 2.0 * sample)[:, None]
        cells = tl.maximum(num_cells - k + 1, 1).to(tl.float32)
        grad_was_before = tl.sum(tl.where(was_between, slope, 0.0), 1) / cells
        # the number before cell j counts every sample before j; row k holds the sample of k - 1
        both = grad_before + grad_was_before
        grad_sample += later + tl.cumsum(both, 0, reverse=True) - grad_was_before
        later += tl.sum(both, 0)
        tl.store(grad_samples_ptr + row + k - 1, grad_sample, mask=walked)
        start -= BLOCK
    if num_cells % BLOCK == 0:
        # no row conditions on the last cell, and no cell follows it
        tl.store(grad_samples_ptr + row + num_cells - 1, 0.0)
    tl.store(grad_log_failure_ptr + b, tl.sum(tail * counts, 0).to(tl.float64))


def kl_block(num_cells: int) -> dict[str, int]:
    """Constants of the kernel of hard samples: cells of a block, and terms summed at a time."""
    block = min(256, max(32, int(triton.next_power_of_2(num_cells))))
    return {"BLOCK": block, "TERMS": _TERMS, "num_warps": max(1, block // 64)}


def presence_kl_triton(logits: Tensor, samples: Tensor, success: Tensor) -> tuple[Tensor, Tensor]:
    """KL in nats, float32, and log-odds of the prior, float64, both [B, n], of hard samples."""
    num_images, num_cells = samples.shape
    device = samples.device
    kl = torch.empty(samples.shape, device=device, dtype=torch.float32)
    prior_logit = torch.empty(samples.shape, device=device, dtype=torch.float64)
    if samples.numel():
        with on(device):
            _presence_kl_kernel[(num_images,)](
                logits.contiguous(), samples.contiguous(), success, kl, prior_logit, num_cells,
                **kl_block(num_cells),
            )  # fmt: skip
    return kl, prior_logit


def count_posterior_triton(samples: Tensor, success: Tensor) -> tuple[Tensor, Tensor]:
    """[B, n] float64 log-odds of the prior of relaxed samples, and log-weights for the backward."""
    num_images, num_cells = samples.shape
    device = samples.device
    prior_logit = torch.empty(samples.shape, device=device, dtype=torch.float64)
    saved = torch.empty(saved_shape(num_images, num_cells), device=device, dtype=torch.float32)
    counts, block, warps = walk_block(num_cells)
    if samples.numel():
        with on(device):
            _count_posterior_kernel[(num_images,)](
                samples.float().contiguous(), success, prior_logit, saved, num_cells,
                COUNTS=counts, BLOCK=block, num_warps=warps,
            )  # fmt: skip
    return prior_logit, saved


def count_posterior_backward_triton(
    grad_logit: Tensor, samples: Tensor, saved: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the samples [B, n], and of log(1 - success) for each image [B]."""
    num_images, num_cells = samples.shape
    grad_samples = torch.empty(samples.shape, device=samples.device, dtype=torch.float32)
    grad_log_failure = torch.zeros(num_images, device=samples.device, dtype=torch.float64)
    counts, block, warps = walk_block(num_cells)
    if samples.numel():
        with on(samples.device):
            _count_posterior_backward_kernel[(num_images,)](
                grad_logit.contiguous(), samples.float().contiguous(), saved.contiguous(),
                grad_samples, grad_log_failure, num_cells,
                COUNTS=counts, BLOCK=block, num_warps=warps,
            )  # fmt: skip
    return grad_samples, grad_log_failure
