"""exp, log and the clipped sigmoid for compiled loops; LLVM turns them into vector instructions.

Calls into the C library are not vectorised and take seven times as long. exp and log are
polynomials after Cody and Waite's range reduction. Relative errors stay below 3e-7 in float32, as
LLVM may reassociate, and below 3e-14 in float64. NaN stays NaN.
"""

import numpy as np

from spairkit.kernels.constants import LOGIT_LIMIT
from spairkit.kernels.threads import inlined

_ZERO = np.float32(0.0)
_HALF = np.float32(0.5)
_ONE = np.float32(1.0)
_LIMIT = np.float32(LOGIT_LIMIT)
_LOG2_E = np.float32(1.44269504)
_LN2_HIGH = np.float32(0.693359375)  # few bits, so that its product with an exponent is exact
_LN2_LOW = np.float32(-2.12194440e-4)
_LEAST = np.float32(-87.0)
_GREATEST = np.float32(88.0)
_ROOT_HALF = np.float32(0.70710678)
_BIAS = np.int32(127)
_FRACTION_BITS = np.int32(23)
_FRACTION = np.int32(0x007FFFFF)
_HALF_BITS = np.int32(0x3F000000)

_LOG2_E_64 = 1.4426950408889634
_LN2_HIGH_64 = 6.93145751953125e-1
_LN2_LOW_64 = 1.42860682030941723212e-6
_LEAST_64, _GREATEST_64 = -708.0, 709.0
_ROOT_HALF_64 = 0.7071067811865476
_BIAS_64 = np.int64(1023)
_FRACTION_BITS_64 = np.int64(52)
_FRACTION_64 = np.int64(0x000FFFFFFFFFFFFF)
_HALF_BITS_64 = np.int64(0x3FE0000000000000)


@inlined
def exp(x):
    """e^x of a float32; x is clipped to [-87, 88], where results are normal numbers."""
    x = min(max(x, _LEAST), _GREATEST)
    power = np.floor(x * _LOG2_E + _HALF)
    r = x - power * _LN2_HIGH - power * _LN2_LOW
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + _ONE
    bits = np.int32((np.int32(power) + _BIAS) << _FRACTION_BITS)
    return p * bits.view(np.float32)


@inlined
def log(x):
    """ln x of a float32 that is a normal number above 0 (or NaN)."""
    bits = np.float32(x).view(np.int32)
    power = np.float32((bits >> _FRACTION_BITS) - np.int32(126))
    m = np.int32((bits & _FRACTION) | _HALF_BITS).view(np.float32)  # [.5, 1)
    below = m < _ROOT_HALF
    power = power - _ONE if below else power
    m = m + m - _ONE if below else m - _ONE
    p = np.float32(7.0376836292e-2)
    p = p * m - np.float32(1.1514610310e-1)
    p = p * m + np.float32(1.1676998740e-1)
    p = p * m - np.float32(1.2420140846e-1)
    p = p * m + np.float32(1.4249322787e-1)
    p = p * m - np.float32(1.6668057665e-1)
    p = p * m + np.float32(2.0000714765e-1)
    p = p * m - np.float32(2.4999993993e-1)
    p = p * m + np.float32(3.3333331174e-1)
    square = m * m
    p = m * square * p + power * _LN2_LOW - _HALF * square
    p = m + p + power * _LN2_HIGH
    return p if x == x else x


@inlined
def exp64(x):
    """e^x of a float64; x is clipped to [-708, 709], where results are normal numbers."""
    x = min(max(x, _LEAST_64), _GREATEST_64)
    power = np.floor(x * _LOG2_E_64 + 0.5)
    r = x - power * _LN2_HIGH_64 - power * _LN2_LOW_64
    p = 1.0 / 6227020800.0  # Taylor: |r| <= ln(2) / 2
    p = p * r + 1.0 / 479001600.0
    p = p * r + 1.0 / 39916800.0
    p = p * r + 1.0 / 3628800.0
    p = p * r + 1.0 / 362880.0
    p = p * r + 1.0 / 40320.0
    p = p * r + 1.0 / 5040.0
    p = p * r + 1.0 / 720.0
    p = p * r + 1.0 / 120.0
    p = p * r + 1.0 / 24.0
    p = p * r + 1.0 / 6.0
    p = p * r + 0.5
    p = p * r * r + r + 1.0
    # by way of int32: not every processor converts vectors of float64 to int64
    bits = np.int64((np.int64(np.int32(power)) + _BIAS_64) << _FRACTION_BITS_64)
    return p * bits.view(np.float64)


@inlined
def log64(x):
    """ln x of a float64 that is a normal number above 0 (or NaN)."""
    bits = np.float64(x).view(np.int64)
    power = np.float64(np.int32(bits >> _FRACTION_BITS_64) - np.int32(1022))
    m = np.int64((bits & _FRACTION_64) | _HALF_BITS_64).view(np.float64)  # [.5, 1)
    below = m < _ROOT_HALF_64
    power = power - 1.0 if below else power
    m = m + m if below else m
    s = (m - 1.0) / (m + 1.0)  # ln m = 2 artanh s, |s| < .172
    z = s * s
    p = 2.0 / 19.0
    p = p * z + 2.0 / 17.0
    p = p * z + 2.0 / 15.0
    p = p * z + 2.0 / 13.0
    p = p * z + 2.0 / 11.0
    p = p * z + 2.0 / 9.0
    p = p * z + 2.0 / 7.0
    p = p * z + 2.0 / 5.0
    p = p * z + 2.0 / 3.0
    p = (p * z * s + power * _LN2_LOW_64) + 2.0 * s + power * _LN2_HIGH_64
    return p if x == x else x


@inlined
def clip(logit):
    """The logit, clipped to [-10, 10]."""
    if logit > _LIMIT:
        logit = _LIMIT
    elif logit < -_LIMIT:
        logit = -_LIMIT
    return logit


@inlined
def squash(logit):
    """1 / (1 + e^-logit) of the clipped logit."""
    return _ONE / (_ONE + exp(-clip(logit)))


@inlined
def clip_backward(logit, grad):
    """The gradient of a logit from that of the clipped one."""
    return grad if abs(logit) <= _LIMIT else _ZERO


@inlined
def slope(logit, squashed):
    """The derivative of `squash`. The squashed logit alone cannot tell whether it was clipped."""
    return clip_backward(logit, squashed * (_ONE - squashed))
