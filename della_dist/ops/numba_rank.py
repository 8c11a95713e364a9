"""MagPrune's keep probabilities in Numba: every element ranked by magnitude within its row.

Equal magnitudes share their mean rank, so ranking is counting: how many elements of the row are
smaller, how many are equal. Three ways to count, all exact:

* rows of at most `SMALL_COLS` elements: compare every pair;
* magnitudes that use few bits, which is what the deltas of 16-bit checkpoints do: a counter for
  every value that the magnitudes can have between the smallest and the largest of the row;
* anything else: a radix sort (`della_dist.ops.numba_sort`).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from della_dist.ops.numba_sort import sort_probabilities
from della_dist.ops.numba_support import (
    array_at,
    inner,
    keep_probability,
    like,
    magnitude_bits,
    nonzero_mask,
    trailing_zeros,
)

#: Rows up to this length are ranked by comparing every pair.
SMALL_COLS = 48

#: Slots of the counting ranking; the first ones are for zeros.
NUM_SLOTS = 65_536
_ZERO_SLOTS = 16

#: Rows up to this length have their keep probabilities looked up, by twice the mean rank.
TABLE_COLS = 32_768

_COUNTER_16 = 65_535


@inner
def row_probabilities(
    v: Any, used: Any, low: Any, high: Any, num_nonzero: Any, params: Any, p: Any, scratch: Any
) -> None:
    """Write the keep probability of every element of a row.

    Parameters
    ----------
    v
        (C,) float32 or float64: finite deltas; C > 1.
    used, low, high
        Of the row's magnitudes as integers: the bits any of them has, the smallest that is not
        zero (anything where all are), the largest.
    num_nonzero
        How many deltas are not zero.
    params
        ``(density, epsilon, address of the table of probabilities or 0)``.
    p
        (C,) float32, written.
    scratch
        ``(slot_of, counts16, counts32, slot_p, filled, keys_a, keys_b, order_a, order_b,
        digits)``. All counters are zero, and are again at the end.
    """
    n = v.size
    slot_of, counts16, counts32, slot_p, filled, keys_a, keys_b, order_a, order_b, digits = scratch
    if n <= SMALL_COLS:
        _compare_pairs(v, keys_a, order_a, params, p)
        return
    shift = np.uint64(0)
    num_slots = np.uint64(_ZERO_SLOTS)
    if num_nonzero > 0:
        shift = trailing_zeros(used)
        low, high = np.uint64(low) >> shift, np.uint64(high) >> shift
        num_slots = high - low + np.uint64(_ZERO_SLOTS + 1)
    else:
        low = np.uint64(1)
    if num_slots <= np.uint64(NUM_SLOTS):
        first = np.int64(low) - np.int64(_ZERO_SLOTS)
        _assign_slots(v, shift, first, slot_of[:n])
        if n <= _COUNTER_16:
            _count_slots(slot_of[:n], counts16)
            _rank_slots(counts16, num_slots, n, num_nonzero, params, filled, slot_p)
        else:
            _count_slots(slot_of[:n], counts32)
            _rank_slots(counts32, num_slots, n, num_nonzero, params, filled, slot_p)
        for i in range(n):
            p[i] = slot_p[slot_of[i]]
    else:
        sort_probabilities(v, shift, low, high, params, p, keys_a, keys_b, order_a, order_b, digits)


@inner
def _assign_slots(v: Any, shift: Any, first: Any, slot_of: Any) -> None:
    """Write every element's slot: zeros into any of the first 16, the others from there up."""
    for i in range(v.size):
        key = magnitude_bits(v[i])
        slot = np.int64(np.uint64(key) >> shift) - first
        slot_of[i] = max(slot, np.int64(i & 15))


@inner
def _count_slots(slot_of: Any, counts: Any) -> None:
    for i in range(slot_of.size):
        slot = slot_of[i]
        counts[slot] = like(counts[slot], counts[slot] + 1)


@inner
def _rank_slots(
    counts: Any, num_slots: Any, n: Any, num_nonzero: Any, params: Any, filled: Any, slot_p: Any
) -> None:
    """Turn counters into the keep probabilities of their slots, and clear them."""
    density, epsilon, table_address = params
    table = array_at(table_address, 0, 2 * n - 1, np.float32(0))
    for slot in range(_ZERO_SLOTS):
        counts[slot] = 0
    num_filled = np.uint64(0)
    for group in range((num_slots + np.uint64(63)) >> np.uint64(6)):
        first = np.uint64(group) << np.uint64(6)
        mask = nonzero_mask(counts, first)
        while mask != np.uint64(0):
            filled[num_filled] = first + trailing_zeros(mask)
            num_filled += np.uint64(1)
            mask &= mask - np.uint64(1)
    smaller = np.uint64(n - num_nonzero)
    if smaller > np.uint64(0):
        slot_p[:_ZERO_SLOTS] = keep_probability(smaller - np.uint64(1), n, density, epsilon)
    for j in range(num_filled):
        slot = filled[j]
        count = np.uint64(counts[slot])
        counts[slot] = 0
        twice_rank = smaller + smaller + count - np.uint64(1)
        smaller += count
        if table_address != 0:
            slot_p[slot] = table[twice_rank]
        else:
            slot_p[slot] = keep_probability(twice_rank, n, density, epsilon)


@inner
def _compare_pairs(v: Any, keys: Any, twice_ranks: Any, params: Any, p: Any) -> None:
    density, epsilon, table_address = params
    n = v.size
    table = array_at(table_address, 0, 2 * n - 1, np.float32(0))
    for i in range(n):
        keys[i] = magnitude_bits(v[i])
        twice_ranks[i] = np.uint32(0xFFFFFFFF)
    for j in range(n):
        other = keys[j]
        for i in range(n):
            below = np.uint32(other < keys[i]) + np.uint32(other <= keys[i])
            twice_ranks[i] = np.uint32(twice_ranks[i] + np.uint32(below))
    for i in range(n):
        p[i] = table[twice_ranks[i]]
