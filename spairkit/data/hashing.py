"""Random integers by counter: a pure function of a key, equal on every device and machine."""

from typing import overload

import torch
from torch import Tensor

from spairkit.kernels.constants import SPLITMIX64


def _signed(word: int) -> int:
    """The int64 with the lower 64 bits of an integer."""
    return ((word + (1 << 63)) & ((1 << 64) - 1)) - (1 << 63)


_GOLDEN, _FIRST, _SECOND = (_signed(word) for word in SPLITMIX64)


def _mix(bits: Tensor) -> Tensor:
    """The finaliser of splitmix64: a bijection of 64-bit words. Products wrap around."""
    bits = (bits ^ ((bits >> 30) & 0x3FFFFFFFF)) * _FIRST
    bits = (bits ^ ((bits >> 27) & 0x1FFFFFFFFF)) * _SECOND
    return bits ^ ((bits >> 31) & 0x1FFFFFFFF)


def hashed(key: Tensor, counter: Tensor | int) -> Tensor:
    """64 random bits as int64 for each key and counter, which broadcast together.

    The counter moves the key along splitmix64's sequence and scrambles it; keys that differ in
    one counter alone never collide.

    Source: Steele, Lea and Flood, Fast splittable pseudorandom number generators (2014).
    """
    step = (counter + 1) * _GOLDEN
    return _mix(key + (_signed(step) if isinstance(step, int) else step))


def seeded(*words: int) -> Tensor:
    """A 0-d key on the CPU from a few integers."""
    key = torch.zeros((), dtype=torch.int64)
    for word in words:
        key = hashed(key, word)
    return key


def draws(key: Tensor, counter: Tensor | int) -> Tensor:
    """The upper half of `hashed`: integers in [0, 2^32) as int64, for `below`."""
    return (hashed(key, counter) >> 32) & 0xFFFFFFFF


@overload
def below(draw: int, bound: int) -> int: ...
@overload
def below(draw: Tensor, bound: Tensor | int) -> Tensor: ...
def below(draw: Tensor | int, bound: Tensor | int) -> Tensor | int:
    """Integers in [0, bound) from `draws`, int64 or one of Python's; 0 where bound is 0.

    No value is likelier than another by more than bound / 2^32 of itself; bound is below 2^31.
    """
    return (draw * bound) >> 32
