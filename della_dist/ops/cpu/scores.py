"""Scores of elements in Numba: what of all experts together decides which elements are kept.

By importance a score is the magnitude of the one expert's delta times the divergence of its row;
by variance it is that of all experts' deltas, computed in float64 and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from della_dist.ops.cpu.arguments import (
    Experts,
    Inputs,
    Scores,
    Scratch,
    Selection,
    Span,
    Tally,
)
from della_dist.ops.cpu.band import CHUNK_ELEMENTS, expert_deltas
from della_dist.ops.cpu.convert import widen
from della_dist.ops.cpu.intrinsics import like, wide_vectors
from della_dist.ops.cpu.measure import select
from della_dist.ops.cpu.support import Array, Number, entry, inner, magnitude_bits


@inner
def _importances(v: Array, start: Number, cols: Number, divergences: Array) -> None:
    """Turn deltas of a band, from `start` of the block on, into their importances, in place."""
    wide_vectors()
    row = start // cols
    edge = (row + 1) * cols - start
    c = 0
    while c < v.size:
        stop = min(edge, v.size)
        divergence = divergences[row]
        for i in range(c, stop):
            v[i] = abs(v[i]) * divergence
        c = stop
        row += 1
        edge += cols


@inner
def _variances(v_MN: Array, mean: Array, total: Array) -> None:
    """Write the variances of a chunk's deltas in the place of the first expert's."""
    wide_vectors()
    count = np.float64(v_MN.shape[0])
    mean[:] = 0.0
    total[:] = 0.0
    for m in range(v_MN.shape[0]):
        for i in range(mean.size):
            mean[i] = mean[i] + np.float64(v_MN[m, i])
    for i in range(mean.size):
        mean[i] = mean[i] / count
    for m in range(v_MN.shape[0]):
        for i in range(mean.size):
            away = np.float64(v_MN[m, i]) - mean[i]
            total[i] = total[i] + away * away
    for i in range(mean.size):
        v_MN[0, i] = like(v_MN[0, 0], total[i] / count)


@inner
def _without_zeros(score: Array) -> Number:
    """Move what is not zero to the front; return how much there is."""
    found = 0
    for i in range(score.size):
        score[found] = score[i]
        found += 1 if score[i] != like(score[0], 0.0) else 0
    return found


@inner
def _reaching(score: Array, threshold: Number, mask: Array) -> None:
    wide_vectors()
    for i in range(score.size):
        mask[i] = np.uint8(magnitude_bits(score[i]) >= threshold)


def make_score_block(source_digest: int) -> Callable[..., None]:
    """Return the compiled function that counts the scores of a block, or compares them."""

    @entry
    def score_block(
        span: Span,
        inputs: Inputs,
        experts: Experts,
        scratch: Scratch,
        tally: Tally,
        scores: Scores,
        selection: Selection,
    ) -> None:
        _ = source_digest
        work = scratch.work
        top = (selection.shift, selection.bits)
        band = work.b.size
        for first in range(0, span.num_elements, band):
            n = min(band, span.num_elements - first)
            b = work.b[:n]
            widen(inputs.codes[0], inputs.addresses[0], first, b, work.staging)
            for m in range(experts.keys.size):
                v = work.v[m, :n]
                expert_deltas(m, first, b, v, False, span, inputs, experts, scratch, tally)
            score = work.v[0, :n]
            if scores.cols:
                _importances(score, first, scores.cols, scores.divergences)
            else:
                for c in range(0, n, CHUNK_ELEMENTS):
                    stop = min(c + CHUNK_ELEMENTS, n)
                    mean, total = work.rows[0, : stop - c], work.rows[1, : stop - c]
                    _variances(work.v[:, c:stop], mean, total)
            if scores.mask.size:
                _reaching(score, scores.threshold[0], scores.mask[first : first + n])
            elif not scores.cols:
                score = score[: _without_zeros(score)]
            for s in range(selection.active.size):
                if selection.active[s]:
                    select(
                        score,
                        top,
                        selection.prefix[s],
                        selection.counts[s],
                        selection.key_min[s],
                        selection.key_max[s],
                    )

    return score_block
