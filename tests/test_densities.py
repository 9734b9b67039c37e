"""Divergences against samples and closed forms; schedules against docs/model.md 2.1."""

import math

import pytest
import torch

from spairkit.models.densities import (
    bernoulli_cross_entropy,
    concrete_sample,
    count_success,
    limited,
    logistic,
    normal_kl,
    normal_nll,
    squash,
    weighted_kls,
)


def test_normal_kl_matches_torch_and_samples() -> None:
    torch.manual_seed(0)
    mean, std = torch.randn(5, dtype=torch.float64), torch.rand(5, dtype=torch.float64) + 0.1
    posterior = torch.distributions.Normal(mean, std)
    prior = torch.distributions.Normal(-2.2, 0.5)
    actual = normal_kl(mean, std, -2.2, 0.5)
    torch.testing.assert_close(actual, torch.distributions.kl_divergence(posterior, prior))
    draws = posterior.sample((200_000,))
    estimate = (posterior.log_prob(draws) - prior.log_prob(draws)).mean(0)
    torch.testing.assert_close(actual, estimate, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_concrete_samples_have_the_probability_of_the_logit(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([-2.0, 0.0, 1.5])
    uniform = torch.rand(100_000, 3, generator=generator)
    draws = concrete_sample(logits.expand(100_000, 3), logistic(uniform), temperature)
    torch.testing.assert_close((draws > 0.5).float().mean(0), logits.sigmoid(), rtol=0, atol=0.01)


def test_logistic_noise_has_the_epsilon_of_the_authors() -> None:
    ends = logistic(torch.tensor([0.0, 0.5], dtype=torch.float64))
    assert ends.tolist() == pytest.approx([math.log(1e-9), 0.0], abs=1e-8)


def test_concrete_samples_are_finite_at_extreme_logits() -> None:
    logits = torch.tensor([-10.0, 10.0], requires_grad=True)
    for end in (0.0, 1 - 2**-24):
        draws = concrete_sample(logits, logistic(torch.full((2,), end)), 0.5)
        assert bool(draws.isfinite().all())
        assert bool(torch.autograd.grad(draws.sum(), logits)[0].isfinite().all())


def test_cross_entropy_is_finite_at_0_and_1() -> None:
    target = torch.tensor([[0.0, 1.0]])
    same, opposite = target.clone(), 1 - target
    assert float(bernoulli_cross_entropy(same, target, 1e-9)) == pytest.approx(0, abs=1e-6)
    assert float(bernoulli_cross_entropy(opposite, target, 1e-9)) == pytest.approx(
        -2 * math.log(1e-9), rel=1e-5
    )


def test_normal_nll_matches_torch_and_finite_differences() -> None:
    torch.manual_seed(0)
    image, target = torch.rand(2, 3, 2, 5, dtype=torch.float64)
    std = torch.tensor(0.2, dtype=torch.float64)
    expected = -torch.distributions.Normal(image, std).log_prob(target).flatten(1).sum(1)
    torch.testing.assert_close(normal_nll(image, target, std), expected)
    leaves = [x.requires_grad_() for x in (image, target, std)]
    assert torch.autograd.gradcheck(normal_nll, leaves, atol=1e-6, rtol=1e-5)


def test_divergences_and_cross_entropy_match_finite_differences() -> None:
    torch.manual_seed(0)
    mean, std, weight = (torch.rand(*shape).double() for shape in ((2, 3, 4), (2, 3, 4), (2, 3)))
    leaves = [x.requires_grad_() for x in (mean, std + 0.1, weight)]

    def kls(mean: torch.Tensor, std: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return weighted_kls(mean, std, weight, (1, 0.0, 1.0), (3, -2.0, 0.5))

    assert torch.autograd.gradcheck(kls, leaves, atol=1e-6, rtol=1e-5)
    image, target = (torch.rand(2, 3, 4, 4).double().clamp(0.1, 0.9) for _ in range(2))

    def entropy(image: torch.Tensor) -> torch.Tensor:
        return bernoulli_cross_entropy(image, target, 1e-9)

    assert torch.autograd.gradcheck(entropy, image.requires_grad_(), atol=1e-6, rtol=1e-5)


def test_noise_of_the_rms_residual_is_the_most_likely() -> None:
    torch.manual_seed(0)
    image, target = torch.rand(2, 1, 300, dtype=torch.float64)
    best = (image - target).square().mean().sqrt().requires_grad_()
    (slope,) = torch.autograd.grad(normal_nll(image, target, best).sum(), best)
    assert float(slope) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("step", "success"),
    [(0, 1e-6), (3000, 0.0010), (5000, 0.0908), (6000, 0.4969), (8000, 0.9780), (10**6, 0.98765)],
)
def test_exponential_schedule_matches_the_table(step: int, success: float) -> None:
    actual = count_success(step, 1e6, 0.0125, 1000, "exponential")
    assert actual == pytest.approx(success, rel=0.01)


def test_log_linear_schedule_is_linear_then_constant() -> None:
    odds = [1 / count_success(t, 1.0, 0.01, 100, "log-linear") - 1 for t in (0, 50, 100, 999)]
    assert odds == pytest.approx([1.0, 0.1, 0.01, 0.01])


def test_squash_stays_away_from_0_and_1() -> None:
    values = squash(torch.tensor([-1e4, 0.0, 1e4]))
    torch.testing.assert_close(values, torch.tensor([4.54e-5, 0.5, 1 - 4.54e-5]), rtol=0, atol=1e-7)


def test_limited_logits_keep_gradients_that_lead_inwards() -> None:
    logits = torch.tensor([-9.0, -2.0, 1.0, 9.0], requires_grad=True)
    assert limited(logits, 3.0).tolist() == [-3.0, -2.0, 1.0, 3.0]
    for sign, passed in ((1.0, [0.0, 1.0, 1.0, 1.0]), (-1.0, [-1.0, -1.0, -1.0, 0.0])):
        (gradient,) = torch.autograd.grad(sign * limited(logits, 3.0).sum(), logits)
        assert gradient.tolist() == passed, "zero only where descent leads outwards"
