"""Random integers by counter: a pure function of a key, equal on every device and machine."""

import torch
from torch import Tensor


def _signed(word: int) -> int:
    """The int64 with the lower 64 bits of an integer."""
    return ((word + (1 << 63)) & ((1 << 64) - 1)) - (1 << 63)


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_FIRST = _signed(0xBF58476D1CE4E5B9)
_SECOND = _signed(0x94D049BB133111EB)


def _mix(bits: Tensor) -> Tensor:
    """The finaliser of splitmix64: a bijection of 64-bit words. Products wrap around."""
    bits = (bits ^ ((bits >> 30) & 0x3FFFFFFFF)) * _FIRST
    bits = (bits ^ ((bits >> 27) & 0x1FFFFFFFFF)) * _SECOND
    return bits ^ ((bits >> 31) & 0x1FFFFFFFF)


def hashed(key: Tensor, *counters: Tensor | int) -> Tensor:
    """64 random bits as int64 for each key and its counters, which broadcast together.

    Each counter moves the key along splitmix64's sequence and scrambles it, so keys that differ
    in one counter alone never collide.

    Source: Steele, Lea and Flood, Fast splittable pseudorandom number generators (2014).
    """
    for counter in counters:
        step = (counter + 1) * _GOLDEN
        key = _mix(key + (_signed(step) if isinstance(step, int) else step))
    return key


def below(bits: Tensor, bound: Tensor | int) -> Tensor:
    """Integers in [0, bound) from random bits, int64; 0 where bound is 0.

    `bound` is at most 2^31. The upper 32 bits are scaled, so no value is likelier than another
    by more than bound / 2^32 of itself.
    """
    return (((bits >> 32) & 0xFFFFFFFF) * bound) >> 32


def seeded(*words: int) -> Tensor:
    """A 0-d key on the CPU from a few non-negative integers."""
    return hashed(torch.zeros((), dtype=torch.int64), *words)
