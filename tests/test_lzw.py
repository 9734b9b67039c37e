"""TIFF's LZW against imagecodecs; damaged codes stay inside of the output."""

import imagecodecs
import numpy as np
import pytest
from numpy.typing import NDArray

from spairkit.kernels.lzw_cpu import decode

Bytes = NDArray[np.uint8]


def encoded(data: Bytes) -> Bytes:
    return np.frombuffer(imagecodecs.lzw_encode(data.tobytes()), np.uint8)


def samples(number: int) -> list[Bytes]:
    """Runs and noise of every length and number of values: codes of 9 to 12 bits, full tables."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(number):
        length, top = int(rng.integers(1, 40_000)), int(rng.choice([1, 2, 5, 40, 256]))
        data = np.repeat(rng.integers(0, top, length), rng.choice([1, 1, 9])).astype(np.uint8)
        found.append(data)
    return found


@pytest.mark.parametrize("data", samples(40), ids=len)
def test_strings_are_those_that_were_encoded(data: Bytes) -> None:
    out = np.zeros(len(data), np.uint8)
    assert decode(encoded(data), out) == len(data)
    assert np.array_equal(out, data)


def test_decoding_ends_at_the_end_of_the_output() -> None:
    data = samples(1)[0]
    for length in (0, 1, 2, 100, len(data) - 1):
        out = np.zeros(len(data), np.uint8)
        assert decode(encoded(data), out[:length]) == length
        assert np.array_equal(out[:length], data[:length])
        assert not out[length:].any()


def test_damaged_codes_write_nothing_beyond_the_output() -> None:
    rng = np.random.default_rng(1)
    for data in samples(40):
        for _ in range(20):
            codes = encoded(data).copy()
            codes[rng.integers(0, len(codes), 3)] = rng.integers(0, 256, 3)
            out = np.zeros(len(data) + 64, np.uint8)
            written = decode(codes[: rng.integers(1, len(codes) + 1)], out[: len(data)])
            assert -1 <= written <= len(data)
            assert not out[len(data) :].any()
