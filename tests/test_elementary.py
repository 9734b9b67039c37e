"""exp and log of the CPU kernels, against float64."""

from typing import Any

import numpy as np
import pytest

from spairkit.kernels.elementary_cpu import exp, log
from spairkit.kernels.threads import compiled


def _exp_of_all(x: Any, y: Any) -> None:
    for i in range(x.size):
        y[i] = exp(x[i])


def _log_of_all(x: Any, y: Any) -> None:
    for i in range(x.size):
        y[i] = log(x[i])


_exp_all, _log_all = compiled(_exp_of_all), compiled(_log_of_all)


def test_exp_is_right_to_a_bit_or_two_where_results_are_normal() -> None:
    x = np.linspace(-87, 88, 200_001).astype(np.float32)
    y = np.empty_like(x)
    _exp_all(x, y)
    np.testing.assert_allclose(y, np.exp(x.astype(np.float64)), rtol=3e-7)


def test_log_is_right_to_a_bit_or_two_over_all_normal_numbers() -> None:
    spread = np.exp(np.linspace(-87, 88, 200_001))
    near_one = np.linspace(0.5, 2, 200_001)
    for x in (spread.astype(np.float32), near_one.astype(np.float32)):
        y = np.empty_like(x)
        _log_all(x, y)
        np.testing.assert_allclose(y, np.log(x.astype(np.float64)), rtol=3e-7, atol=1e-9)


@pytest.mark.parametrize("function", [_exp_all, _log_all])
def test_nan_stays_nan(function: Any) -> None:
    x = np.array([np.nan, 1.0] * 20, np.float32)
    y = np.empty_like(x)
    function(x, y)
    assert np.isnan(y[::2]).all()
    assert np.isfinite(y[1::2]).all()


def test_beyond_the_range_of_normal_numbers_exp_stays_at_its_ends() -> None:
    x = np.array([-np.inf, -1e4, 1e4, np.inf], np.float32)
    y = np.empty_like(x)
    _exp_all(x, y)
    np.testing.assert_allclose(y, np.exp([-87.0, -87.0, 88.0, 88.0]), rtol=3e-7)
