"""What merging and measuring have in common: deltas, keep probabilities and random words.

Blocks are worked through in *bands*: whole rows where rows are ranked, `BAND_ELEMENTS` or so
otherwise. A band's numbers stay in the processor's cache from the first step to the last.
"""

from __future__ import annotations

import numpy as np

from della_dist.ops.blocks import SQUARES_CHUNK, SQUARES_SUMS
from della_dist.ops.cpu.arguments import Experts, Inputs, Scratch, Span, Tally
from della_dist.ops.cpu.convert import widen
from della_dist.ops.cpu.intrinsics import (
    add_products,
    like,
    wide_vectors,
)
from della_dist.ops.cpu.philox import philox_fill
from della_dist.ops.cpu.rank import row_probabilities
from della_dist.ops.cpu.support import (
    Array,
    Number,
    Pack,
    inlined,
    inner,
    magnitude_bits,
)

#: Elements of a band, at least, and unless the tensor is smaller.
BAND_ELEMENTS = 2048

#: Elements whose random words are made at a time.
CHUNK_ELEMENTS = 1024

_TWO_TO_MINUS_24 = np.float32(2.0**-24)


@inlined
def expert_deltas(
    m: Number,
    start: Number,
    b: Array,
    v: Array,
    ranks: Number,
    span: Span,
    inputs: Inputs,
    experts: Experts,
    scratch: Scratch,
    tally: Tally,
) -> None:
    """Write expert `m`'s deltas of a band, and its keep probabilities.

    Parameters
    ----------
    m, start
        Which expert, and the band's first element in the block.
    b
        (n,) the base, float32 or float64.
    v
        (n,) of the same type, written: the deltas, +0.0 where they are not finite. The
        probabilities go to ``scratch.work.p``.
    ranks
        Whether ranks decide; every element has the same probability otherwise, and where epsilon
        is zero.
    """
    work = scratch.work
    p = work.p[: v.size]
    constant = not ranks or experts.epsilons[m] == 0.0
    if constant:
        p[:] = experts.const_p[m]
    params = (experts.densities[m], experts.epsilons[m], experts.tables[m])
    counts = tally.counts[m]
    widen(inputs.codes[m + 1], inputs.addresses[m + 1], start, v, work.staging)
    for first in range(0, v.size, span.cols):
        row = v[first : first + span.cols]
        used, low, high, num_nonzero, num_nonfinite = subtract(
            row, b[first : first + span.cols], experts.is_delta[m]
        )
        counts[0] += num_nonfinite
        counts[1] += num_nonzero
        tally.max_bits[m] = max(tally.max_bits[m], high)
        if not constant:
            row_p = p[first : first + span.cols]
            row_probabilities(row, used, low, high, num_nonzero, params, row_p, scratch.ranks)


@inner
def subtract(v: Array, b: Array, is_delta: Number) -> Number:
    """Subtract `b` from `v` in place, or nothing where `v` is a delta.

    Returns
    -------
    tuple
        Of the finite deltas' magnitudes as integers: the bits any of them has, the smallest that
        is not zero, the largest; how many are not zero; how many deltas are not finite.
    """
    wide_vectors()
    used = magnitude_bits(like(v[0], 0.0))
    infinity = magnitude_bits(like(v[0], np.inf))
    high = used
    below_low = like(used, -1)
    num_nonzero = np.uint32(0)
    num_nonfinite = np.uint32(0)
    for i in range(v.size):
        # No delta is finite where the base is not.
        delta = v[i] - (b[i] - b[i] if is_delta else b[i])
        key = magnitude_bits(delta)
        finite = key < infinity
        if not finite:
            delta = like(delta, 0.0)
            key = like(key, 0)
        v[i] = delta
        used = like(used, used | key)
        high = max(high, key)
        # Zero wraps around to the largest integer.
        below_low = min(below_low, like(key, key - like(key, 1)))
        num_nonzero = np.uint32(num_nonzero + np.uint32(key != like(key, 0)))
        num_nonfinite = np.uint32(num_nonfinite + np.uint32(not finite))
    low = like(used, below_low + like(used, 1))
    return used, low, high, np.int64(num_nonzero), np.int64(num_nonfinite)


