"""The count prior against enumeration and against log-gamma sums, on every backend."""

import functools
import itertools
import math
import resource
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import gammaln, logsumexp
from torch import Tensor

from spairkit.backends import Backend
from spairkit.presence import log_presence_prior, presence_kl, presence_prior

SUCCESSES = [1e-6, 0.1, 0.5, 0.99, 0.9999]


BACKENDS: list[Backend] = ["torch", "cpu"]


def joint_by_enumeration(num_cells: int, success: float) -> dict[tuple[int, ...], float]:
    """p(z) for every binary vector z: a truncated geometric count in uniform arrangement."""
    counts = [(1 - success) ** c for c in range(num_cells + 1)]
    return {
        z: counts[sum(z)] / sum(counts) / math.comb(num_cells, sum(z))
        for z in itertools.product((0, 1), repeat=num_cells)
    }


def prior_by_enumeration(z: tuple[int, ...], joint: dict[tuple[int, ...], float]) -> list[float]:
    """p(z_k = 1 | z_<k), as a ratio of sums over the joint."""
    prior = []
    for k in range(len(z)):
        fits = [(other, p) for other, p in joint.items() if other[:k] == z[:k]]
        prior.append(sum(p for other, p in fits if other[k]) / sum(p for _, p in fits))
    return prior


@functools.cache
def prior_by_log_gamma(num_images: int, num_cells: int, success: float) -> Tensor:
    """The prior for `some_samples`: given m objects in k cells, a sum over the possible counts."""
    n = num_cells
    z = some_samples(num_images, num_cells).numpy() > 0.5
    before = z.cumsum(1) - z
    result = np.empty(z.shape)
    for b, k in np.ndindex(z.shape):
        left = np.arange(n - k + 1)  # possible numbers of objects in the remaining n - k cells
        count = before[b, k] + left
        # log of p(count) arrangements(left of n - k) / arrangements(count of n)
        log_weight = (
            count * math.log1p(-success)
            + (gammaln(n - k + 1) - gammaln(left + 1) - gammaln(n - k - left + 1))
            - (gammaln(n + 1) - gammaln(count + 1) - gammaln(n - count + 1))
        )
        share = np.log(np.maximum(left, 1) / (n - k))
        result[b, k] = np.exp(logsumexp((log_weight + share)[1:]) - logsumexp(log_weight))
    return torch.from_numpy(result)


def some_samples(num_images: int, num_cells: int, seed: int = 0) -> Tensor:
    """Hard samples of images from empty to full."""
    random = torch.Generator().manual_seed(seed)
    share = torch.linspace(0, 1, num_images)[:, None]
    return (torch.rand(num_images, num_cells, generator=random) < share).float()


