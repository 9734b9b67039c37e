"""Numba twins of the presence prior, which `spairkit.presence` explains; float64 inside.

Hard samples read a table of odds or, in images of many cells, sum the odds of each cell. Relaxed
ones walk the cells with the posterior over the count in log space, and the gradients walk back.
"""

import functools
import math

import numpy as np
import torch
from torch import Tensor

from spairkit.kernels.constants import LARGE_SUM, MIN_PROBABILITY, NEGLIGIBLE_SHARE
from spairkit.kernels.elementary_cpu import exp64, log64
from spairkit.kernels.presence_blocks import fits_table
from spairkit.kernels.threads import arrays, compiled, inlined, over_images, part

# likelihood of a count that the samples rule out: -691 as a logarithm, far below that of any count
# that they allow
_TINY = 1e-300


@compiled
def _fill_odds(failure, odds):
    """odds[k, m] of cell k after m objects, m <= k, by the recursion from the last cell."""
    n = odds.shape[0]
    for m in range(n):
        odds[n - 1, m] = failure * (m + 1) / (n - m)
    for k in range(n - 2, -1, -1):
        for m in range(k + 1):
            here, more = odds[k + 1, m], odds[k + 1, m + 1]
            odds[k, m] = here * (1.0 + more) / (1.0 + here)


@functools.lru_cache(maxsize=8)
def _odds(success: float, num_cells: int) -> np.ndarray:
    odds = np.zeros((num_cells, num_cells))
    if num_cells:
        _fill_odds(1.0 - success, odds)
    return odds


@part
def _summed_odds(failure, n, k, m):
    """The entry of `_fill_odds` by its own sum, which `spairkit.presence` explains."""
    num_open = n - k - 1.0
    with_it, without, term_with, term = 1.0, 1.0, 1.0, 1.0
    j = 0.0
    while j < num_open:
        share = failure * (num_open - j) / (j + 1.0)
        term *= share * (m + j + 1.0) / (n - m - j)
        term_with *= share * (m + j + 2.0) / (n - m - j - 1.0)
        without += term
        with_it += term_with
        j += 1.0
        rest = num_open - j
        if term * rest <= NEGLIGIBLE_SHARE * without and (
            term_with * rest <= NEGLIGIBLE_SHARE * with_it
        ):
            break
        if with_it > LARGE_SUM:
            term, term_with = term / LARGE_SUM, term_with / LARGE_SUM
            without, with_it = without / LARGE_SUM, with_it / LARGE_SUM
    return failure * (m + 1.0) / (n - m) * (with_it / without)


@compiled
def _presence_kl(start, stop, logits, samples, odds, failure, kl, prior_logit):
    n = np.float64(samples.shape[1])
    for b in range(start, stop):
        before = 0
        unknown = False
        for k in range(samples.shape[1]):
            unknown |= np.isnan(samples[b, k])
            if unknown:
                prior_odds = np.nan
            elif len(odds) > 0:
                prior_odds = odds[k, before]
            else:
                prior_odds = _summed_odds(failure, n, np.float64(k), np.float64(before))
            prior_logit[b, k] = math.log(prior_odds)
            logit = np.float64(logits[b, k])
            e = math.exp(-abs(logit))
            on = (1.0 if logit >= 0 else e) / (1.0 + e)
            off = (e if logit >= 0 else 1.0) / (1.0 + e)
            negative_entropy = on * min(logit, 0.0) - off * max(logit, 0.0) - math.log1p(e)
            kl[b, k] = negative_entropy - on * prior_logit[b, k] + math.log1p(prior_odds)
            if samples[b, k] > 0.5:
                before += 1


@inlined
def _shares(count, before, num_open):
    """Probability that the next of the open cells is on, and off, if `count` is the total."""
    # whole numbers are subtracted first: LLVM may reorder sums of floats, which would round away a
    # small `before`
    share = (np.float64(np.int32(count)) - before) / num_open
    rest = (np.float64(np.int32(num_open) - np.int32(count)) + before) / num_open
    return min(max(share, 0.0), 1.0), min(max(rest, 0.0), 1.0)


@inlined
def _weigh(belief, before, num_open, weight):
    """p(on) and p(off) of the next cell; fills `weight` with the posterior over the count."""
    largest = belief[0]
    for c in range(1, len(belief)):
        largest = max(largest, belief[c])
    total, on, off = 0.0, 0.0, 0.0
    for c in range(len(belief)):
        share, rest = _shares(c, before, num_open)
        w = exp64(belief[c] - largest)
        weight[c] = w
        total += w
        on += w * share
        off += w * rest
    for c in range(len(belief)):
        weight[c] /= total
    return on / total, off / total


@inlined
def _condition(belief, sample, before, num_open, after):
    """Fills `after` with the log-weights, given that the cell is `sample`."""
    for c in range(len(belief)):
        share, rest = _shares(c, before, num_open)
        likelihood = sample * share + (1.0 - sample) * rest
        after[c] = belief[c] + log64(max(likelihood, _TINY))


