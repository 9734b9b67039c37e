"""Operators call kernels directly without gradients, otherwise through torch's dispatcher."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from spairkit.kernels.dispatch import _is_watched
from spairkit.presence import presence_kl
from spairkit.rendering import render

ROOT = Path(__file__).parent.parent


def route(*arguments: Any) -> str:
    return "operator" if _is_watched(arguments) else "kernel"


def test_kernel_is_called_directly_without_gradients() -> None:
    x = torch.zeros(2, requires_grad=True)
    assert route(x.detach(), 0.0) == "kernel"
    with torch.no_grad():
        assert route(x, 0.0) == "kernel"
    with torch.inference_mode():
        assert route(torch.zeros(2)) == "kernel"


def test_operator_is_called_with_gradients() -> None:
    assert route(0.0, torch.zeros(2), torch.zeros(2, requires_grad=True)) == "operator"


# torch scripts its own decompositions once it sees a dual number
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_operator_is_called_with_forward_derivatives() -> None:
    with forward_ad.dual_level():
        assert route(forward_ad.make_dual(torch.zeros(2), torch.ones(2))) == "operator"


def test_operator_is_called_under_a_dispatch_mode(
    no_sync: type[TorchDispatchMode],
) -> None:
    with no_sync():
        assert route(torch.zeros(2)) == "operator"


def test_operator_is_called_for_tensor_subclasses() -> None:
    class Tagged(Tensor):
        pass

    assert route(torch.zeros(2).as_subclass(Tagged)) == "operator"
    assert route(torch.nn.Parameter(torch.zeros(2), requires_grad=False)) == "kernel"


def test_trace_contains_the_operator() -> None:
    def image(rgba: Tensor) -> Tensor:
        flat = torch.ones(1, 1)
        return render(rgba, torch.tensor([[[0.0, 0, 4, 4]]]), flat, flat, torch.zeros(1, 1, 5, 5))

    if torch.cuda.is_available():
        pytest.skip("the trace contains CPU constants")
    traced = make_fx(image, tracing_mode="fake")(torch.rand(1, 1, 3, 3, 2))
    assert any("spairkit.render" in str(node.target) for node in traced.graph.nodes)


@pytest.mark.parametrize("relaxed", [False, True])
def test_both_routes_are_bit_identical(relaxed: bool) -> None:
    logits, samples = torch.randn(2, 9), torch.rand(2, 9)
    direct = presence_kl(logits, samples, 0.3, relaxed=relaxed)
    recorded = presence_kl(logits.requires_grad_(), samples, 0.3, relaxed=relaxed)
    assert torch.equal(direct, recorded.detach())


def test_detection_does_not_import_torch_dynamo() -> None:
    code = """
import sys, torch
from spairkit.presence import presence_prior
from spairkit.rendering import render
flat = torch.ones(1, 1)
presence_prior(flat, 0.5), presence_prior(flat, 0.5, relaxed=True)
render(torch.rand(1, 1, 3, 3, 2), torch.tensor([[[0.0, 0, 4, 4]]]), flat, flat,
       torch.zeros(1, 1, 5, 5))
print("torch._dynamo" in sys.modules)
"""
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "False"