@pytest.mark.parametrize("relaxed", [False, True])
@pytest.mark.parametrize("success", [0.01, 0.5, 0.99])
def test_prior_matches_enumeration(success: float, relaxed: bool) -> None:
    joint = joint_by_enumeration(6, success)
    vectors = list(joint)
    expected = torch.tensor([prior_by_enumeration(z, joint) for z in vectors]).double()
    samples = torch.tensor(vectors).double()
    prior = presence_prior(samples, success, relaxed=relaxed, backend="torch")
    torch.testing.assert_close(prior, expected, rtol=1e-6, atol=0)
    exact = torch.tensor([prior_by_enumeration(z, joint) for z in vectors], dtype=torch.float64)
    torch.testing.assert_close(prior, exact, rtol=1e-12, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("relaxed", [False, True])
@pytest.mark.parametrize("num_cells", [1, 2, 9])
def test_chain_of_priors_sums_to_one_over_all_vectors(
    num_cells: int, relaxed: bool, backend: Backend
) -> None:
    samples = torch.tensor(list(itertools.product((0.0, 1.0), repeat=num_cells)))
    prior = presence_prior(samples, 0.7, relaxed=relaxed, backend=backend).double()
    total = torch.where(samples > 0.5, prior, 1 - prior).prod(1).sum()
    assert abs(float(total) - 1) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    num_cells=st.integers(2, 30),
    success=st.floats(1e-6, 0.9999),
    relaxed=st.booleans(),
)
def test_order_of_earlier_cells_does_not_change_the_prior(
    backend: Backend, seed: int, num_cells: int, success: float, relaxed: bool
) -> None:
    random = torch.Generator().manual_seed(seed)
    samples = (torch.rand(3, num_cells, generator=random) < 0.5).float()
    order = torch.cat(
        [torch.randperm(num_cells - 1, generator=random), torch.tensor([num_cells - 1])]
    )
    last = presence_prior(samples, success, relaxed=relaxed, backend=backend)[:, -1]
    shuffled = presence_prior(samples[:, order], success, relaxed=relaxed, backend=backend)[:, -1]
    torch.testing.assert_close(shuffled, last, rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("success", SUCCESSES)
@pytest.mark.parametrize("num_cells", [1, 16, 100, 1024])
def test_hard_prior_is_exact_to_float32(num_cells: int, success: float, backend: Backend) -> None:
    samples = some_samples(4, num_cells)
    expected = prior_by_log_gamma(4, num_cells, success)
    prior = presence_prior(samples, success, backend=backend)
    assert prior.dtype == torch.float32
    torch.testing.assert_close(prior.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_prior_of_a_large_image_takes_little_memory(backend: Backend) -> None:
    """62,500 cells, of 3000 x 3000 pixels; a table of their odds would take 31 GB."""
    num_cells, success = 62_500, 0.98
    random = torch.Generator().manual_seed(0)
    samples = (torch.rand(1, num_cells, generator=random) < 0.02).float()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    kl = presence_kl(torch.zeros(1, num_cells), samples, success, backend=backend)
    prior = presence_prior(samples, success, backend=backend).double()
    risen = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert risen < 300 * 1024  # KiB
    chain = torch.where(samples > 0.5, prior, 1 - prior).log().sum(1)
    closed = log_presence_prior(samples.sum(1), torch.tensor(float(num_cells)), success)
    torch.testing.assert_close(chain, closed.double(), rtol=1e-5, atol=0)
    uninformed = -(prior * (1 - prior)).log() / 2 - math.log(2)  # KL of a chance of one half
    torch.testing.assert_close(kl.double(), uninformed, rtol=1e-4, atol=0)


@pytest.mark.parametrize("success", SUCCESSES)
@pytest.mark.parametrize("num_cells", [1, 100, 400])
def test_relaxed_prior_agrees_with_the_hard_one(num_cells: int, success: float) -> None:
    samples = some_samples(5, num_cells).double()
    hard = presence_prior(samples, success, backend="torch")
    relaxed = presence_prior(samples, success, relaxed=True, backend="torch")
    torch.testing.assert_close(relaxed, hard, rtol=1e-9, atol=0)


def kl_by_definition(logit: float, prior: float) -> float:
    on = 1 / (1 + math.exp(-logit))
    return on * math.log(on / prior) + (1 - on) * math.log((1 - on) / (1 - prior))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("relaxed", [False, True])
def test_kl_equals_that_of_two_bernoulli_distributions(relaxed: bool, backend: Backend) -> None:
    samples = some_samples(4, 7)
    if relaxed:
        samples = 0.1 + 0.8 * samples
    logits = torch.linspace(-8, 8, 28).reshape(4, 7)
    prior = presence_prior(samples.double(), 0.9, relaxed=relaxed, backend="torch")
    kl = presence_kl(logits, samples, 0.9, relaxed=relaxed, backend=backend)
    expected = [
        kl_by_definition(logit, p)
        for logit, p in zip(logits.flatten().tolist(), prior.flatten().tolist(), strict=True)
    ]
    torch.testing.assert_close(
        kl.double().flatten(), torch.tensor(expected, dtype=torch.double), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("relaxed", [False, True])
def test_gradients_match_finite_differences(relaxed: bool) -> None:
    random = torch.Generator().manual_seed(1)
    samples = torch.rand(2, 5, generator=random, dtype=torch.double)
    logits = torch.randn(2, 5, generator=random, dtype=torch.double, requires_grad=True)
    success = torch.tensor(0.7, dtype=torch.double, requires_grad=True)
    samples.requires_grad_(relaxed)

    def kl(logits: Tensor, samples: Tensor, success: Tensor) -> Tensor:
        return presence_kl(logits, samples, success, relaxed=relaxed, backend="torch")

    assert torch.autograd.gradcheck(kl, (logits, samples, success), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("relaxed", [False, True])
def test_extreme_inputs_give_finite_results(relaxed: bool, backend: Backend) -> None:
    for success, num_cells in itertools.product((1e-6, 0.5, 1 - 1e-6), (2, 33)):
        samples = some_samples(4, num_cells).requires_grad_(relaxed)
        logits = torch.tensor([-1e3, -30.0, 30.0, 1e3])[:, None].repeat(1, num_cells)
        logits.requires_grad_()
        kl = presence_kl(logits, samples, success, relaxed=relaxed, backend=backend)
        kl.sum().backward()
        assert kl.isfinite().all()
        assert (kl >= -1e-6).all()
        assert logits.grad is not None
        assert logits.grad.isfinite().all()
        if relaxed:
            assert samples.grad is not None
            assert samples.grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("relaxed", [False, True])
def test_success_may_be_a_tensor_or_a_number(relaxed: bool, backend: Backend) -> None:
    samples = some_samples(3, 12)
    logits = torch.zeros(3, 12)
    for success in (0.25, 0.987654321):
        number = presence_kl(logits, samples, success, relaxed=relaxed, backend=backend)
        tensor = torch.tensor(success, dtype=torch.double)
        assert torch.equal(
            number, presence_kl(logits, samples, tensor, relaxed=relaxed, backend=backend)
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("relaxed", [False, True])
def test_nan_propagates(relaxed: bool, backend: Backend) -> None:
    samples = some_samples(3, 6)
    samples[1, 2] = math.nan
    logits = torch.zeros(3, 6)
    logits[2, 4] = math.nan
    kl = presence_kl(logits, samples, 0.5, relaxed=relaxed, backend=backend)
    assert kl[1, 3:].isnan().all()
    assert kl[2, 4].isnan()
    assert kl[0].isfinite().all()
    assert kl[1, :2].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("relaxed", [False, True])
@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_empty_batches_are_supported(
    shape: tuple[int, int], relaxed: bool, backend: Backend
) -> None:
    empty = torch.zeros(shape, requires_grad=True)
    kl = presence_kl(empty, empty, 0.5, relaxed=relaxed, backend=backend)
    assert kl.shape == shape
    kl.sum().backward()
    assert presence_prior(empty, 0.5, relaxed=relaxed, backend=backend).shape == shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": torch.zeros(4)}, r"samples must be \[B, n\], got shape \(4,\)"),
        ({"logits": torch.zeros(2, 4)}, r"logits must have the shape of samples, \(2, 3\)"),
        (
            {"samples": torch.zeros(2, 3).bool()},
            "samples must be a floating-point tensor",
        ),
        (
            {"logits": torch.zeros(2, 3).int()},
            "logits must be a floating-point tensor",
        ),
        ({"logits": torch.zeros(2, 3, device="meta")}, "logits must be on the device of samples"),
        ({"success": 0.0}, r"success must lie in \(0, 1\), got 0.0"),
        ({"success": 1.0}, r"success must lie in \(0, 1\), got 1.0"),
        ({"success": math.nan}, r"success must lie in \(0, 1\), got nan"),
        ({"success": torch.tensor(1.5)}, r"success must lie in \(0, 1\), got 1.5"),
        ({"success": torch.ones(2)}, r"0-d float tensor, got shape \(2,\)"),
        ({"success": torch.tensor(0.5, device="meta")}, "success must be on the device of samples"),
        ({"backend": "cuda"}, "backend must be one of auto, torch, cpu, triton, got 'cuda'"),
    ],
)
def test_errors_name_the_argument_and_the_rule(change: dict[str, Any], message: str) -> None:
    arguments = {"logits": torch.zeros(2, 3), "samples": torch.zeros(2, 3), "success": 0.5}
    with pytest.raises(ValueError, match=message):
        presence_kl(**{**arguments, **change})
    prior = {"samples": torch.zeros(2, 3).double(), "success": 0.5, "backend": "cpu"}
    with pytest.raises(ValueError, match="samples is float64"):
        presence_prior(**prior)  # type: ignore[arg-type]


@pytest.mark.parametrize("success", [1e-12, 0.1, 0.5, 0.99, 1 / (1 + 1e-6)])
@pytest.mark.parametrize("places", [0, 1, 2, 5, 9])
def test_closed_form_matches_enumeration(success: float, places: int) -> None:
    joint = joint_by_enumeration(places, success)
    count = torch.tensor([float(sum(z)) for z in joint])
    found = log_presence_prior(count, torch.full_like(count, places), success)
    assert float(found.double().exp().sum()) == pytest.approx(1, rel=1e-5)
    expected = torch.tensor([math.log(p) for p in joint.values()])
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("success", SUCCESSES)
@pytest.mark.parametrize("num_cells", [1, 6, 40])
def test_closed_form_equals_the_chain_of_cells(success: float, num_cells: int) -> None:
    """The product of (B1) and (B2) over the cells of hard samples."""
    samples = some_samples(8, num_cells).double()
    prior = presence_prior(samples, success)
    chain = torch.where(samples > 0.5, prior, 1 - prior).log().sum(1)
    found = log_presence_prior(samples.sum(1), torch.tensor(float(num_cells)), success)
    torch.testing.assert_close(found.double(), chain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("success", [1e-12, 0.5, 1 / (1 + 1e-6), 1 - 1e-12])
def test_closed_form_is_finite_for_large_images(success: float) -> None:
    places = 30_000
    count = torch.arange(places + 1).float()
    found = log_presence_prior(count, torch.tensor(float(places)), success)
    assert bool(found.isfinite().all())
    n, c = float(places), np.arange(places + 1.0)
    ways = gammaln(n + 1) - gammaln(c + 1) - gammaln(n - c + 1)
    log_count = c * math.log1p(-success)
    expected = log_count - logsumexp(log_count) - ways
    assert np.abs(found.numpy() - expected).max() < 1e-7 * np.abs(expected).max()
    assert logsumexp(found.double().numpy() + ways) == pytest.approx(0, abs=1e-2)


def test_more_objects_than_slots_are_impossible() -> None:
    count, places = torch.tensor([2.0, 3.0]), torch.tensor([2.0, 2.0])
    finite, impossible = log_presence_prior(count, places, 0.95).tolist()
    assert math.isfinite(finite)
    assert impossible == -math.inf