@compiled
def _count_posterior(start, stop, samples, log_failure, prior_logit):
    n = samples.shape[1]
    belief, weight = np.empty(n + 1), np.empty(n + 1)
    for b in range(start, stop):
        before = 0.0
        for c in range(n + 1):
            belief[c] = c * log_failure
        for k in range(n):
            on, off = _weigh(belief, before, n - k, weight)
            prior_logit[b, k] = math.log(max(on, MIN_PROBABILITY)) - math.log(
                max(off, MIN_PROBABILITY)
            )
            _condition(belief, np.float64(samples[b, k]), before, n - k, belief)
            before += samples[b, k]


@compiled
def _count_posterior_backward(
    start, stop, grad_logit, samples, log_failure, grad_samples, grad_log_failure
):
    n = samples.shape[1]
    beliefs, weight, tail = np.empty((n + 1, n + 1)), np.empty(n + 1), np.empty(n + 1)
    before = np.zeros(n + 1)
    for b in range(start, stop):
        for c in range(n + 1):
            beliefs[0, c] = c * log_failure
            tail[c] = 0.0
        for k in range(n):
            _condition(beliefs[k], np.float64(samples[b, k]), before[k], n - k, beliefs[k + 1])
            before[k + 1] = before[k] + samples[b, k]
        grad_before = 0.0  # of the number of objects before any later cell
        for k in range(n - 1, -1, -1):
            sample = np.float64(samples[b, k])
            num_open = n - k
            on, off = _weigh(beliefs[k], before[k], num_open, weight)
            grad = np.float64(grad_logit[b, k])
            # a probability below the floor is a constant
            grad_on = 0.0 if on < MIN_PROBABILITY else grad / on
            grad_off = 0.0 if off < MIN_PROBABILITY else -grad / off
            common = grad_on * on + grad_off * off
            grad_sample, grad_here = grad_before, 0.0
            for c in range(n + 1):
                share, rest = _shares(c, before[k], num_open)
                likelihood = sample * share + (1.0 - sample) * rest
                grad_likelihood = tail[c] / likelihood if likelihood > 0.0 else 0.0
                grad_sample += grad_likelihood * (share - rest)
                grad_share = weight[c] * grad_on + grad_likelihood * sample
                grad_rest = weight[c] * grad_off + grad_likelihood * (1.0 - sample)
                inside = c >= before[k] and c - before[k] <= num_open
                grad_here += (grad_rest - grad_share) / num_open if inside else 0.0
                tail[c] += weight[c] * (grad_on * share + grad_off * rest - common)
            grad_samples[b, k] = grad_sample
            grad_before += grad_here
        grad_log_failure[b] = 0.0
        for c in range(n + 1):
            grad_log_failure[b] += c * tail[c]


def presence_kl_cpu(logits: Tensor, samples: Tensor, success: Tensor) -> tuple[Tensor, Tensor]:
    """KL in nats, float32, and log-odds of the prior, float64, both [B, n], of hard samples."""
    num_images, num_cells = samples.shape
    kl = torch.empty(num_images, num_cells, dtype=torch.float32)
    prior_logit = torch.empty(num_images, num_cells, dtype=torch.double)
    s = float(success)
    if not 0.0 < s < 1.0:  # which a compiled caller could not check
        s = math.nan
    table = _odds(s, num_cells if fits_table(num_cells) else 0)
    inputs = *arrays(logits, samples), table, 1.0 - s
    over_images(_presence_kl, num_images, *inputs, kl.numpy(), prior_logit.numpy())
    return kl, prior_logit


def count_posterior_cpu(samples: Tensor, success: Tensor) -> Tensor:
    """[B, n] float64 log-odds of the prior of relaxed samples."""
    prior_logit = torch.empty(samples.shape, dtype=torch.double)
    inputs = *arrays(samples), _log_failure(success)
    over_images(_count_posterior, len(samples), *inputs, prior_logit.numpy())
    return prior_logit


def count_posterior_backward_cpu(
    grad_logit: Tensor, samples: Tensor, success: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the samples [B, n], and of log(1 - success) for each image [B]."""
    grad_samples = torch.empty(samples.shape, dtype=torch.float32)
    grad_log_failure = torch.empty(len(samples), dtype=torch.double)
    inputs = grad_logit.double().contiguous().numpy(), *arrays(samples), _log_failure(success)
    outputs = grad_samples.numpy(), grad_log_failure.numpy()
    over_images(_count_posterior_backward, len(samples), *inputs, *outputs)
    return grad_samples, grad_log_failure


def _log_failure(success: Tensor) -> float:
    """log(1 - s); NaN where s lies outside (0, 1), which a compiled caller could not check."""
    s = float(success)
    return math.log1p(-s) if 0.0 < s < 1.0 else math.nan
