"""The measuring passes in Numba: magnitudes counted by their bits, exact sums of magnitudes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from della_dist.ops.cpu.band import CHUNK_ELEMENTS, deltas, is_kept, random_words
from della_dist.ops.cpu.convert import widen
from della_dist.ops.cpu.intrinsics import (
    float_bits,
    like,
)
from della_dist.ops.cpu.support import (
    Array,
    Number,
    Pack,
    entry,
    inner,
    magnitude_bits,
)

#: Sums of significands that are kept apart.
LANES = 4

_LOW_26 = np.uint64((1 << 26) - 1)


@inner
def _select(
    v: Array, top: Pack, prefix: Number, counts: Array, key_min: Array, key_max: Array
) -> None:
    """Count the magnitudes below `prefix` by their next bits."""
    shift, bits = top
    mask = (np.uint64(1) << bits) - np.uint64(1)
    for i in range(v.size):
        key = np.uint64(magnitude_bits(v[i]))
        above = key >> shift
        if above >> bits == prefix:
            bucket = above & mask
            counts[bucket] += 1
            # Seldom true: cheaper than writing the smaller and the larger one every time.
            key_min[bucket] = min(key_min[bucket], key)
            key_max[bucket] = max(key_max[bucket], key)


@inner
def _add_significands(v: Array, p: Array, words: Array, threshold: Number, sums: Array) -> None:
    """Add significands to `sums` (LANES, 2, 2, E): [all, kept][low 26 bits, the rest][exponent].

    The first axis is to be added up: neighbours go to different lanes, so that an addition need
    not wait for the one before. `words` is overwritten.
    """
    one_bits = np.uint64(float_bits(like(v[0], 1.0)))
    wide = one_bits >> np.uint64(32) != np.uint64(0)
    mantissa_bits = np.uint64(52 if wide else 23)
    implicit = np.uint64(1) << mantissa_bits
    # Masks, made by themselves: otherwise there is a branch in the loop below, which would be
    # taken at random.
    kept = words
    for i in range(v.size):
        keep = is_kept(words[i], p[i], v[i], threshold)
        kept[i] = np.uint32(0xFFFFFFFF) if keep else np.uint32(0)
    for i in range(v.size):
        key = np.uint64(magnitude_bits(v[i]))
        exponent = key >> mantissa_bits
        significand = (key & (implicit - np.uint64(1))) | implicit
        if exponent == np.uint64(0):
            significand ^= implicit
            exponent = np.uint64(1)
        mask = np.uint64(kept[i])
        lane = np.uint64(i) & np.uint64(LANES - 1)
        low = significand & _LOW_26
        sums[lane, 0, 0, exponent] += np.int64(low)
        sums[lane, 1, 0, exponent] += np.int64(low & mask)
        if wide:
            rest = significand >> np.uint64(26)
            sums[lane, 0, 1, exponent] += np.int64(rest)
            sums[lane, 1, 1, exponent] += np.int64(rest & mask)


def make_measure_block(source_digest: int) -> Callable[..., None]:
    """Return the compiled function that measures one block."""

    @entry
    def measure_block(
        block: Pack,
        modes: Pack,
        inputs: Pack,
        experts: Pack,
        numbers: Array,
        scratch: Pack,
        results: Pack,
        select: Pack,
        l1: Array,
    ) -> None:
        """Measure one block.

        The arguments are those of `merge_block`, less what concerns the fuse step, and:

        select
            ``(shift, bits, prefix, active, counts, key_min, key_max)``.
        l1
            (M, LANES, 2, 2, E) int64, added to; M is 0 where magnitudes are selected.
        """
        _ = source_digest
        start, num_elements, cols, _unit = block
        ranked, random = modes
        codes, addresses = inputs
        keys, densities, epsilons, tables, const_p = experts
        thresholds = numbers
        (v_N, b_N, p_N, pairs, staging), rank_scratch = scratch
        counts, max_bits = results
        shift, bits, prefix, active, bucket_counts, key_min, key_max = select
        selecting = l1.shape[0] == 0
        band = b_N.size
        for first in range(0, num_elements, band):
            n = min(band, num_elements - first)
            b = b_N[:n]
            p = p_N[:n]
            v = v_N[:n]
            widen(codes[0], addresses[0], first, b, staging)
            for m in range(keys.size):
                constant = selecting or not ranked or epsilons[m] == 0.0
                if constant:
                    p[:] = const_p[m]
                params = (densities[m], epsilons[m], tables[m])
                deltas(
                    codes[m + 1],
                    addresses[m + 1],
                    first,
                    b,
                    v,
                    cols,
                    (not constant, params, rank_scratch),
                    p,
                    staging,
                    (counts[m], max_bits[m : m + 1]),
                )
                if selecting:
                    if active[m]:
                        top = (shift, bits)
                        _select(v, top, prefix[m], bucket_counts[m], key_min[m], key_max[m])
                    continue
                for c in range(0, n, CHUNK_ELEMENTS):
                    stop = min(c + CHUNK_ELEMENTS, n)
                    skip = (
                        random_words(keys[m], start + first + c, stop - c, pairs) if random else 0
                    )
                    if not random:
                        pairs[:] = 0
                    words = pairs.view(np.uint32)[skip : skip + stop - c]
                    _add_significands(v[c:stop], p[c:stop], words, thresholds[m], l1[m])

    return measure_block
