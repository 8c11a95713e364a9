"""MagPrune's keep probabilities in Numba: every element ranked by magnitude within its row.

Equal magnitudes share their mean rank, so ranking is counting: how many elements of the row are
smaller, how many are equal. Three ways to count, all exact:

* rows of at most `SMALL_COLS` elements: compare every pair;
* *slots*: a counter for every value that the upper bits of the magnitudes have between the
  smallest and the largest of the row, and one in between for all magnitudes that have lower bits
  as well. The deltas of 16-bit checkpoints seldom do; those that do are ranked among themselves;
* anything else: a radix sort (`della_dist.ops.numba_sort`).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from della_dist.ops.numba_intrinsics import (
    array_at,
    bit_length,
    like,
    nonzero_mask,
    population_count,
    shifted,
    trailing_zeros,
)
from della_dist.ops.numba_sort import rank_pairs, rank_sorted
from della_dist.ops.numba_support import inlined, inner, keep_probability, magnitude_bits

#: Rows up to this length are ranked by comparing every pair.
SMALL_COLS = 48

#: Slots at most, and for short rows. The first ones are for zeros.
NUM_SLOTS = 65_536
_MIN_SLOTS = 8192
_ZERO_SLOTS = 16

#: Rows up to this length have their keep probabilities looked up, by twice the mean rank.
TABLE_COLS = 32_768

_COUNTER_16 = 65_535


@inlined
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
        ``(slot_of, counts16, counts32, slot_p, below, filled, filled_counts)`` and the scratch of
        `rank_sorted`. All counters are zero, and are again at the end.
    """
    n = v.size
    (slot_of, counts16, counts32, slot_p, below, filled, filled_counts), sort_scratch = scratch
    keys, _keys_b, order_a, order_b, _digits = sort_scratch
    low, high = np.uint64(low), np.uint64(high)
    num_lower = n
    if n > SMALL_COLS:
        limit = max(np.uint64(_MIN_SLOTS), min(np.uint64(NUM_SLOTS), np.uint64(4 * n)))
        slotting = _choose_slots(used, low, high, num_nonzero, limit)
        num_lower = _assign_slots(v, slotting, slot_of[:n])
    if 2 * num_lower <= n:
        num_slots = slotting[3]
        if n <= _COUNTER_16:
            _count_slots(slot_of[:n], counts16)
            num_filled, several = _rank_slots(
                counts16, num_slots, n, num_nonzero, params, filled, slot_p, filled_counts
            )
        else:
            _count_slots(slot_of[:n], counts32)
            num_filled, several = _rank_slots(
                counts32, num_slots, n, num_nonzero, params, filled, slot_p, filled_counts
            )
        _look_up(slot_of[:n], slot_p, p)
        if num_lower == 0 or not several:
            return
        _even_below(n - num_nonzero, filled[:num_filled], filled_counts, below)
        _collect_lower(v, low, trailing_zeros(used), slot_of[:n], keys, order_a)
    else:
        num_lower = n
        for i in range(n):
            keys[i] = _compact_key(v[i], low, trailing_zeros(used))
            order_a[i] = i
    if num_lower <= SMALL_COLS:
        in_b = rank_pairs(num_lower, sort_scratch)
    else:
        num_bits = bit_length(((high - low) >> trailing_zeros(used)) + np.uint64(1))
        in_b = rank_sorted(num_lower, num_bits, sort_scratch)
    density, epsilon, table_address = params
    table = array_at(table_address, 0, 2 * n - 1, np.float32(0))
    order, twice_rank = (order_b, order_a) if in_b else (order_a, order_b)
    for j in range(num_lower):
        i = order[j]
        rank = np.uint64(twice_rank[j])
        if num_lower < n:
            rank += np.uint64(2) * np.uint64(below[slot_of[i]])
        if table_address != 0:
            p[i] = table[rank]
        else:
            p[i] = keep_probability(rank, n, density, epsilon)


@inlined
def _choose_slots(used: Any, low: Any, high: Any, num_nonzero: Any, limit: Any) -> Any:
    """Choose how magnitudes become slots.

    Magnitude k has place ``(k >> shift) + ((k + round_up) >> shift_up)``: 2 times its upper bits,
    plus 1 where it has lower ones; or, where none has, its upper bits alone.

    Returns
    -------
    tuple
        shift, shift_up, round_up, number of slots, the place that has slot 0, and 1 where odd
        places are those of magnitudes with lower bits, else 0. All uint64.
    """
    one = np.uint64(1)
    zero_slots = np.uint64(_ZERO_SLOTS)
    if num_nonzero == 0:
        return one, one, np.uint64(0), zero_slots, np.uint64(0), np.uint64(0)
    shift = trailing_zeros(used)
    first = low >> shift
    num_slots = (high >> shift) - first + one + zero_slots
    if num_slots <= limit:
        never = np.uint64(63 if high >> np.uint64(32) != 0 else 31)
        return shift, never, np.uint64(0), num_slots, first - zero_slots, np.uint64(0)
    shift = max(shift, bit_length(high - low) - min(bit_length(high - low), bit_length(limit)))
    while (one + (high >> shift) - (low >> shift)) * np.uint64(2) + zero_slots > limit:
        shift += one
    first = (low >> shift) * np.uint64(2)
    num_slots = (one + (high >> shift)) * np.uint64(2) - first + zero_slots
    return shift, shift, (one << shift) - one, num_slots, first - zero_slots, one


