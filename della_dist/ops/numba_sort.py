"""Ranking by a radix sort in Numba, for rows whose magnitudes use too many bits to count."""

from __future__ import annotations

from typing import Any

import numpy as np

from della_dist.ops.numba_support import (
    array_at,
    bit_length,
    inner,
    keep_probability,
    magnitude_bits,
)

#: Counters of all digits together: eight of 11 bits.
NUM_DIGIT_COUNTERS = 8 << 11


@inner
def sort_probabilities(
    v: Any,
    shift: Any,
    low: Any,
    high: Any,
    params: Any,
    p: Any,
    keys_a: Any,
    keys_b: Any,
    order_a: Any,
    order_b: Any,
    digits: Any,
) -> None:
    """Write the keep probability of every element of a row.

    Parameters
    ----------
    v
        (C,) float32 or float64: finite deltas; C > 1.
    shift, low, high
        uint64: zero bits at the end of all magnitudes; the smallest magnitude that is not zero,
        and the largest, without them.
    params
        ``(density, epsilon, address of the table of probabilities or 0)``.
    p
        (C,) float32, written.
    keys_a, keys_b, order_a, order_b, digits
        Scratch: (C,) of the type of the magnitude's bits, (C,) uint32, and digit counters.
    """
    n = v.size
    for i in range(n):
        key = np.uint64(magnitude_bits(v[i])) >> shift
        above = np.uint64(0)
        if key != np.uint64(0):
            above = key - low + np.uint64(1)
        keys_a[i] = above
        order_a[i] = i
    num_bits = bit_length(high - low + np.uint64(1))
    widest = np.uint64(8 if n < 4096 else 11)
    num_digits = (num_bits + widest - np.uint64(1)) // widest
    width = (num_bits + num_digits - np.uint64(1)) // num_digits
    _count_digits(keys_a[:n], num_digits, width, digits)
    source_is_a = True
    for digit in range(num_digits):
        starts = digits[(digit << width) : ((digit + 1) << width)]
        if source_is_a:
            _scatter(keys_a[:n], order_a, digit * width, starts, keys_b, order_b)
        else:
            _scatter(keys_b[:n], order_b, digit * width, starts, keys_a, order_a)
        source_is_a = not source_is_a
    if source_is_a:
        _mean_ranks(keys_a[:n], order_a, order_b, params, p)
    else:
        _mean_ranks(keys_b[:n], order_b, order_a, params, p)


@inner
def _count_digits(keys: Any, num_digits: Any, width: Any, digits: Any) -> None:
    """Write where the first element of every value of every digit goes."""
    mask = (np.uint64(1) << width) - np.uint64(1)
    digits[: num_digits << width] = 0
    for digit in range(num_digits):
        counts = digits[(digit << width) : ((digit + 1) << width)]
        shift = digit * width
        for i in range(keys.size):
            value = (np.uint64(keys[i]) >> shift) & mask
            counts[value] += 1
        total = np.uint32(0)
        for value in range(counts.size):
            count = counts[value]
            counts[value] = total
            total = np.uint32(total + count)


@inner
def _scatter(keys: Any, order: Any, shift: Any, starts: Any, keys_to: Any, order_to: Any) -> None:
    mask = np.uint64(starts.size - 1)
    for i in range(keys.size):
        key = keys[i]
        value = (np.uint64(key) >> shift) & mask
        place = starts[value]
        starts[value] = np.uint32(place + 1)
        keys_to[place] = key
        order_to[place] = order[i]


@inner
def _mean_ranks(keys: Any, order: Any, first_of: Any, params: Any, p: Any) -> None:
    """Write the keep probabilities of elements whose `keys` are in ascending order."""
    density, epsilon, table_address = params
    n = keys.size
    table = array_at(table_address, 0, 2 * n - 1, np.float32(0))
    first = np.uint32(0)
    first_of[0] = first
    for i in range(1, n):
        first = first if keys[i] == keys[i - 1] else np.uint32(i)
        first_of[i] = first
    last = np.uint32(n - 1)
    for back in range(n):
        i = np.uint64(n - 1 - back)
        if back > 0 and keys[i] != keys[i + np.uint64(1)]:
            last = np.uint32(i)
        twice_rank = np.uint64(first_of[i]) + np.uint64(last)
        if table_address != 0:
            p[order[i]] = table[twice_rank]
        else:
            p[order[i]] = keep_probability(twice_rank, n, density, epsilon)
