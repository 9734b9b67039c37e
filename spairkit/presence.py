"""The count prior on which cells hold an object, and the KL of the posterior against it.

The number of objects C in n cells has a geometric prior, p(C = c) ~ (1 - s)^c, truncated at n.
Given C, all arrangements are equally likely (supplement, section A). In raster order this is a
chain of Bernoullis, equations (B1) and (B2), which is computed as log-odds:

- Hard samples: the odds of cell k depend only on k and on m, the number of objects before it. Let
  r(k, m) be the probability of one arrangement of the first k cells with m + 1 objects, divided by
  that of one with m. Then r(n, m) = (1 - s)(m + 1)/(n - m), the odds of cell k are r(k + 1, m), and
  r(k, m) = r(k + 1, m) (1 + r(k + 1, m + 1))/(1 + r(k + 1, m)). Sums and products of positive
  numbers are accurate in float64 for any s and n, and nothing underflows. This fills a table of n^2
  odds. Triton, and every implementation in images of many cells, sums those that are needed: let
  S(k, m) be the probability of one arrangement of the first k cells with m objects, divided by its
  probability with all later cells empty. Adding j of the n - k open cells,
  S(k, m) = sum_j t_j with t_0 = 1 and
  t_(j+1) = t_j (1 - s)(m + j + 1)/(j + 1) (n - k - j)/(n - m - j), and the odds of cell k are
  (1 - s)(m + 1)/(n - m) S(k + 1, m + 1)/S(k + 1, m). The factors decrease in j, so a sum ends when
  the last term, times the number of those left, is negligible.
- Relaxed samples: the posterior over the count is carried from cell to cell. It is kept in log
  space because (1 - s)^c underflows.
"""

import functools
import math
from typing import Literal

import torch
from torch import Tensor

from spairkit.backends import Backend, chosen_backend
from spairkit.kernels.constants import (
    IMPOSSIBLE,
    LARGE_SUM,
    MIN_PROBABILITY,
    NEGLIGIBLE_SHARE,
)
from spairkit.kernels.presence_blocks import MAX_CELLS, fits_table
from spairkit.kernels.presence_op import count_posterior_op, presence_kl_op

_TERMS = 16  # of the sum over counts, between two looks at whether the rest matters


def presence_kl(
    logits: Tensor,  # [B, n]
    samples: Tensor,  # [B, n]
    success: float | Tensor,
    *,
    relaxed: bool = False,
    backend: Backend = "auto",
) -> Tensor:  # [B, n]
    """KL divergence in nats of each cell's posterior from its prior, given the cells before it.

    The exact KL between two Bernoullis; the posterior has probability sigmoid(logits).

    Args:
        logits: [B, n] finite log-odds of the posterior of z_pres.
        samples: [B, n] z_pres as sampled, in raster order.
        success: s in (0, 1) of the truncated geometric prior on the count; values near 1 expect few
            objects. May be a 0-d tensor on the device of `samples`. On a GPU and in a compiled
            function its value is not checked, since that would wait for the device, and one outside
            (0, 1) gives NaN. Use float64: float32 holds only three digits of 1 - .9999.
        relaxed: False reads `samples > 0.5`, and `samples` get no gradient; True uses the samples
            as they are, in [0, 1], with gradients.
        backend: "torch", "cpu" (Numba), "triton" (GPU, or Triton's interpreter; up to 1024
            cells if relaxed), or "auto".

    Returns:
        [B, n] nats, float64 if `logits` are, else float32. NaN from the first NaN sample on (with
        `relaxed`, from the cell after it), and where a logit is NaN.

    Raises:
        ValueError: the rank, shape, dtype, device or value of an argument is wrong; the message
            names it.

    Two cells of one image, of which the first holds an object:

    >>> logits, samples = torch.tensor([[2.0, -2.0]]), torch.tensor([[1.0, 0.0]])
    >>> presence_kl(logits, samples, 0.5)
    tensor([[0.7782, 0.3278]])

    Source: equations (B1) and (B2) of the supplement; KL as in the authors' code, unclipped.
    """
    _check(logits, samples, success)
    chosen = _chosen(backend, logits, "logits", success, relaxed)
    if chosen != "torch" and not relaxed:
        kl: Tensor = presence_kl_op(logits, samples, _as_tensor(success, samples), chosen)[0]
        return kl
    if chosen == "torch":
        prior_logit = _prior_logit_torch(samples, success, relaxed)
    else:
        prior_logit, _ = count_posterior_op(samples, _as_tensor(success, samples), chosen)
    return _bernoulli_kl(logits.double(), prior_logit).to(_result_dtype(logits))


