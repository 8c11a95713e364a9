"""The whole pipeline in Numba, one band after another: drop, elect, fuse, round."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from della_dist.ops.cpu.band import (
    CHUNK_ELEMENTS,
    deltas,
    is_kept,
    random_words,
    square_sums,
)
from della_dist.ops.cpu.convert import narrow, widen
from della_dist.ops.cpu.intrinsics import (
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
    p: Array,
    words: Array,
    threshold: Number,
    weight: Number,
    ratio: Number,
    inverse: Number,
) -> Number:
    """Turn deltas into contributions, in place; return how many non-zero deltas are kept.

    The contribution of a kept element is ``weight * (delta / p)`` where `inverse`,
    ``weight * (delta * ratio)`` otherwise; of any other it is +0.0.
    """
    wide_vectors()
    num_kept = np.uint32(0)
    zero, one = like(v[0], 0.0), like(v[0], 1.0)
    for i in range(v.size):
        delta = v[i]
        keep = is_kept(words[i], p[i], delta, threshold)
        divisor = like(delta, p[i]) if inverse else one
        contribution = weight * ((delta / divisor) * ratio)
        v[i] = contribution if keep else zero
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


@inlined
def _fuse(
    v: Array,
    first: Number,
    stop: Number,
    weights: Array,
    elect: Number,
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
    normalize, guard, lambda_ = finish
    total, numerator, denominator, t = sums[0, :n], sums[1, :n], sums[2, :n], sums[3, :n]
    signs = signs[:n]
    total[:] = 0.0
    signs[:] = 0
    denominator[:] = 0.0
    for m in range(weights.size):
        _add_up(v[m, first:stop], total, signs)
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
    num_conflicts = np.uint32(0)
    for i in range(n):
        num_conflicts = np.uint32(num_conflicts + np.uint32(signs[i] == np.uint32(3)))
    return np.int64(num_conflicts)


def make_merge_block(source_digest: int) -> Callable[..., None]:
    """Return the compiled function that merges one block."""

    @entry
    def merge_block(
        block: Pack,
        modes: Pack,
        out: Array,
        inputs: Pack,
        experts: Pack,
        numbers: Array,
        scratch: Pack,
        results: Pack,
    ) -> None:
        _ = source_digest
        start, num_elements, cols, unit = block
        ranked, random, inverse, elect, normalize = modes
        out_code, out_address = out[0], np.uint64(out[1])
        codes, addresses = inputs
        keys, densities, epsilons, tables, const_p = experts
        weights, ratios, thresholds, guard_lambda = numbers
        (v_MN, b_N, p_N, pairs, staging, sums, signs), rank_scratch = scratch
        counts, max_bits, sum_sq, chunk_sums, totals = results
        num_experts = weights.size
        band = b_N.size
        if not random:
            pairs[:] = 0
        for first in range(0, num_elements, band):
            n = min(band, num_elements - first)
            b = b_N[:n]
            p = p_N[:n]
            widen(codes[0], addresses[0], first, b, staging)
            for m in range(num_experts):
                v = v_MN[m, :n]
                constant = not ranked or epsilons[m] == 0.0
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
                square_sums(v, first, num_elements, unit, (sum_sq[m], chunk_sums[m]))
                for c in range(0, n, CHUNK_ELEMENTS):
                    stop = min(c + CHUNK_ELEMENTS, n)
                    skip = (
                        random_words(keys[m], start + first + c, stop - c, pairs) if random else 0
                    )
                    words = pairs.view(np.uint32)[skip : skip + stop - c]
                    counts[m, 2] += _prune(
                        v[c:stop],
                        p[c:stop],
                        words,
                        thresholds[m],
                        weights[m],
                        ratios[m],
                        inverse,
                    )
            for c in range(0, n, CHUNK_ELEMENTS):
                stop = min(c + CHUNK_ELEMENTS, n)
                finish = (normalize, guard_lambda[0], guard_lambda[1])
                totals[0] += _fuse(v_MN, c, stop, weights, elect, sums, signs, counts[:, 3], finish)
                t = sums[3, : stop - c]
                totals[1] += narrow(out_code, out_address, first + c, b[c:stop], t, staging)

    return merge_block
