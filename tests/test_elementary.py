"""exp and log of the CPU kernels, against float64."""

from typing import Any

import numpy as np
import pytest

from spairkit.kernels.elementary_cpu import exp, exp64, log, log64
from spairkit.kernels.threads import compiled


def _exp_of_all(x: Any, y: Any) -> None:
    for i in range(x.size):
        y[i] = exp(x[i])


def _log_of_all(x: Any, y: Any) -> None:
    for i in range(x.size):
        y[i] = log(x[i])


def _exp64_of_all(x: Any, y: Any) -> None:
    for i in range(x.size):
        y[i] = exp64(x[i])


def _log64_of_all(x: Any, y: Any) -> None:
    for i in range(x.size):
        y[i] = log64(x[i])


_exp_all, _log_all = compiled(_exp_of_all), compiled(_log_of_all)
_exp64_all, _log64_all = compiled(_exp64_of_all), compiled(_log64_of_all)


def test_exp_is_accurate_to_two_bits_for_normal_results() -> None:
    x = np.linspace(-87, 88, 200_001).astype(np.float32)
    y = np.empty_like(x)
    _exp_all(x, y)
    np.testing.assert_allclose(y, np.exp(x.astype(np.float64)), rtol=3e-7)


def test_log_is_accurate_to_two_bits_for_normal_numbers() -> None:
    spread = np.exp(np.linspace(-87, 88, 200_001))
    near_one = np.linspace(0.5, 2, 200_001)
    for x in (spread.astype(np.float32), near_one.astype(np.float32)):
        y = np.empty_like(x)
        _log_all(x, y)
        np.testing.assert_allclose(y, np.log(x.astype(np.float64)), rtol=3e-7, atol=1e-9)


def test_exp_of_float64_is_accurate_to_13_digits() -> None:
    x = np.linspace(-708, 709, 200_001)
    y = np.empty_like(x)
    _exp64_all(x, y)
    np.testing.assert_allclose(y, np.exp(x), rtol=3e-14)


def test_log_of_float64_is_accurate_to_14_digits() -> None:
    for x in (np.exp(np.linspace(-708, 709, 200_001)), np.linspace(0.5, 2, 200_001)):
        y = np.empty_like(x)
        _log64_all(x, y)
        np.testing.assert_allclose(y, np.log(x), rtol=1e-14, atol=1e-17)


@pytest.mark.parametrize(
    ("function", "dtype"),
    [
        (_exp_all, np.float32),
        (_log_all, np.float32),
        (_exp64_all, np.float64),
        (_log64_all, np.float64),
    ],
)
def test_nan_propagates(function: Any, dtype: Any) -> None:
    x: Any = np.array([np.nan, 1.0] * 20, dtype)
    y = np.empty_like(x)
    function(x, y)
    assert np.isnan(y[::2]).all()
    assert np.isfinite(y[1::2]).all()


def test_exp_saturates_beyond_the_range_of_normal_numbers() -> None:
    x = np.array([-np.inf, -1e4, 1e4, np.inf], np.float32)
    y = np.empty_like(x)
    _exp_all(x, y)
    np.testing.assert_allclose(y, np.exp([-87.0, -87.0, 88.0, 88.0]), rtol=3e-7)
    wide = x.astype(np.float64)
    result = np.empty_like(wide)
    _exp64_all(wide, result)
    np.testing.assert_allclose(result, np.exp([-708.0, -708.0, 709.0, 709.0]), rtol=3e-14)
