"""Ranking of magnitudes that use too many bits to count, in Numba: by pairs or by radix sort."""

from __future__ import annotations

import numpy as np

from della_dist.ops.cpu.intrinsics import like
from della_dist.ops.cpu.support import (
    Array,
    Number,
    Pack,
    inner,
)

#: Counters of all digits together: eight of 11 bits.
NUM_DIGIT_COUNTERS = 8 << 11


@inner
def rank_pairs(n: Number, scratch: Pack) -> Number:
    """Rank `n` keys by comparing every pair; arguments and result as `rank_sorted`."""
    keys, _keys_b, _order, twice_rank, _digits = scratch
    keys, twice_rank = keys[:n], twice_rank[:n]
    # Every key counts itself once; that is taken off beforehand.
    twice_rank[:] = like(twice_rank[0], -1)
    for j in range(n):
        other = keys[j]
        for i in range(n):
            below = np.uint32(np.uint32(other < keys[i]) + np.uint32(other <= keys[i]))
            twice_rank[i] = like(twice_rank[i], twice_rank[i] + below)
    return False


@inner
def rank_sorted(n: Number, num_bits: Number, scratch: Pack) -> Number:
    """Rank `n` keys by a radix sort.

    Parameters
    ----------
    n
        How many keys there are; n > 0.
    num_bits
        uint64: how many bits the largest key has.
    scratch
        ``(keys_a, keys_b, order_a, order_b, digits)``: the first n numbers of keys_a and
        order_a are the keys and the elements they belong to, the others are free. All are
        overwritten.

    Returns
    -------
    bool
        Where the result is: (n,) elements, in any order, and (n,) twice the mean rank of each.
        In order_b and order_a where True, else in order_a and order_b.
    """
    keys_a, keys_b, order_a, order_b, digits = scratch
    widest = np.uint64(8 if n < 4096 else 11)
    num_digits = (num_bits + widest - np.uint64(1)) // widest
    width = (num_bits + num_digits - np.uint64(1)) // num_digits
    keys, order = keys_a[:n], order_a[:n]
    keys_to, order_to = keys_b[:n], order_b[:n]
    _count_digits(keys, num_digits, width, digits)
    for digit in range(num_digits):
        starts = digits[(digit << width) : ((digit + np.uint64(1)) << width)]
        _scatter(keys, order, np.uint64(digit) * width, starts, keys_to, order_to)
        keys, keys_to = keys_to, keys
        order, order_to = order_to, order
    _mean_ranks(keys, order_to)
    return num_digits & np.uint64(1) != np.uint64(0)


@inner
def _count_digits(keys: Array, num_digits: Number, width: Number, digits: Array) -> None:
    """Write where the first element of every value of every digit goes."""
    mask = (np.uint64(1) << width) - np.uint64(1)
    digits[: num_digits << width] = 0
    for digit in range(num_digits):
        counts = digits[(digit << width) : ((digit + np.uint64(1)) << width)]
        shift = np.uint64(digit) * width
        for i in range(keys.size):
            value = (np.uint64(keys[i]) >> shift) & mask
            counts[value] += np.uint32(1)
        total = np.uint32(0)
        for value in range(counts.size):
            count = counts[value]
            counts[value] = total
            total = np.uint32(total + count)


@inner
def _scatter(
    keys: Array, order: Array, shift: Number, starts: Array, keys_to: Array, order_to: Array
) -> None:
    mask = np.uint64(starts.size - 1)
    for i in range(keys.size):
        key = keys[i]
        value = (np.uint64(key) >> shift) & mask
        place = starts[value]
        starts[value] = np.uint32(place + np.uint32(1))
        keys_to[place] = key
        order_to[place] = order[i]


@inner
def _mean_ranks(keys: Array, twice_rank: Array) -> None:
    """Write twice the mean rank of keys that are in ascending order: first plus last of equals."""
    n = keys.size
    kind = twice_rank[0]
    first = like(kind, 0)
    twice_rank[0] = first
    for i in range(1, n):
        first = first if keys[i] == keys[i - 1] else like(kind, i)
        twice_rank[i] = first
    last = like(kind, n - 1)
    twice_rank[n - 1] = like(kind, twice_rank[n - 1] + last)
    for i in range(n - 2, -1, -1):
        last = last if keys[i] == keys[i + 1] else like(kind, i)
        twice_rank[i] = like(kind, twice_rank[i] + last)
