"""The compiled presence priors against plain torch in float64, and as operators of torch.

This file tests Numba, and Triton if there is a GPU; `test_interpreter.py` runs it in Triton's
interpreter.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor

from spairkit.backends import Backend
from spairkit.presence import (
    _log_odds_table,
    _summed_log_odds,
    presence_kl,
    presence_prior,
)

Inputs = tuple[Tensor, Tensor]


def make_inputs(
    num_images: int,
    num_cells: int,
    *,
    relaxed: bool,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Inputs:
    """Logits, and samples of images with few objects up to full ones."""
    random = torch.Generator().manual_seed(seed)
    share = torch.linspace(0.05, 0.95, max(num_images, 1))[:num_images, None]
    samples = (torch.rand(num_images, num_cells, generator=random) < share).float()
    if relaxed:
        samples = 0.02 + 0.96 * (samples + 0.3 * torch.rand(samples.shape, generator=random)).clamp(
            max=1
        )
    return 3 * torch.randn(samples.shape, generator=random).to(device), samples.to(device)


def values_and_gradients(
    logits: Tensor, samples: Tensor, success: float, *, relaxed: bool, backend: Backend
) -> list[Tensor]:
    """KL, and its gradients with respect to logits and, if relaxed, samples and success."""
    leaves = [logits.detach().requires_grad_()]
    samples, level = samples.detach(), torch.tensor(success, dtype=torch.double).to(logits.device)
    if relaxed:
        leaves += [samples.requires_grad_(), level.requires_grad_()]
    kl = presence_kl(leaves[0], samples, level, relaxed=relaxed, backend=backend)
    random = torch.Generator().manual_seed(1)
    cotangent = torch.rand(kl.shape, generator=random, dtype=torch.float32).to(kl)
    return [kl.detach(), *torch.autograd.grad(kl, leaves, cotangent)]


@pytest.mark.parametrize("success", [1e-6, 0.5, 0.99, 0.9999])
@pytest.mark.parametrize(
    ("relaxed", "num_cells"),
    # the prior of a single cell does not depend on samples
    [(False, 1), (False, 2), (False, 16), (False, 50), (True, 2), (True, 16), (True, 50)],
)
def test_kl_and_gradients_match_float64(
    relaxed: bool, num_cells: int, success: float, kernel: Backend, kernel_device: torch.device
) -> None:
    logits, samples = make_inputs(2, num_cells, relaxed=relaxed, device=kernel_device)
    exact = values_and_gradients(
        logits.double(), samples.double(), success, relaxed=relaxed, backend="torch"
    )
    found = values_and_gradients(logits, samples, success, relaxed=relaxed, backend=kernel)
    tolerance = 1e-4 if relaxed else 1e-6
    for name, actual, expected in zip(
        ["kl", "logits", "samples", "success"], found, exact, strict=False
    ):
        error = (actual.double() - expected).norm()
        assert error <= tolerance * expected.norm(), f"{name} is off by {error:.1e}"


@pytest.mark.parametrize("success", [1e-6, 0.9999])
@pytest.mark.parametrize("num_cells", [70, 1024])
def test_hard_prior_is_exact_to_float32(
    num_cells: int, success: float, kernel: Backend, kernel_device: torch.device
) -> None:
    if kernel == "triton" and kernel_device.type == "cpu":
        num_cells = min(num_cells, 260)  # two blocks: the interpreter takes long
    _, samples = make_inputs(3, num_cells, relaxed=False, device=kernel_device)
    exact = presence_prior(samples.double(), success, backend="torch")
    prior = presence_prior(samples, success, backend=kernel)
    torch.testing.assert_close(prior.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("num_cells", [40, 130])
def test_relaxed_prior_is_accurate_with_many_objects(
    num_cells: int, kernel: Backend, kernel_device: torch.device
) -> None:
    # as a probability, (1 - s)^c underflows in float32 from 20 objects on
    _, samples = make_inputs(1, num_cells, relaxed=True, device=kernel_device)
    exact = presence_prior(samples.double(), 0.99, relaxed=True, backend="torch")
    prior = presence_prior(samples, 0.99, relaxed=True, backend=kernel)
    torch.testing.assert_close(prior.double(), exact, rtol=1e-5, atol=0)


def test_relaxed_gradients_are_accurate_near_0_and_1(
    kernel: Backend, kernel_device: torch.device
) -> None:
    # the remaining count is then a small difference of nearly equal numbers
    logits, samples = make_inputs(1, 400, relaxed=False, device=kernel_device)
    samples = 0.02 + 0.96 * samples
    exact = values_and_gradients(
        logits.double(), samples.double(), 0.9999, relaxed=True, backend="torch"
    )
    found = values_and_gradients(logits, samples, 0.9999, relaxed=True, backend=kernel)
    for actual, expected in zip(found, exact, strict=True):
        assert (actual.double() - expected).norm() <= 1e-4 * expected.norm()


def test_relaxed_gradients_are_accurate_for_tiny_samples(
    kernel: Backend, kernel_device: torch.device
) -> None:
    if kernel == "triton":
        pytest.skip("float32 sums with whole numbers lose terms below 1e-8")
    logits = torch.zeros(1, 3, device=kernel_device)
    samples = torch.tensor([[1e-14, 1e-14, 0.3]], device=kernel_device)
    exact = values_and_gradients(
        logits.double(), samples.double(), 0.02, relaxed=True, backend="torch"
    )
    found = values_and_gradients(logits, samples, 0.02, relaxed=True, backend=kernel)
    for actual, expected in zip(found, exact, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("relaxed", [False, True])
def test_default_dtype_does_not_change_results(
    relaxed: bool,
    kernel: Backend,
    kernel_device: torch.device,
    float64_by_default: Callable[[], AbstractContextManager[None]],
) -> None:
    logits, samples = make_inputs(2, 9, relaxed=relaxed, device=kernel_device)
    expected = values_and_gradients(logits, samples, 0.9, relaxed=relaxed, backend=kernel)
    with float64_by_default():
        found = values_and_gradients(logits, samples, 0.9, relaxed=relaxed, backend=kernel)
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("relaxed", [False, True])
def test_autocast_does_not_change_results(
    relaxed: bool, kernel: Backend, kernel_device: torch.device
) -> None:
    logits, samples = make_inputs(2, 9, relaxed=relaxed, device=kernel_device)
    expected = values_and_gradients(logits, samples, 0.9, relaxed=relaxed, backend=kernel)
    with torch.autocast(kernel_device.type, torch.bfloat16):
        found = values_and_gradients(logits, samples, 0.9, relaxed=relaxed, backend=kernel)
    for actual, wanted in zip(found, expected, strict=True):
        assert torch.equal(actual, wanted)


def test_more_cells_than_the_walk_of_triton_supports_use_torch(
    kernel: Backend, kernel_device: torch.device
) -> None:
    samples = torch.zeros(1, 1025, device=kernel_device)
    if kernel == "triton":
        with pytest.raises(
            ValueError, match="backend 'triton' supports at most 1024 cells of relaxed samples, got"
        ):
            presence_kl(samples, samples, 0.5, relaxed=True, backend=kernel)
        return  # plain torch would loop over 1,025 cells
    kl = presence_kl(samples, samples, 0.5, relaxed=True)
    exact = presence_kl(samples.double(), samples.double(), 0.5, backend="torch")
    torch.testing.assert_close(kl.double(), exact, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("success", [1e-6, 0.5, 0.98])
def test_sums_of_many_cells_equal_the_table(
    success: float, kernel: Backend, kernel_device: torch.device
) -> None:
    """Of more cells than a table serves; with s near 0, sums would exceed the largest float."""
    num_cells = 1200
    _, samples = make_inputs(2, num_cells, relaxed=False, device=kernel_device)
    samples[1, :200] = 1
    if kernel == "triton" and kernel_device.type == "cpu":
        samples = samples[1:]  # whose sums are the greatest: the interpreter is slow
    table = _log_odds_table(
        torch.tensor(1 - success, dtype=torch.double, device=kernel_device), num_cells
    )
    before = (samples.cumsum(1) - samples).long()
    exact = table[torch.arange(num_cells, device=kernel_device), before]
    prior = presence_prior(samples, success, backend=kernel)
    torch.testing.assert_close(prior.double(), torch.sigmoid(exact), rtol=1e-6, atol=0)
    plain = _summed_log_odds(1 - success, before)
    torch.testing.assert_close(plain, exact, rtol=0, atol=1e-10)


@pytest.mark.parametrize("relaxed", [False, True])
def test_hard_samples_may_have_any_dtype(
    relaxed: bool, kernel: Backend, kernel_device: torch.device
) -> None:
    logits, samples = make_inputs(2, 9, relaxed=False, device=kernel_device)
    expected = presence_kl(logits, samples, 0.9, relaxed=relaxed, backend=kernel)
    for dtype in (torch.float16, torch.bfloat16):
        kl = presence_kl(logits, samples.to(dtype), 0.9, relaxed=relaxed, backend=kernel)
        assert torch.equal(kl, expected)


@pytest.mark.parametrize("relaxed", [False, True])
def test_extreme_inputs_give_finite_results(
    relaxed: bool, kernel: Backend, kernel_device: torch.device
) -> None:
    samples = torch.tensor([[0.0] * 6, [1.0] * 6, [1, 0, 1, 0, 1, 1]]).to(kernel_device)
    logits = torch.tensor([-1e3, -40.0, -1e-8, 0.0, 40.0, 1e3]).expand(3, 6).to(kernel_device)
    for success in (1e-6, 1 - 1e-6):
        found = values_and_gradients(logits, samples, success, relaxed=relaxed, backend=kernel)
        assert all(tensor.isfinite().all() for tensor in found)
        assert found[0].min() >= -1e-4


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")  # the interpreter
@pytest.mark.parametrize("relaxed", [False, True])
def test_nan_propagates(relaxed: bool, kernel: Backend, kernel_device: torch.device) -> None:
    logits, samples = make_inputs(3, 6, relaxed=relaxed, device=kernel_device)
    samples[1, 2] = torch.nan
    logits[2, 4] = torch.nan
    kl = presence_kl(logits, samples, 0.5, relaxed=relaxed, backend=kernel)
    assert kl[1, 3:].isnan().all()
    assert kl[1, :2].isfinite().all()
    assert kl[2].isnan().tolist() == [False] * 4 + [True, False]
    assert kl[0].isfinite().all()


@pytest.mark.parametrize("success", [-0.5, 0.0, 1.0, 1.5])
def test_success_outside_its_range_gives_nan_where_it_is_not_checked(
    success: float, kernel: Backend, kernel_device: torch.device
) -> None:
    logits, samples = make_inputs(2, 5, relaxed=False, device=kernel_device)
    level = torch.tensor(success, dtype=torch.double, device=kernel_device)
    kl, prior_logit = torch.ops.spairkit.presence_kl(logits, samples, level, kernel)
    assert kl.isnan().all()
    assert prior_logit.isnan().all()


@pytest.mark.parametrize("relaxed", [False, True])
@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_empty_batches_are_supported(
    shape: tuple[int, int], relaxed: bool, kernel: Backend, kernel_device: torch.device
) -> None:
    empty = torch.zeros(shape, device=kernel_device, requires_grad=True)
    kl = presence_kl(empty, empty, 0.5, relaxed=relaxed, backend=kernel)
    kl.sum().backward()
    assert kl.shape == shape


@pytest.mark.parametrize("relaxed", [False, True])
def test_strides_do_not_change_bits(
    relaxed: bool, kernel: Backend, kernel_device: torch.device
) -> None:
    inputs = make_inputs(2, 6, relaxed=relaxed, device=kernel_device)
    logits, samples = (torch.stack([x, 1 - x], -1)[..., 0] for x in inputs)
    found = values_and_gradients(logits, samples, 0.9, relaxed=relaxed, backend=kernel)
    expected = values_and_gradients(*inputs, 0.9, relaxed=relaxed, backend=kernel)
    assert all(map(torch.equal, found, expected))


def awkward_inputs(relaxed: bool, device: torch.device) -> list[Inputs]:
    """Strided inputs, views, empty inputs, and inputs of size 1."""
    logits, samples = make_inputs(2, 6, relaxed=relaxed, device=device)
    return [
        (logits, samples),
        make_inputs(1, 1, relaxed=relaxed, device=device),
        make_inputs(1, 5, relaxed=relaxed, device=device),
        make_inputs(3, 1, relaxed=relaxed, device=device),
        make_inputs(0, 4, relaxed=relaxed, device=device),
        (logits.T.contiguous().T, samples),
        (logits, samples.T.contiguous().T),
        (logits[:, ::2], samples[:, 1::2]),
        (logits[:1].expand(2, 6), samples[:1].expand(2, 6)),
        (logits[:, :1].expand(2, 6), samples[:, :1].expand(2, 6)),
        (logits.bfloat16(), samples.half()),
    ]


@pytest.mark.parametrize("index", range(11))
def test_operators_pass_opcheck(index: int, kernel: Backend, kernel_device: torch.device) -> None:
    operators = torch.ops.spairkit
    success = torch.tensor(0.9, dtype=torch.double, device=kernel_device)
    logits, samples = awkward_inputs(False, kernel_device)[index]
    leaf = logits.detach().requires_grad_()
    torch.library.opcheck(operators.presence_kl.default, (leaf, samples, success, kernel))

    _, samples = awkward_inputs(True, kernel_device)[index]
    leaf, level = samples.detach().requires_grad_(), success.clone().requires_grad_()
    torch.library.opcheck(operators.count_posterior.default, (leaf, level, kernel))
    prior_logit, saved = operators.count_posterior(samples, success, kernel)
    # the gradient of a sum is one expanded number
    grad = prior_logit.new_ones(()).expand(samples.shape) if index % 2 else prior_logit
    torch.library.opcheck(
        operators.count_posterior_backward.default, (grad, samples, success, saved, kernel)
    )


@pytest.mark.parametrize("relaxed", [False, True])
@pytest.mark.parametrize("by_tensor", [False, True])
def test_operators_compile_without_graph_breaks(
    by_tensor: bool, relaxed: bool, kernel: Backend, kernel_device: torch.device
) -> None:
    logits, samples = make_inputs(2, 7, relaxed=relaxed, device=kernel_device)
    success = torch.tensor(0.9, device=kernel_device) if by_tensor else 0.9

    def loss(logits: Tensor, samples: Tensor) -> Tensor:
        return presence_kl(logits, samples, success, relaxed=relaxed, backend=kernel).sum()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaf = logits.detach().requires_grad_()
        value = function(leaf, samples)
        results.append([value, *torch.autograd.grad(value, leaf)])
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager)


def test_hard_kl_has_second_derivatives(kernel: Backend, kernel_device: torch.device) -> None:
    logits, samples = make_inputs(1, 3, relaxed=False, device=kernel_device)
    reference: Backend = "torch"
    hessians = [
        torch.autograd.functional.hessian(
            lambda x, b=backend: presence_kl(x, samples.to(x), 0.6, backend=b).sum(),
            logits.to(dtype),
        )
        for backend, dtype in ((kernel, torch.float32), (reference, torch.float64))
    ]
    torch.testing.assert_close(hessians[0].double(), hessians[1], rtol=1e-4, atol=1e-6)


def test_second_derivatives_of_relaxed_samples_are_refused(
    kernel: Backend, kernel_device: torch.device
) -> None:
    logits, samples = make_inputs(1, 3, relaxed=True, device=kernel_device)
    samples.requires_grad_()
    kl = presence_kl(logits, samples, 0.6, relaxed=True, backend=kernel)
    (grad,) = torch.autograd.grad(kl.sum(), samples, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivatives.*use backend='torch'"):
        grad.sum().backward()


def test_gradient_of_success_for_hard_samples_needs_torch(
    kernel: Backend, kernel_device: torch.device
) -> None:
    logits, samples = make_inputs(1, 3, relaxed=False, device=kernel_device)
    success = torch.tensor(0.6, device=kernel_device, requires_grad=True)
    with pytest.raises(ValueError, match="no gradient of success for hard samples"):
        presence_kl(logits, samples, success, backend=kernel)
    presence_kl(logits, samples, success).sum().backward()
    assert success.grad is not None
