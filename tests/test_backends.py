"""The choice of the backend by device, and warnings if Numba or Triton is missing."""

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numba
import pytest
import torch

from spairkit import backends
from spairkit.backends import chosen_backend
from spairkit.kernels import threads
from spairkit.presence import presence_kl
from spairkit.rendering import render

ROOT = Path(__file__).parent.parent


@pytest.fixture
def _untried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every backend untried."""
    monkeypatch.setattr(backends, "_tried", {})


def test_auto_backend_depends_on_device_and_dtype() -> None:
    assert chosen_backend("auto", torch.zeros(1), "x") == "cpu"
    assert chosen_backend("auto", torch.zeros(1).bfloat16(), "x") == "cpu"
    assert chosen_backend("auto", torch.zeros(1).double(), "x") == "torch"
    assert chosen_backend("auto", torch.zeros(1, device="meta"), "x") == "torch"


@pytest.mark.usefixtures("_untried")
def test_broken_numba_falls_back_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise OSError("libllvmlite.so: cannot open shared object file")

    monkeypatch.setattr(threads, "probe", broken)
    logits = torch.zeros(2, 3)
    with pytest.warns(RuntimeWarning, match=r"numba does not work here.*OSError: libllvmlite"):
        fallen = presence_kl(logits, logits, 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = presence_kl(logits, logits, 0.5)
    assert torch.equal(fallen, again)
    assert torch.equal(fallen, presence_kl(logits, logits, 0.5, backend="torch"))


@pytest.mark.usefixtures("_untried")
@pytest.mark.parametrize("relaxed", [False, True])
def test_auto_backend_works_under_torch_compile(relaxed: bool) -> None:
    def loss(rgba: torch.Tensor, flat: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        image = render(rgba, boxes, flat, flat, torch.zeros(1, 1, 5, 5))
        return image.sum() + presence_kl(flat, flat, 0.5, relaxed=relaxed).sum()

    inputs = torch.rand(1, 2, 3, 3, 2), torch.rand(1, 2), torch.tensor([[[0.0, 0, 4, 4]] * 2])
    traced = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(traced(*inputs), loss(*inputs))


def test_functions_compile_without_a_writable_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def njit_without_cache(*args: Any, cache: bool = False, **kwargs: Any) -> Any:
        if cache:
            raise RuntimeError("cannot cache function: no locator available for file")
        return numba.njit(*args, **kwargs)

    def successor(number: int) -> int:
        return number + 1

    monkeypatch.setattr(threads, "njit", njit_without_cache)
    assert threads.compiled(successor)(4) == 5


@pytest.mark.parametrize("num_threads", [1, 2, 3, 8])
@pytest.mark.parametrize("num_images", [0, 1, 5])
def test_every_image_is_computed_once(num_images: int, num_threads: int) -> None:
    done = [0] * num_images

    def count(start: int, stop: int) -> None:
        for index in range(start, stop):
            done[index] += 1

    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    threads.over_images(count, num_images)
    torch.set_num_threads(before)
    assert done == [1] * num_images


def test_compilers_are_imported_on_demand() -> None:
    code = (
        "import sys, spairkit.rendering, spairkit.presence; "
        "print(sorted({'numba', 'triton'} & set(sys.modules)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "[]"
