"""Ranking by counting, in Numba: a counter for every value the upper bits of magnitudes have.

Every magnitude has a *slot*: one for each value of its upper bits, and one in between for all
magnitudes that have lower bits as well. The deltas of 16-bit checkpoints seldom have; those that
do are ranked among themselves afterwards, unless each is alone in its slot.
"""

from __future__ import annotations

import numpy as np

from della_dist.ops.cpu.intrinsics import (
    array_at,
    bit_length,
    like,
    nonzero_mask,
    population_count,
    shifted,
    trailing_zeros,
    wide_vectors,
)
from della_dist.ops.cpu.support import (
    Array,
    Number,
    Pack,
    inlined,
    inner,
    keep_probability,
    magnitude_bits,
)

#: Slots at most, and for short rows. The first ones are for zeros.
NUM_SLOTS = 65_536
_MIN_SLOTS = 8192
_ZERO_SLOTS = 16

#: Rows up to this length are counted with 16 bits.
_COUNTER_16 = 65_535


@inlined
def rank_by_slots(
    v: Array, row: Pack, params: Pack, p: Array, scratch: Pack, keys: Array, order: Array
) -> Number:
    """Write the keep probabilities of the elements whose slots tell their rank.

    Returns
    -------
    int
        How many elements are left over, n meaning that nothing has been written. If there are
        any, their keys and indices are in `keys` and `order`, and ``scratch[4]`` has for their
        slots how many of the other elements are smaller.
    """
    n = v.size
    used, low, high, num_nonzero = row
    slot_of, counts16, counts32, slot_p, below, filled, filled_counts = scratch
    slot_of = slot_of[:n]
    limit = max(np.uint64(_MIN_SLOTS), min(np.uint64(NUM_SLOTS), np.uint64(4 * n)))
    slotting = _choose_slots(used, low, high, num_nonzero, limit)
    num_lower = _assign_slots(v, slotting, slot_of)
    if 2 * num_lower > n:
        return n
    counting = (slotting[3], n, num_nonzero)
    if n <= _COUNTER_16:
        num_filled, several = _rank_slots(
            slot_of, counts16, counting, params, filled, filled_counts, slot_p
        )
    else:
        num_filled, several = _rank_slots(
            slot_of, counts32, counting, params, filled, filled_counts, slot_p
        )
    _look_up(slot_of, slot_p, p)
    if num_lower == 0 or not several:
        return 0
    _even_below(n - num_nonzero, filled[:num_filled], filled_counts, below)
    _collect_lower(v, low, trailing_zeros(used), slot_of, keys, order)
    return num_lower


@inlined
def _choose_slots(
    used: Number, low: Number, high: Number, num_nonzero: Number, limit: Number
) -> Number:
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
def _assign_slots(v: Array, slotting: Pack, slot_of: Array) -> Number:
    """Write every element's slot; return how many magnitudes have lower bits.

    Zeros are dealt out to the even ones of the first 16 slots: that many counters are faster
    than one, which every increment would have to wait for.
    """
    wide_vectors()
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


@inlined
def _rank_slots(
    slot_of: Array,
    counts: Array,
    counting: Pack,
    params: Pack,
    filled: Array,
    filled_counts: Array,
    slot_p: Array,
) -> Number:
    """Count the elements of every slot and write the slots' keep probabilities.

    Returns
    -------
    tuple
        How many slots are filled; their numbers come first in `filled`, their counts in
        `filled_counts`. And whether any odd slot has several elements.
    """
    num_slots, n, num_nonzero = counting
    for i in range(n):
        slot = slot_of[i]
        counts[slot] = like(counts[slot], counts[slot] + 1)
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
def _list_filled(counts: Array, num_slots: Number, filled: Array) -> Number:
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
def _look_up(slot_of: Array, slot_p: Array, p: Array) -> None:
    wide_vectors()
    for i in range(slot_of.size):
        p[i] = slot_p[slot_of[i]]


@inner
def _even_below(num_zero: Number, filled: Array, filled_counts: Array, below: Array) -> None:
    """Write for every odd slot how many elements of even slots are smaller than its own."""
    smaller = np.uint32(num_zero)
    for j in range(filled.size):
        slot = filled[j]
        below[slot] = smaller
        if slot & 1 == 0:
            smaller = np.uint32(smaller + filled_counts[j])


@inner
def compact_key(delta: Number, low: Number, shift: Number) -> Number:
    """Return a magnitude as an integer that takes few bits: 0 for zero, 1 for the smallest."""
    key = np.uint64(magnitude_bits(delta))
    return ((key - low) >> shift) + np.uint64(1) if key != np.uint64(0) else key


@inner
def _collect_lower(
    v: Array, low: Number, shift: Number, slot_of: Array, keys: Array, order: Array
) -> None:
    """Write the key and the index of every element that has an odd slot."""
    n = slot_of.size
    found = np.uint64(0)
    for group in range(0, n, 64):
        mask = nonzero_mask(slot_of, np.uint64(group), np.uint16(1))
        if n - group < 64:
            mask &= (np.uint64(1) << np.uint64(n - group)) - np.uint64(1)
        while mask != np.uint64(0):
            i = np.uint64(group) + trailing_zeros(mask)
            keys[found] = compact_key(v[i], low, shift)
            order[found] = i
            found += np.uint64(1)
            mask &= mask - np.uint64(1)
