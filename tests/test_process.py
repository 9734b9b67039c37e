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
    backends = torch.backends
    return (
        backends.cuda.matmul.fp32_precision,
        backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
        backends.cudnn.deterministic,
    )


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