def presence_prior(
    samples: Tensor,  # [B, n]
    success: float | Tensor,
    *,
    relaxed: bool = False,
    backend: Backend = "auto",
) -> Tensor:  # [B, n]
    """Prior probability that each cell holds an object, given the cells before it.

    Arguments as in `presence_kl`.

    Returns:
        [B, n] p(z_k = 1 | z_<k), float64 if `samples` are, else float32. A tensor `success` gets a
        gradient. NaN from the first NaN sample on (with `relaxed`, from the cell after it).

    Raises:
        ValueError: the rank, dtype, device or value of an argument is wrong; the message names it.

    Source: equations (B1) and (B2) of the supplement.
    """
    _check(samples, samples, success)
    chosen = _chosen(backend, samples, "samples", success, relaxed)
    if chosen == "torch":
        prior_logit = _prior_logit_torch(samples, success, relaxed)
    elif relaxed:
        prior_logit, _ = count_posterior_op(samples, _as_tensor(success, samples), chosen)
    else:
        _, prior_logit = presence_kl_op(samples, samples, _as_tensor(success, samples), chosen)
    return torch.sigmoid(prior_logit).to(_result_dtype(samples))


def log_presence_prior(
    count: Tensor,  # any shape
    places: Tensor,  # the same shape, or one that broadcasts with it
    success: float,
) -> Tensor:
    """log p(z_pres) in nats of any arrangement of `count` objects in `places` slots.

    The count is truncated geometric and all arrangements of a count are equally likely:
    p(z_pres) = (1 - s)^c / sum_i (1 - s)^i / binomial(n, c), with c from 0 to n; minus infinity for
    more than n objects.

    Args:
        count: c, whole numbers from 0.
        places: n, whole numbers from 0.
        success: s in (0, 1).

    Source: supplement, section A.
    """
    count, places = count.double(), places.double()
    failure = math.log1p(-success)
    total = torch.log(-torch.expm1((places + 1) * failure)) - math.log(success)
    ways = torch.lgamma(places + 1) - torch.lgamma(count + 1) - torch.lgamma(places - count + 1)
    value = count * failure - total - ways
    return torch.where(count > places, -math.inf, value).to(torch.float32)


def _chosen(
    backend: Backend, inputs: Tensor, name: str, success: float | Tensor, relaxed: bool
) -> Literal["torch", "cpu", "triton"]:
    if isinstance(success, Tensor) and success.requires_grad and not relaxed:
        # the compiled backends pass on no gradient of the odds
        if backend in ("cpu", "triton"):
            raise ValueError(
                f"backend {backend!r} has no gradient of success for hard samples: "
                "use relaxed=True or backend='torch'"
            )
        backend = "torch" if backend == "auto" else backend
    chosen = chosen_backend(backend, inputs, name)
    if chosen == "triton" and relaxed and inputs.shape[1] > MAX_CELLS:
        if backend == "triton":
            raise ValueError(
                f"backend 'triton' supports at most {MAX_CELLS} cells of relaxed samples, "
                f"got {inputs.shape[1]}: use backend='torch'"
            )
        return "torch"
    return chosen


def _as_tensor(success: float | Tensor, samples: Tensor) -> Tensor:
    if isinstance(success, Tensor):
        value = success.double()
        return torch.where((value > 0) & (value < 1), value, torch.nan)
    return torch.full((), success, dtype=torch.double, device=samples.device)


def _result_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _check(logits: Tensor, samples: Tensor, success: float | Tensor) -> None:
    if samples.dim() != 2:
        raise ValueError(f"samples must be [B, n], got shape {tuple(samples.shape)}")
    if logits.shape != samples.shape:
        raise ValueError(
            f"logits must have the shape of samples, {tuple(samples.shape)}, "
            f"got {tuple(logits.shape)}"
        )
    for name, tensor in {"samples": samples, "logits": logits}.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be a floating-point tensor, got {tensor.dtype}")
        if tensor.device != samples.device:
            raise ValueError(
                f"{name} must be on the device of samples, {samples.device}, got {tensor.device}"
            )
    if isinstance(success, Tensor):
        if success.dim() != 0 or not success.is_floating_point():
            raise ValueError(
                "success must be a float or a 0-d float tensor, "
                f"got shape {tuple(success.shape)}, {success.dtype}"
            )
        if success.device != samples.device:
            raise ValueError(
                f"success must be on the device of samples, {samples.device}, got {success.device}"
            )
        # reading a value on a GPU would wait for the device, and a trace has no values
        if torch.compiler.is_compiling() or success.device.type != "cpu":
            return
        success = float(success.detach())
    if not 0.0 < success < 1.0:
        raise ValueError(f"success must lie in (0, 1), got {success}")


def _bernoulli_kl(logits: Tensor, prior_logit: Tensor) -> Tensor:
    log_sigmoid = torch.nn.functional.logsigmoid
    on = torch.sigmoid(logits)
    return on * (log_sigmoid(logits) - log_sigmoid(prior_logit)) + torch.sigmoid(-logits) * (
        log_sigmoid(-logits) - log_sigmoid(-prior_logit)
    )


