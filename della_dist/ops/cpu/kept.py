"""Passes over what is kept of the experts, in Numba: its squares, and what several share."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from della_dist.ops.cpu.arguments import Experts, Inputs, Products, Scratch, Span, Tally
from della_dist.ops.cpu.band import expert_deltas, product_sums
from della_dist.ops.cpu.convert import widen
from della_dist.ops.cpu.intrinsics import array_at, like, wide_vectors
from della_dist.ops.cpu.support import Array, Number, entry, inner, magnitude_bits


@inner
def _clear_masked(v: Array, mask: Array) -> None:
    wide_vectors()
    for i in range(v.size):
        v[i] = v[i] if mask[i] != np.uint8(0) else like(v[0], 0.0)


@inner
def _clear_below(v: Array, threshold: Number) -> None:
    wide_vectors()
    for i in range(v.size):
        v[i] = v[i] if magnitude_bits(v[i]) >= threshold else like(v[0], 0.0)


@inner
def _count_present(v: Array, present: Array) -> None:
    wide_vectors()
    zero = like(v[0], 0.0)
    for i in range(v.size):
        present[i] = np.uint32(present[i] + np.uint32(v[i] != zero))


@inner
def _count_shared(v: Array, present: Array, counts: Array) -> None:
    """Add how many numbers that are not zero are shared with another expert, and how many not."""
    zero = like(v[0], 0.0)
    for i in range(v.size):
        if v[i] != zero:
            counts[0 if present[i] > np.uint32(1) else 1] += 1


def make_kept_block(source_digest: int) -> Callable[..., None]:
    """Return the compiled function that measures what is kept of one block."""

    @entry
    def kept_block(
        span: Span,
        inputs: Inputs,
        experts: Experts,
        scratch: Scratch,
        tally: Tally,
        address: int,
        products: Products,
        counts: Array,
        present: Array,
    ) -> None:
        """Measure one block.

        Parameters
        ----------
        address
            Of the mask of what is kept: bytes; 0 where magnitudes alone tell that.
        products
            Of every expert with itself; P is 0 where deltas are counted.
        counts
            (M, 2) int64, added to: deltas that others share, and those that none does.
        present
            (N,) uint32, of a band, written; empty where squares are added up.
        """
        _ = source_digest
        work = scratch.work
        num_experts = experts.keys.size
        band = work.b.size
        for first in range(0, span.num_elements, band):
            n = min(band, span.num_elements - first)
            b = work.b[:n]
            widen(inputs.codes[0], inputs.addresses[0], first, b, work.staging)
            present[:] = 0
            for m in range(num_experts):
                v = work.v[m, :n]
                expert_deltas(m, first, b, v, False, span, inputs, experts, scratch, tally)
                if address != 0:
                    _clear_masked(v, array_at(np.uint64(address), first, n, np.uint8(0)))
                else:
                    _clear_below(v, experts.thresholds[m])
                if present.size:
                    _count_present(v, present[:n])
                else:
                    sums = (products.sums[m], products.chunk_sums[m])
                    product_sums(v, v, True, first, span.num_elements, span.unit, sums)
            if present.size:
                for m in range(num_experts):
                    _count_shared(work.v[m, :n], present[:n], counts[m])

    return kept_block
