"""`CountPosterior` against enumeration of every set of objects, samples and closed forms."""

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from torch import Tensor

from spairkit.counts import CountPosterior

PROPERTY = settings(max_examples=100, deadline=None, derandomize=True)
PROBABILITY = st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(1e-3, 1 - 1e-3))


def enumerated(probabilities: list[float]) -> list[float]:
    """p(C = 0), p(C = 1) ... by a sum over all 2^n sets of objects."""
    masses = [0.0] * (len(probabilities) + 1)
    for exists in product((False, True), repeat=len(probabilities)):
        pairs = zip(probabilities, exists, strict=True)
        masses[sum(exists)] += math.prod(p if on else 1 - p for p, on in pairs)
    return masses


def posterior(least: int, *probabilities: float) -> CountPosterior:
    return CountPosterior(least, torch.tensor(probabilities, dtype=torch.float64))


def of(probabilities: list[float]) -> Tensor:
    return torch.tensor(probabilities, dtype=torch.float64)


@PROPERTY
@given(st.lists(PROBABILITY, max_size=8))
def test_independent_objects_equal_enumeration(probabilities: list[float]) -> None:
    counts = CountPosterior.independent(of(probabilities))
    expected = enumerated(probabilities)
    for count, mass in enumerate(expected):
        assert counts.probability(count) == pytest.approx(mass, abs=1e-11)
    assert float(counts.probabilities.sum()) == pytest.approx(1, abs=1e-12)
    assert counts.mean == pytest.approx(sum(probabilities), abs=1e-9)
    assert counts.probability(-1) == counts.probability(len(expected)) == 0


@PROPERTY
@given(st.lists(PROBABILITY, max_size=5), st.lists(PROBABILITY, max_size=5))
def test_totals_of_images_are_those_of_all_objects(some: list[float], more: list[float]) -> None:
    total = CountPosterior.total([CountPosterior.independent(of(part)) for part in (some, more)])
    joined = CountPosterior.independent(of(some + more))
    for count in range(len(some + more) + 1):
        assert total.probability(count) == pytest.approx(joined.probability(count), abs=1e-9)


def test_many_equal_objects_are_binomial() -> None:
    counts = CountPosterior.independent(torch.full((5000,), 0.25))
    for count in (1100, 1250, 1300):
        ways = math.lgamma(5001) - math.lgamma(count + 1) - math.lgamma(5001 - count)
        log_mass = ways + count * math.log(0.25) + (5000 - count) * math.log(0.75)
        assert counts.probability(count) == pytest.approx(math.exp(log_mass), rel=1e-6, abs=1e-12)
    assert counts.mean == pytest.approx(1250, abs=1e-6)
    assert len(counts.probabilities) < 1000, "tails are cut off"
    assert counts.probabilities[0] + counts.probabilities[-1] < 1e-10


def test_certain_and_negligible_objects_cost_no_probabilities() -> None:
    counts = CountPosterior.independent(of([1.0, 1 - 1e-13, 0.0, 9e-7] * 1000))
    assert counts.least == 2000
    assert counts.probabilities.tolist() == [1.0]
    assert counts.interval() == (2000, 2000)


def test_float32_presences_are_accepted() -> None:
    counts = CountPosterior.independent(torch.tensor([0.5, 0.5], dtype=torch.float32))
    assert counts.probabilities.dtype == torch.float64
    assert counts.probabilities.tolist() == [0.25, 0.5, 0.25]


def test_no_object_is_a_count_of_zero() -> None:
    counts = CountPosterior.independent(torch.zeros(0))
    assert (counts.least, counts.probabilities.tolist(), counts.mean) == (0, [1.0], 0.0)


@pytest.mark.parametrize(
    ("share", "ends"), [(0.9, (3, 5)), (0.8, (4, 5)), (0.5, (4, 5)), (0.1, (5, 5)), (0.001, (5, 5))]
)
def test_interval_is_short_and_likely(share: float, ends: tuple[int, int]) -> None:
    # 3 to 5 hold as much as 4 to 6
    assert posterior(3, 0.0625, 0.435, 0.44, 0.0625).interval(share) == ends