@inlined
def _assign_slots(v: Any, slotting: Any, slot_of: Any) -> Any:
    """Write every element's slot; return how many magnitudes have lower bits.

    Zeros are dealt out to the even ones of the first 16 slots: that many counters are faster
    than one, which every increment would have to wait for.
    """
    kind = magnitude_bits(v[0])
    shift, shift_up = slotting[0], slotting[1]
    round_up, first, odd = like(kind, slotting[2]), like(kind, slotting[4]), like(kind, slotting[5])
    num_lower = like(kind, 0)
    for i in range(v.size):
        key = magnitude_bits(v[i])
        place = like(key, shifted(key, shift) + shifted(like(key, key + round_up), shift_up))
        slot = like(key, place - first)
        slot_of[i] = slot if key != 0 else like(key, (i & 7) << 1)
        num_lower = like(key, num_lower + like(key, place & odd))
    return np.int64(num_lower)


@inner
def _count_slots(slot_of: Any, counts: Any) -> None:
    for i in range(slot_of.size):
        slot = slot_of[i]
        counts[slot] = like(counts[slot], counts[slot] + 1)


@inlined
def _rank_slots(
    counts: Any,
    num_slots: Any,
    n: Any,
    num_nonzero: Any,
    params: Any,
    filled: Any,
    slot_p: Any,
    filled_counts: Any,
) -> Any:
    """Turn counters into the keep probabilities of their slots, and clear them.

    Returns
    -------
    tuple
        How many slots are filled; their numbers come first in `filled`, their counters in
        `filled_counts`. And whether any odd slot has several elements.
    """
    density, epsilon, table_address = params
    table = array_at(table_address, 0, 2 * n - 1, np.float32(0))
    for slot in range(_ZERO_SLOTS):
        counts[slot] = 0
    num_filled = _list_filled(counts, num_slots, filled)
    one = np.uint64(1)
    smaller = np.uint64(n - num_nonzero)
    several = np.uint64(0)
    if smaller > np.uint64(0):
        slot_p[:_ZERO_SLOTS] = keep_probability(smaller - one, n, density, epsilon)
    for j in range(num_filled):
        slot = np.uint64(filled[j])
        count = np.uint64(counts[slot])
        counts[slot] = 0
        filled_counts[j] = count
        twice_rank = smaller + smaller + count - one
        smaller += count
        several |= (count - one) & (np.uint64(0) - (slot & one))
        if table_address != 0:
            slot_p[slot] = table[twice_rank]
        else:
            slot_p[slot] = keep_probability(twice_rank, n, density, epsilon)
    return num_filled, several != np.uint64(0)


@inner
def _list_filled(counts: Any, num_slots: Any, filled: Any) -> Any:
    """Write the slots whose counters are not zero, in ascending order; return how many."""
    one = np.uint64(1)
    num_filled = np.uint64(0)
    for group in range((num_slots + np.uint64(63)) >> np.uint64(6)):
        first = np.uint64(group) << np.uint64(6)
        mask = nonzero_mask(counts, first, like(counts[0], -1))
        end = num_filled + population_count(mask)
        # Four at once, whether there are that many or not: cheaper than a branch nobody predicts.
        for j in range(4):
            filled[num_filled + np.uint64(j)] = first + trailing_zeros(mask)
            mask &= mask - one
        num_filled += np.uint64(4)
        while mask != np.uint64(0):
            filled[num_filled] = first + trailing_zeros(mask)
            mask &= mask - one
            num_filled += one
        num_filled = end
    return num_filled


@inlined
def _look_up(slot_of: Any, slot_p: Any, p: Any) -> None:
    # Four to a turn: the branch would take as long as a single one.
    one = np.uint64(1)
    whole = np.uint64(slot_of.size & ~3)
    i = np.uint64(0)
    while i < whole:
        p[i] = slot_p[slot_of[i]]
        p[i + one] = slot_p[slot_of[i + one]]
        p[i + np.uint64(2)] = slot_p[slot_of[i + np.uint64(2)]]
        p[i + np.uint64(3)] = slot_p[slot_of[i + np.uint64(3)]]
        i += np.uint64(4)
    while i < np.uint64(slot_of.size):
        p[i] = slot_p[slot_of[i]]
        i += one


@inner
def _even_below(num_zero: Any, filled: Any, filled_counts: Any, below: Any) -> None:
    """Write for every odd slot how many elements of even slots are smaller than its own."""
    smaller = np.uint32(num_zero)
    for j in range(filled.size):
        slot = filled[j]
        below[slot] = smaller
        if slot & 1 == 0:
            smaller = np.uint32(smaller + filled_counts[j])


@inner
def _compact_key(delta: Any, low: Any, shift: Any) -> Any:
    """Return a magnitude as an integer that takes few bits: 0 for zero, 1 for the smallest."""
    key = np.uint64(magnitude_bits(delta))
    return ((key - low) >> shift) + np.uint64(1) if key != np.uint64(0) else key


@inner
def _collect_lower(v: Any, low: Any, shift: Any, slot_of: Any, keys: Any, order: Any) -> None:
    """Write the key and the index of every element that has an odd slot."""
    n = slot_of.size
    found = np.uint64(0)
    for group in range(0, n, 64):
        mask = nonzero_mask(slot_of, np.uint64(group), np.uint16(1))
        if n - group < 64:
            mask &= (np.uint64(1) << np.uint64(n - group)) - np.uint64(1)
        while mask != np.uint64(0):
            i = np.uint64(group) + trailing_zeros(mask)
            keys[found] = _compact_key(v[i], low, shift)
            order[found] = i
            found += np.uint64(1)
            mask &= mask - np.uint64(1)
