"""The whole pipeline in Numba, one band after another: drop, elect, fuse, round."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from della_dist.ops.cpu.arguments import (
    Drop,
    Experts,
    Fusion,
    Inputs,
    Output,
    Scratch,
    Span,
    Tally,
    Totals,
    Work,
)
from della_dist.ops.cpu.band import (
    CHUNK_ELEMENTS,
    drop_above,
    drop_masked,
    expert_deltas,
    is_kept,
    product_sums,
    random_words,
    subtract,
)
from della_dist.ops.cpu.convert import narrow, widen
from della_dist.ops.cpu.intrinsics import (
    array_at,
    like,
    wide_vectors,
)
from della_dist.ops.cpu.support import (
    Array,
    Number,
    Pack,
    entry,
    inlined,
    inner,
)


@inlined
def _prune(
    v: Array,
    w: Array,
    p: Array,
    words: Array,
    threshold: Number,
    weight: Number,
    ratio: Number,
    limit: Number,
    inverse: Number,
) -> Number:
    """Write the contributions `w` of deltas `v`; return how many non-zero deltas are kept.

    The contribution of a kept element is ``weight * (delta / p)`` where `inverse`,
    ``weight * (delta * ratio)`` otherwise, of a delta cut to `limit`; of any other it is +0.0.
    """
    wide_vectors()
    num_kept = np.uint32(0)
    zero, one = like(v[0], 0.0), like(v[0], 1.0)
    for i in range(v.size):
        delta = v[i]
        keep = is_kept(words[i], p[i], delta, threshold)
        divisor = like(delta, p[i]) if inverse else one
        pruned = min(max(delta, -limit), limit) / divisor
        contribution = weight * (pruned * ratio)
        w[i] = contribution if keep else zero
        num_kept = np.uint32(num_kept + np.uint32(keep & (delta != zero)))
    return np.int64(num_kept)


@inner
def _add_up(v: Array, total: Array, signs: Array) -> None:
    """Add contributions to `total`; note in `signs` which signs occur: bits 0 (+) and 1 (-)."""
    wide_vectors()
    zero = like(v[0], 0.0)
    for i in range(v.size):
        x = v[i]
        total[i] = total[i] + x
        sign = np.uint32(np.uint32(x > zero) | np.uint32(np.uint32(x < zero) << np.uint32(1)))
        signs[i] = np.uint32(signs[i] | sign)


@inner
def _elect(v: Array, weight: Number, total: Array, numerator: Array, denominator: Array) -> Number:
    """Add the contributions whose sign is that of `total`; return how many there are."""
    wide_vectors()
    num_elected = np.uint32(0)
    zero = like(v[0], 0.0)
    for i in range(v.size):
        x = v[i]
        elected = (x != zero) & ((x > zero) == (total[i] >= zero))
        numerator[i] = numerator[i] + x if elected else numerator[i]
        denominator[i] = denominator[i] + weight if elected else denominator[i]
        num_elected = np.uint32(num_elected + np.uint32(elected))
    return np.int64(num_elected)


@inner
def _finish(
    numerator: Array,
    denominator: Array,
    normalize: Number,
    guard: Number,
    lambda_: Number,
    t: Array,
) -> None:
    """Write ``lambda`` times the fused delta."""
    wide_vectors()
    for i in range(t.size):
        fused = numerator[i]
        if normalize and not (abs(denominator[i]) <= guard):
            fused = numerator[i] / denominator[i]
        t[i] = lambda_ * fused


@inner
def _num_conflicts(signs: Array) -> Number:
    """Return at how many elements both signs occur."""
    wide_vectors()
    num_conflicts = np.uint32(0)
    for i in range(signs.size):
        num_conflicts = np.uint32(num_conflicts + np.uint32(signs[i] == np.uint32(3)))
    return np.int64(num_conflicts)


@inner
def _weigh(v: Array, weight: Number) -> None:
    wide_vectors()
    for i in range(v.size):
        v[i] = weight * v[i]


@inner
def _add_present(v: Array, boost: Number, boosted: Array, count: Array) -> None:
    """Add contributions times `boost`, and count those that there are."""
    wide_vectors()
    zero, one = like(v[0], 0.0), like(v[0], 1.0)
    for i in range(v.size):
        boosted[i] = boosted[i] + boost * v[i]
        count[i] = count[i] + (one if v[i] != zero else zero)


@inner
def _finish_shared(total: Array, boosted: Array, count: Array, lambda_: Number, t: Array) -> None:
    """Write ``lambda`` times the mean of what there is; what is alone is boosted."""
    wide_vectors()
    one = like(total[0], 1.0)
    for i in range(t.size):
        mean = total[i] / max(count[i], one)
        t[i] = lambda_ * (boosted[i] if count[i] == one else mean)


@inlined
def _fuse(
    v: Array,
    first: Number,
    stop: Number,
    weights: Array,
    how: Pack,
    sums: Array,
    signs: Array,
    num_elected: Array,
    finish: Pack,
) -> Number:
    """Elect and fuse a chunk; return the number of conflicts.

    ``sums[3]`` is what is to be added to the base: the fused delta times lambda.
    """
    wide_vectors()
    n = stop - first
    elect, late, overlap = how
    normalize, guard, lambda_ = finish
    total, numerator, denominator, t = sums[0, :n], sums[1, :n], sums[2, :n], sums[3, :n]
    signs = signs[:n]
    total[:] = 0.0
    signs[:] = 0
    denominator[:] = 0.0
    for m in range(weights.size):
        _add_up(v[m, first:stop], total, signs)
    if overlap:
        numerator[:] = 0.0
        for m in range(weights.size):
            _add_present(v[m, first:stop], weights[m], numerator, denominator)
        _finish_shared(total, numerator, denominator, lambda_, t)
        return _num_conflicts(signs)
    if late:
        for m in range(weights.size):
            _weigh(v[m, first:stop], weights[m])
    if elect:
        numerator[:] = 0.0
        for m in range(weights.size):
            num_elected[m] += _elect(v[m, first:stop], weights[m], total, numerator, denominator)
    else:
        numerator = total
        for m in range(weights.size):
            for i in range(n):
                denominator[i] = denominator[i] + weights[m]
    _finish(numerator, denominator, normalize, guard, lambda_, t)
    return _num_conflicts(signs)


@inlined
def _measure_merged(
    start: Number,
    b: Array,
    v: Array,
    t: Array,
    span: Span,
    out: Output,
    work: Work,
    totals: Totals,
) -> None:
    """Measure what was merged as if it were one more expert; `t` is overwritten by its deltas.

    Parameters
    ----------
    start
        Of a chunk, in the block.
    b, v, t
        (n,), (M, n) and (n,): the base, the experts' deltas, and what to write to.
    """
    widen(np.int64(out.code), np.uint64(out.address), start, t, work.staging)
    high = subtract(t, b, False)[2]
    totals.merged_max_bits[0] = max(totals.merged_max_bits[0], high)
    stop, count = span.num_elements, len(v)
    sums = (totals.squares[count], totals.chunk_sums[count])
    product_sums(t, t, True, start, stop, span.unit, sums)
    for m in range(count):
        sums = (totals.dots[m], totals.chunk_sums[count + 1 + m])
        product_sums(v[m], t, False, start, stop, span.unit, sums)


def make_merge_block(source_digest: int) -> Callable[..., None]:
    """Return the compiled function that merges one block."""

    @entry
    def merge_block(
        span: Span,
        drop: Drop,
        fusion: Fusion,
        out: Output,
        inputs: Inputs,
        experts: Experts,
        scratch: Scratch,
        tally: Tally,
        totals: Totals,
    ) -> None:
        _ = source_digest
        work = scratch.work
        finish = (fusion.normalize, fusion.constants[0], fusion.constants[1])
        num_experts = fusion.weights.shape[1]
        band = work.b.size
        if not drop.random:
            work.pairs[:] = 0
        for first in range(0, span.num_elements, band):
            n = min(band, span.num_elements - first)
            b = work.b[:n]
            p = work.p[:n]
            first_row = first // fusion.row_elements
            first_edge = (first_row + 1) * fusion.row_elements - first
            widen(inputs.codes[0], inputs.addresses[0], first, b, work.staging)
            for m in range(num_experts):
                v = work.v[m, :n]
                expert_deltas(m, first, b, v, drop.ranked, span, inputs, experts, scratch, tally)
                if drop.has_ceilings:
                    drop_above(v, experts.ceilings[m], p)
                if drop.mask != 0:
                    drop_masked(array_at(np.uint64(drop.mask), first, n, np.uint8(0)), p)
                sums = (totals.squares[m], totals.chunk_sums[m])
                product_sums(v, v, True, first, span.num_elements, span.unit, sums)
                w = work.w[m, :n]
                c, row, edge = 0, first_row, first_edge
                while c < n:
                    stop = min(c + CHUNK_ELEMENTS, n, edge)
                    skip = 0
                    if drop.random:
                        place = span.start + first + c
                        skip = random_words(experts.keys[m], place, stop - c, work.pairs)
                    tally.counts[m, 2] += _prune(
                        v[c:stop],
                        w[c:stop],
                        p[c:stop],
                        work.pairs.view(np.uint32)[skip : skip + stop - c],
                        experts.thresholds[m],
                        fusion.weights[row, m],
                        fusion.ratios[m],
                        fusion.constants[2],
                        fusion.inverse,
                    )
                    c = stop
                    if c == edge:
                        row += 1
                        edge += fusion.row_elements
            for c in range(0, n, CHUNK_ELEMENTS):
                stop = min(c + CHUNK_ELEMENTS, n)
                totals.totals[0] += _fuse(
                    work.w,
                    c,
                    stop,
                    fusion.shares,
                    (fusion.elect, fusion.late, fusion.overlap),
                    work.sums,
                    work.signs,
                    tally.counts[:, 3],
                    finish,
                )
                t = work.sums[3, : stop - c]
                totals.totals[1] += narrow(
                    np.int64(out.code),
                    np.uint64(out.address),
                    first + c,
                    b[c:stop],
                    t,
                    work.staging,
                )
                _measure_merged(first + c, b[c:stop], work.v[:, c:stop], t, span, out, work, totals)

    return merge_block
