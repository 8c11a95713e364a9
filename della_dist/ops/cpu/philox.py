"""Philox4x32-10 as a Numba kernel: the layout of `della_dist.ops.philox`."""

from __future__ import annotations

import numpy as np

from della_dist.ops.cpu.intrinsics import wide_vectors
from della_dist.ops.cpu.support import (
    Array,
    Number,
    inner,
)

_LOW_32 = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)
_FACTOR_0 = np.uint64(0xD2511F53)
_FACTOR_1 = np.uint64(0xCD9E8D57)
_WEYL_0 = np.uint64(0x9E3779B9)
_WEYL_1 = np.uint64(0xBB67AE85)


@inner
def philox_fill(key: Number, first: Number, pairs: Array) -> None:
    """Write the words of consecutive counters.

    Parameters
    ----------
    key
        uint64, the key of the tensor and expert.
    first
        uint64, the first counter; its words belong to the elements from ``4 * first`` up.
    pairs
        (2 * K,) uint64, written: the words of K counters, two to a number, the lower first.
    """
    wide_vectors()
    # Zero, which LLVM cannot know. Without it the last round's products are computed again, by an
    # instruction several times slower that multiplies by the factor shifted to the upper half.
    zero = np.uint64(pairs.size) >> np.uint64(48)
    for j in range(pairs.size >> 1):
        # Numbers of 64 bits whose upper half may be junk: a multiplication of 32-bit numbers
        # takes the lower halves, and vector units have just that instruction.
        counter = first + np.uint64(j)
        x0, x1 = counter, counter >> _32
        x2, x3 = np.uint64(0), np.uint64(0)
        k0, k1 = key, key >> _32
        for _ in range(10):
            product0 = _FACTOR_0 * (x0 & _LOW_32)
            product1 = _FACTOR_1 * (x2 & _LOW_32)
            x0 = (product1 >> _32) ^ x1 ^ k0
            x2 = (product0 >> _32) ^ x3 ^ k1
            x1, x3 = product1, product0
            k0 = k0 + _WEYL_0
            k1 = k1 + _WEYL_1
        pairs[2 * j] = (x0 & _LOW_32) | ((x1 ^ zero) << _32)
        pairs[2 * j + 1] = (x2 & _LOW_32) | ((x3 ^ zero) << _32)
