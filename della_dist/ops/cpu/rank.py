"""MagPrune's keep probabilities in Numba: every element ranked by magnitude within its row.

Equal magnitudes share their mean rank, so ranking is counting: how many elements of the row are
smaller, how many are equal. Three ways to count, all exact:

* rows of at most `SMALL_COLS` elements: compare every pair;
* magnitudes that use few bits, as the deltas of 16-bit checkpoints do: a counter for every value
  (`della_dist.ops.cpu.slots`);
* anything else: a radix sort (`della_dist.ops.cpu.sort`).
"""

from __future__ import annotations

import numpy as np

from della_dist.ops.cpu.intrinsics import (
    array_at,
    bit_length,
    trailing_zeros,
)
from della_dist.ops.cpu.slots import compact_key, rank_by_slots
from della_dist.ops.cpu.sort import rank_pairs, rank_sorted
from della_dist.ops.cpu.support import (
    Array,
    Number,
    Pack,
    inlined,
    keep_probability,
)

#: Rows up to this length are ranked by comparing every pair.
SMALL_COLS = 48

#: Rows up to this length have their keep probabilities looked up, by twice the mean rank.
TABLE_COLS = 32_768


@inlined
def row_probabilities(
    v: Array,
    used: Number,
    low: Number,
    high: Number,
    num_nonzero: Number,
    params: Pack,
    p: Array,
    scratch: Pack,
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
        ``(slot_of, counts16, counts32, slot_p, below, filled, filled_counts)`` and the scratch of
        `rank_sorted`. All counters are zero, and are again at the end.
    """
    n = v.size
    slot_scratch, sort_scratch = scratch
    keys, _keys_b, order_a, order_b, _digits = sort_scratch
    below, slot_of = slot_scratch[4], slot_scratch[0]
    low, high = np.uint64(low), np.uint64(high)
    row = (used, low, high, num_nonzero)
    num_left = n
    if n > SMALL_COLS:
        num_left = rank_by_slots(v, row, params, p, slot_scratch, keys, order_a)
    if num_left == 0:
        return
    shift = trailing_zeros(used)
    if num_left == n:
        for i in range(n):
            keys[i] = compact_key(v[i], low, shift)
            order_a[i] = i
    if num_left <= SMALL_COLS:
        in_b = rank_pairs(num_left, sort_scratch)
    else:
        num_bits = bit_length(((high - low) >> shift) + np.uint64(1))
        in_b = rank_sorted(num_left, num_bits, sort_scratch)
    density, epsilon, table_address = params
    table = array_at(table_address, 0, 2 * n - 1, np.float32(0))
    order, twice_rank = (order_b, order_a) if in_b else (order_a, order_b)
    for j in range(num_left):
        i = order[j]
        rank = np.uint64(twice_rank[j])
        if num_left < n:
            rank += np.uint64(2) * np.uint64(below[slot_of[i]])
        if table_address != 0:
            p[i] = table[rank]
        else:
            p[i] = keep_probability(rank, n, density, epsilon)