def _prior_logit_torch(samples: Tensor, success: float | Tensor, relaxed: bool) -> Tensor:
    """[B, n] float64: log-odds of the prior of each cell."""
    success = _as_tensor(success, samples) if isinstance(success, Tensor) else success
    if relaxed:
        return _relaxed_prior_logit(samples.double(), 1 - success)
    num_cells = samples.shape[1]
    present = (samples > 0.5).long()
    before = present.cumsum(1) - present
    unknown = samples.isnan().cumsum(1) > 0
    # a sum ends by its values, which a trace has not
    if not (fits_table(num_cells) or torch.compiler.is_compiling()):
        return torch.where(unknown, torch.nan, _summed_log_odds(1 - success, before))
    if isinstance(success, Tensor):
        table = _log_odds_table(1 - success, num_cells)
    elif torch.compiler.is_compiling():
        table = _log_odds_table(samples.new_tensor(1.0 - success, dtype=torch.double), num_cells)
    else:
        table = _cached_log_odds_table(success, num_cells, samples.device)
    cell = torch.arange(num_cells, device=samples.device)
    return torch.where(unknown, torch.nan, table[cell, before])


@functools.lru_cache(maxsize=16)
def _cached_log_odds_table(success: float, num_cells: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        failure = torch.tensor(1.0 - success, dtype=torch.double, device=device)
        return _log_odds_table(failure, num_cells)


def _log_odds_table(failure: Tensor, num_cells: int) -> Tensor:
    """[n, n] float64: log-odds of cell k (row) after m objects (column, m <= k, else 0).

    P(k, m), the probability of bits with m objects in the first k cells, sums over cell k:
    P(k, m) = P(k + 1, m) + P(k + 1, m + 1). The odds of cell k are P(k + 1, m + 1) / P(k + 1, m),
    which gives a row from the one after it (docs/model.md 2).
    """
    if num_cells == 0:
        return failure.new_zeros(0, 0)
    count = torch.arange(num_cells, dtype=failure.dtype, device=failure.device)
    odds = failure * (count + 1) / (num_cells - count)
    rows = [odds]
    for _ in range(num_cells - 1):
        odds = odds[:-1] * (1 + odds[1:]) / (1 + odds[:-1])
        rows.append(odds)
    pad = torch.nn.functional.pad
    return torch.stack([pad(row.log(), (0, num_cells - len(row))) for row in rows[::-1]])


def _summed_log_odds(failure: float | Tensor, before: Tensor) -> Tensor:
    """[B, n] float64: log-odds of each cell after `before` objects, as the table has them."""
    num_cells = before.shape[1]
    m = before.double()
    open_after = num_cells - 1 - torch.arange(num_cells, device=before.device).double()
    term = term_with = without = with_it = torch.ones_like(m)
    for j in range(num_cells - 1):
        here = j < open_after
        share = failure * (open_after - j) / (j + 1)
        left = torch.where(here, num_cells - m - j, 2.0)
        term = torch.where(here, term * (share * (m + j + 1) / left), 0.0)
        term_with = torch.where(here, term_with * (share * (m + j + 2) / (left - 1)), 0.0)
        without, with_it = without + term, with_it + term_with
        if j % _TERMS == _TERMS - 1:
            rest = open_after - j - 1
            more = (term * rest > NEGLIGIBLE_SHARE * without) | (
                term_with * rest > NEGLIGIBLE_SHARE * with_it
            )
            if not bool(more.any()):
                break
            scale = torch.ones_like(m).masked_fill(with_it > LARGE_SUM, 1 / LARGE_SUM)
            term, term_with = term * scale, term_with * scale
            without, with_it = without * scale, with_it * scale
    return (failure * (m + 1) / (num_cells - m) * (with_it / without)).log()


def _relaxed_prior_logit(samples: Tensor, failure: float | Tensor) -> Tensor:
    num_images, num_cells = samples.shape
    counts = torch.arange(num_cells + 1, dtype=samples.dtype, device=samples.device)
    log_failure = failure.log() if isinstance(failure, Tensor) else math.log(failure)
    belief = (counts * log_failure).expand(num_images, -1)  # [B, n + 1] log p(count), unnormalised
    before = samples.new_zeros(num_images, 1)
    logits = []
    for k in range(num_cells):
        # (B1): the remaining objects fall evenly on the remaining cells
        on = ((counts - before) / (num_cells - k)).clamp(0, 1)
        off = ((num_cells - k - counts + before) / (num_cells - k)).clamp(0, 1)
        weight = belief.softmax(1)
        log_on = (weight * on).sum(1).clamp(min=MIN_PROBABILITY).log()
        log_off = (weight * off).sum(1).clamp(min=MIN_PROBABILITY).log()
        logits.append(log_on - log_off)
        # (B2): the belief about the count, given this cell
        here = samples[:, k, None]
        likelihood = here * on + (1 - here) * off
        impossible = likelihood <= 0
        log_likelihood = torch.where(impossible, 1.0, likelihood).log()
        belief = torch.where(impossible, IMPOSSIBLE, belief + log_likelihood)
        before = before + here
    return torch.stack(logits, dim=1) if logits else samples.clone()