@inner
def drop_above(v: Array, ceiling: Number, p: Array) -> None:
    """Let no random word keep the elements of `v` whose magnitude exceeds `ceiling`."""
    wide_vectors()
    for i in range(v.size):
        p[i] = p[i] if magnitude_bits(v[i]) <= ceiling else np.float32(0.0)


@inner
def drop_masked(mask: Array, p: Array) -> None:
    """Let no random word keep the elements at which `mask` is 0."""
    wide_vectors()
    for i in range(p.size):
        p[i] = p[i] if mask[i] != np.uint8(0) else np.float32(0.0)


@inner
def product_sums(
    v: Array, w: Array, squares: Number, start: Number, stop: Number, unit: Number, result: Pack
) -> None:
    """Add up products of a band in the order that `della_dist.ops.blocks` states.

    Parameters
    ----------
    v, w
        (n,) the deltas of the band that are multiplied.
    squares
        Whether both are the same: numbers are loaded once then.
    start, stop
        Where the band begins in the block, and where the block ends.
    unit
        Elements of a unit; the block begins with one.
    result
        ``(sum_sq, sums)``: (U,) float64 a unit, added to; (`SQUARES_SUMS`,) float64, zero at the
        start of the block and at its end, in between what a chunk has so far.
    """
    sum_sq, sums = result
    first = 0
    while first < v.size:
        number, within = divmod(start + first, unit)
        left = min(unit - within, SQUARES_CHUNK - within % SQUARES_CHUNK)
        n = min(left, v.size - first)
        _add_to_chunk(v[first : first + n], w[first : first + n], squares, within, sums)
        first += n
        if n == left or start + first == stop:
            for half in (8, 4, 2, 1):
                for j in range(half):
                    sums[j] += sums[j + half]
            sum_sq[number] += sums[0]
            sums[:] = 0.0


@inner
def _add_to_chunk(v: Array, w: Array, squares: Number, within: Number, sums: Array) -> None:
    """Add products to the sums of a chunk; `within` is the place of the first in the chunk."""
    head = min(-within % SQUARES_SUMS, v.size)
    for i in range(head):
        sums[(within + i) % SQUARES_SUMS] += np.float64(v[i]) * np.float64(w[i])
    v, w = v[head:], w[head:]
    if squares:
        add_products(v, v, sums)
    else:
        add_products(v, w, sums)
    for i in range(v.size - v.size % SQUARES_SUMS, v.size):
        sums[i % SQUARES_SUMS] += np.float64(v[i]) * np.float64(w[i])


@inner
def random_words(key: Number, start: Number, n: Number, pairs: Array) -> Number:
    """Make the words of elements `start` to ``start + n`` of a tensor.

    Parameters
    ----------
    key
        uint64, the key of the tensor and expert.
    start, n
        Position of the first element in the tensor; n <= `CHUNK_ELEMENTS`.
    pairs
        (CHUNK_ELEMENTS / 2 + 4,) uint64, written.

    Returns
    -------
    int
        Index of the first element's word in `pairs`, viewed as uint32.
    """
    skip = start & 3
    num_counters = (skip + n + 3) >> 2
    philox_fill(key, np.uint64(start >> 2), pairs[: 2 * num_counters])
    return skip


@inner
def is_kept(word: Number, p: Array, delta: Number, threshold: Number) -> Number:
    """Return whether an element survives: both its random number and its magnitude decide."""
    u = np.float32(np.int32(np.uint32(word) >> np.uint32(8))) * _TWO_TO_MINUS_24
    return (u < p) & (magnitude_bits(delta) >= threshold)
