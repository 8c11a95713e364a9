"""Scores of elements in Numba: what of all experts together decides which elements are kept.

By importance a score is the magnitude of the one expert's delta times the divergence of its row.
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
from della_dist.ops.cpu.band import expert_deltas
from della_dist.ops.cpu.convert import widen
from della_dist.ops.cpu.intrinsics import wide_vectors
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
            score = work.v[0, :n]
            expert_deltas(0, first, b, score, False, span, inputs, experts, scratch, tally)
            _importances(score, first, scores.cols, scores.divergences)
            if scores.mask.size:
                _reaching(score, scores.threshold[0], scores.mask[first : first + n])
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
