"""What torch is told of a GPU's float32, on any machine: the settings are there without one."""

import pytest
import torch

from spairkit.precision import Precision, computing_in

CUDA = torch.device("cuda")


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
def test_a_gpu_computes_as_it_is_told_for_a_while(precision: Precision, products: str) -> None:
    before = settings()
    with computing_in(precision, CUDA):
        assert settings() == (products, products, True)
        with computing_in("float32", CUDA):
            assert settings() == ("ieee", "ieee", True)
        assert settings() == (products, products, True)
    assert settings() == before


def test_what_goes_wrong_meanwhile_brings_the_settings_back() -> None:
    before = settings()
    with pytest.raises(KeyError), computing_in("tf32", CUDA):
        raise KeyError
    assert settings() == before


def test_a_cpu_is_told_nothing() -> None:
    before = settings()
    with computing_in("tf32", torch.device("cpu")):
        assert settings() == before
