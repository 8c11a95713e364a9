"""Ranking of magnitudes that use too many bits to count, in Numba: by pairs or by radix sort.

In most rows few keys agree in their upper bits. Two passes of the radix sort over those leave few
out of order, which are then moved one by one; other rows are sorted by all their bits.
"""

from __future__ import annotations

import numpy as np

from della_dist.ops.cpu.intrinsics import bit_length, like, wide_vectors
from della_dist.ops.cpu.support import (
    Array,
    Number,
    Pack,
    inner,
)

#: Counters of all digits together: eight of 11 bits.
NUM_DIGIT_COUNTERS = 8 << 11

#: More keys than these agree in the upper bits too often.
_MAX_BY_UPPER = 65_536


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
    # The more keys, the less it matters how many counters a digit has.
    widest = min(np.uint64(11), (bit_length(np.uint64(n)) + np.uint64(7)) >> np.uint64(1))
    num_digits = (num_bits + widest - np.uint64(1)) // widest
    keys, order = keys_a[:n], order_a[:n]
    keys_to, order_to = keys_b[:n], order_b[:n]
    if num_digits > np.uint64(2) and n <= _MAX_BY_UPPER:
        lower = num_bits - np.uint64(2) * widest
        _count_digits(keys, lower, np.uint64(2), widest, digits)
        _scatter(keys, order, lower, digits[: 1 << widest], keys_to, order_to)
        starts = digits[1 << widest : 2 << widest]
        _scatter(keys_to, order_to, lower + widest, starts, keys, order)
        if _insert(keys, order, n // 2):
            _mean_ranks(keys, order_to)
            return False
    width = (num_bits + num_digits - np.uint64(1)) // num_digits
    _count_digits(keys, np.uint64(0), num_digits, width, digits)
    for digit in range(num_digits):
        starts = digits[(digit << width) : ((digit + np.uint64(1)) << width)]
        _scatter(keys, order, np.uint64(digit) * width, starts, keys_to, order_to)
        keys, keys_to = keys_to, keys
        order, order_to = order_to, order
    _mean_ranks(keys, order_to)
    return num_digits & np.uint64(1) != np.uint64(0)


@inner
def _count_digits(
    keys: Array, lower: Number, num_digits: Number, width: Number, digits: Array
) -> None:
    """Write where the first element of every value of every digit above `lower` bits goes."""
    mask = (np.uint64(1) << width) - np.uint64(1)
    digits[: num_digits << width] = 0
    for digit in range(num_digits):
        counts = digits[(digit << width) : ((digit + np.uint64(1)) << width)]
        shift = lower + np.uint64(digit) * width
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
def _insert(keys: Array, order: Array, max_moves: Number) -> Number:
    """Sort keys that are nearly in order, and the elements they belong to.

    Returns
    -------
    bool
        Whether it was done: not if it takes more than `max_moves`. There could be a move for every
        pair of keys.
    """
    for i in range(1, keys.size):
        key = keys[i]
        if keys[i - 1] > key:
            element = order[i]
            j = i
            while j > 0 and keys[j - 1] > key:
                keys[j] = keys[j - 1]
                order[j] = order[j - 1]
                j -= 1
            keys[j] = key
            order[j] = element
            max_moves -= i - j
            if max_moves < 0:
                return False
    return True


@inner
def _all_differ(keys: Array) -> Number:
    """Return whether no key equals the one before."""
    wide_vectors()
    equal = np.uint32(0)
    for i in range(1, keys.size):
        equal |= np.uint32(keys[i] == keys[i - 1])
    return equal == np.uint32(0)


@inner
def _mean_ranks(keys: Array, twice_rank: Array) -> None:
    """Write twice the mean rank of keys that are in ascending order: first plus last of equals."""
    n = keys.size
    kind = twice_rank[0]
    if _all_differ(keys):
        for i in range(n):
            twice_rank[i] = like(kind, 2 * i)
        return
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
