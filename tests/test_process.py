"""Process settings: freed memory is reused; precision of float32 on a GPU."""

import subprocess
import sys

import pytest
import torch

from spairkit.backends import Precision, computing_in

CUDA = torch.device("cuda")
PROGRAM = """
import resource
import numpy as np
from spairkit.training.process import keep_freed_memory

assert keep_freed_memory()

def page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(1 << 25)  # 256 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

first, second = page_faults(), page_faults()
print(first, second)
"""


def settings() -> tuple[str, str, bool]:
    """Those of products, convolutions and determinism; torch's older flags must not differ."""
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    found = (
        products.fp32_precision,
        convolutions.conv.fp32_precision,  # type: ignore[attr-defined]
        convolutions.deterministic,
    )
    # reading one of these raises where it contradicts the newer settings
    assert products.allow_tf32 == (found[0] == "tf32")
    assert convolutions.allow_tf32 == (found[1] == "tf32")
    assert torch.get_float32_matmul_precision() == ("high" if found[0] == "tf32" else "highest")
    assert convolutions.rnn.fp32_precision == found[1]  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize(
    ("precision", "products"), [("float32", "ieee"), ("tf32", "tf32"), ("bf16", "ieee")]
)
def test_precision_holds_inside_the_context_only(precision: Precision, products: str) -> None:
    before = settings()
    with computing_in(precision, CUDA):
        assert settings() == (products, products, True)
        with computing_in("float32", CUDA):
            assert settings() == ("ieee", "ieee", True)
        assert settings() == (products, products, True)
    assert settings() == before


def test_precision_is_restored_after_an_error() -> None:
    before = settings()
    with pytest.raises(KeyError), computing_in("tf32", CUDA):
        raise KeyError
    assert settings() == before


def test_precision_of_the_user_is_restored_even_if_contradictory() -> None:
    products = torch.backends.cuda.matmul
    try:
        products.fp32_precision = "tf32"
        with pytest.raises(RuntimeError):
            assert products.allow_tf32
        with computing_in("float32", CUDA):
            assert settings() == ("ieee", "ieee", True)
        assert products.fp32_precision == "tf32"
    finally:
        products.allow_tf32 = False
        products.fp32_precision = "none"
    settings()


def test_precision_is_unchanged_on_a_cpu() -> None:
    before = settings()
    with computing_in("tf32", torch.device("cpu")):
        assert settings() == before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is Linux's")
def test_freed_memory_is_reused() -> None:
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
    )
    first, second = map(int, run.stdout.split())
    assert first > 100
    assert second < first / 10
