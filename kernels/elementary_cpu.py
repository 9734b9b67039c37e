"""exp and log in float32 for loops that LLVM turns into vector instructions.

Calls of the C library's are not vectorised, and take seven times as long. Polynomials after Cody
and Waite's reduction; relative errors below 3e-7, since LLVM may reassociate. NaN stays NaN.
"""

import numpy as np

from spairkit.kernels.threads import inlined

_HALF = np.float32(0.5)
_ONE = np.float32(1.0)
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
