"""The measuring passes in Numba: magnitudes counted by their bits, exact sums of magnitudes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from della_dist.ops.cpu.arguments import Drop, Experts, Inputs, Scratch, Selection, Span, Tally
from della_dist.ops.cpu.band import (
    CHUNK_ELEMENTS,
    drop_above,
    expert_deltas,
    is_kept,
    random_words,
)
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
def select(
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
        span: Span,
        drop: Drop,
        inputs: Inputs,
        experts: Experts,
        scratch: Scratch,
        tally: Tally,
        selection: Selection,
        l1: Array,
    ) -> None:
        """Measure one block.

        Parameters
        ----------
        l1
            (M, LANES, 2, 2, E) int64, added to; M is 0 where magnitudes are selected.
        """
        _ = source_digest
        work = scratch.work
        selecting = l1.shape[0] == 0
        ranks = drop.ranked and not selecting
        top = (selection.shift, selection.bits)
        band = work.b.size
        for first in range(0, span.num_elements, band):
            n = min(band, span.num_elements - first)
            b = work.b[:n]
            p = work.p[:n]
            v = work.v[0, :n]
            widen(inputs.codes[0], inputs.addresses[0], first, b, work.staging)
            for m in range(experts.keys.size):
                expert_deltas(m, first, b, v, ranks, span, inputs, experts, scratch, tally)
                if selecting:
                    for s in range(m, selection.active.size, experts.keys.size):
                        if selection.active[s]:
                            select(
                                v,
                                top,
                                selection.prefix[s],
                                selection.counts[s],
                                selection.key_min[s],
                                selection.key_max[s],
                            )
                    continue
                if drop.has_ceilings:
                    drop_above(v, experts.ceilings[m], p)
                for c in range(0, n, CHUNK_ELEMENTS):
                    stop = min(c + CHUNK_ELEMENTS, n)
                    skip = 0
                    if drop.random:
                        place = span.start + first + c
                        skip = random_words(experts.keys[m], place, stop - c, work.pairs)
                    else:
                        work.pairs[:] = 0
                    words = work.pairs.view(np.uint32)[skip : skip + stop - c]
                    _add_significands(v[c:stop], p[c:stop], words, experts.thresholds[m], l1[m])

    return measure_block