@PROPERTY
@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=9), st.floats(0.01, 0.99))
def test_no_shorter_interval_holds_the_share_and_none_as_short_holds_more(
    weights: list[float], share: float
) -> None:
    masses = np.array(weights) / sum(weights)
    low, high = posterior(2, *masses).interval(share)
    slack, length = 1e-9, high - low + 1
    held = float(masses[low - 2 : high - 1].sum())
    assert held >= share - slack
    for start in range(len(masses)):
        assert masses[start : start + length - 1].sum() < share + slack
        assert masses[start : start + length].sum() <= held + slack


def test_text_and_json_give_the_interval() -> None:
    counts = posterior(7, 0.5, 0.5)
    assert str(counts) == "7.5 expected, 7 to 8 at 90 %"
    assert counts.to_json() == {"count_mean": 7.5, "count_interval": [7, 8]}


@pytest.mark.parametrize(
    ("least", "probabilities", "message"),
    [
        (-1, of([1.0]), "least must be at least 0, got -1"),
        (0, torch.ones(1), r"must be \[m\] float64, got \[1\] torch.float32"),
        (0, torch.ones(1, 1).double(), r"must be \[m\] float64"),
        (0, of([0.5, 0.4]), "sum to 1, got 0.9"),
        (0, of([]), "sum to 1, got 0.0"),
        (0, of([1.5, -0.5]), "from 0"),
        (0, of([math.nan]), "sum to 1, got nan"),
    ],
)
def test_other_values_are_refused(least: int, probabilities: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CountPosterior(least, probabilities)


def test_other_probabilities_and_shares_are_refused() -> None:
    for wrong in ([-0.1], [1.1], [math.nan]):
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
            CountPosterior.independent(of(wrong))
    with pytest.raises(ValueError, match=r"must be \[n\], got \[1, 2\]"):
        CountPosterior.independent(torch.zeros(1, 2))
    for share in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match=r"share must lie in \(0, 1\)"):
            posterior(0, 1.0).interval(share)


@pytest.mark.parametrize(("mean", "deviation"), [(0.0, 0.7), (3.2, 1.5), (57.3, 8.0), (6e3, 900.0)])
def test_a_spread_count_is_a_normal_distribution_over_whole_numbers(
    mean: float, deviation: float
) -> None:
    counts = CountPosterior.spread(mean, deviation)
    assert counts.is_shared
    whole = np.arange(counts.least, counts.least + len(counts.probabilities))
    density = norm.pdf(whole, mean, deviation)
    np.testing.assert_allclose(counts.probabilities.numpy(), density / density.sum(), rtol=1e-9)
    assert counts.least == max(math.ceil(mean - 4 * deviation), 0)
    if mean > 4 * deviation:
        assert counts.mean == pytest.approx(mean, rel=1e-4)
        low, high = counts.interval()
        assert (low, high) == pytest.approx(norm.interval(0.9, mean, deviation), abs=1)


def test_shared_doubts_add_up() -> None:
    """All counts are too low together, so the width of a total is the sum of the widths."""
    parts = [CountPosterior.spread(mean, sd) for mean, sd in ((50, 5), (20, 4), (50, 5))]
    assert CountPosterior.total(parts[:1]) is parts[0]
    total = CountPosterior.total(parts)
    assert total.is_shared
    assert total.mean == pytest.approx(120, abs=0.1)
    low, high = total.interval()
    assert (low, high) == pytest.approx(norm.interval(0.9, 120, 14), abs=2)
    independent = CountPosterior.total([replace(part, is_shared=False) for part in parts])
    assert not independent.is_shared
    assert independent.mean == pytest.approx(120, abs=0.1)
    low, high = independent.interval()
    assert (low, high) == pytest.approx(norm.interval(0.9, 120, math.sqrt(66)), abs=1)
    assert CountPosterior.total([]).interval() == (0, 0)
