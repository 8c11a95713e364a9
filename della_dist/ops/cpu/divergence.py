"""Divergences of rows in Numba (`della_dist.ops.divergence`)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from della_dist.ops.cpu.arguments import Divergence, Experts, Inputs, Scratch, Span, Tally
from della_dist.ops.cpu.band import CHUNK_ELEMENTS, expert_deltas, product_sums
from della_dist.ops.cpu.convert import widen
from della_dist.ops.cpu.intrinsics import bits_float, float_bits, wide_vectors
from della_dist.ops.cpu.support import Array, Number, Pack, entry, inlined, inner
from della_dist.ops.divergence import (
    EPS,
    EXPONENTIAL,
    LEAST_EXPONENT,
    LOG2_E,
    LOG_2,
    LOGARITHM,
    MOST,
    ONE_BITS,
    ROOT_BITS,
    TO_WHOLE,
)

_LOG_2_HIGH, _LOG_2_LOW = LOG_2
_LOG_2 = _LOG_2_HIGH + _LOG_2_LOW


@inner
def _exponentials(x: Array, top: Number) -> None:
    """Write ``exp(x - top)``, in place."""
    wide_vectors()
    for i in range(x.size):
        below = x[i] - top
        y = max(below, LEAST_EXPONENT)
        shifted = y * LOG2_E + TO_WHOLE
        number = shifted - TO_WHOLE
        r = (y - number * _LOG_2_HIGH) - number * _LOG_2_LOW
        total = EXPONENTIAL[0]
        for coefficient in EXPONENTIAL[1:]:
            total = total * r + coefficient
        bits = (float_bits(shifted) << np.uint64(52)) + np.uint64(ONE_BITS)
        value = (1.0 + (r + r * (r * total))) * bits_float(bits)
        x[i] = 0.0 if below < LEAST_EXPONENT else value


@inner
def _terms(p: Array, q: Array, sum_p: Number, sum_q: Number) -> None:
    """Turn exponentials into probabilities `p`, and logarithms of their ratio to others, `q`."""
    wide_vectors()
    for i in range(p.size):
        a, b = p[i] / sum_p + EPS, q[i] / sum_q + EPS
        bits = np.int64(float_bits(a / b))
        number = (bits - np.int64(ROOT_BITS)) >> np.int64(52)
        m = bits_float(np.uint64(bits - (number << np.int64(52))))
        s = (m - 1.0) / (m + 1.0)
        square = s * s
        total = LOGARITHM[0]
        for coefficient in LOGARITHM[1:]:
            total = total * square + coefficient
        p[i] = a
        q[i] = np.float64(number) * _LOG_2 + 2.0 * (s + s * (square * total))


@inner
def _largest(x: Array, top: Number) -> Number:
    wide_vectors()
    for i in range(x.size):
        top = max(top, x[i])
    return top


@inner
def _widened(b: Array, v: Array, p: Array, q: Array) -> None:
    """Write base and expert in float64: what is not finite in the base has no probability."""
    wide_vectors()
    for i in range(b.size):
        start = np.float64(b[i])
        start = start if abs(start) <= MOST else -np.inf
        q[i] = start
        p[i] = min(start + np.float64(v[i]), MOST)


@inlined
def _load(
    start: Number, p: Array, q: Array, inputs: Inputs, span: Span, experts: Experts, at: Pack
) -> None:
    """Write elements of both rows, from `start` of the block on."""
    scratch, tally = at
    n = p.size
    work = scratch.work
    b, v = work.b[:n], work.v[0, :n]
    widen(inputs.codes[0], inputs.addresses[0], start, b, work.staging)
    expert_deltas(0, start, b, v, False, span, inputs, experts, scratch, tally)
    _widened(b, v, p, q)


def make_divergence_block(source_digest: int) -> Callable[..., None]:
    """Return the compiled function that tells the divergences of a block's rows."""

    @entry
    def divergence_block(
        span: Span,
        inputs: Inputs,
        experts: Experts,
        scratch: Scratch,
        tally: Tally,
        divergence: Divergence,
    ) -> None:
        _ = source_digest
        cols, ones, sums, chunk_sums, result = divergence
        at = (scratch, tally)
        row_p, row_q = scratch.work.rows[0], scratch.work.rows[1]
        is_kept = cols <= row_p.size
        for row in range(result.size):
            top_p, top_q = -np.inf, -np.inf
            for c in range(0, cols, CHUNK_ELEMENTS):
                n = min(CHUNK_ELEMENTS, cols - c)
                at_c = c if is_kept else 0
                p, q = row_p[at_c : at_c + n], row_q[at_c : at_c + n]
                _load(row * cols + c, p, q, inputs, span, experts, at)
                top_p, top_q = _largest(p, top_p), _largest(q, top_q)
            top_p = 0.0 if top_p == -np.inf else top_p
            top_q = 0.0 if top_q == -np.inf else top_q
            sums[:] = 0.0
            for c in range(0, cols, CHUNK_ELEMENTS):
                n = min(CHUNK_ELEMENTS, cols - c)
                at_c = c if is_kept else 0
                p, q = row_p[at_c : at_c + n], row_q[at_c : at_c + n]
                if not is_kept:
                    _load(row * cols + c, p, q, inputs, span, experts, at)
                _exponentials(p, top_p)
                _exponentials(q, top_q)
                product_sums(p, ones[:n], False, c, cols, cols, (sums[0], chunk_sums[0]))
                product_sums(q, ones[:n], False, c, cols, cols, (sums[1], chunk_sums[1]))
            sum_p = 1.0 if sums[0, 0] == 0.0 else sums[0, 0]
            sum_q = 1.0 if sums[1, 0] == 0.0 else sums[1, 0]
            for c in range(0, cols, CHUNK_ELEMENTS):
                n = min(CHUNK_ELEMENTS, cols - c)
                at_c = c if is_kept else 0
                p, q = row_p[at_c : at_c + n], row_q[at_c : at_c + n]
                if not is_kept:
                    _load(row * cols + c, p, q, inputs, span, experts, at)
                    _exponentials(p, top_p)
                    _exponentials(q, top_q)
                _terms(p, q, sum_p, sum_q)
                product_sums(p, q, False, c, cols, cols, (sums[2], chunk_sums[2]))
            result[row] = max(sums[2, 0], 0.0)

    return divergence_block
