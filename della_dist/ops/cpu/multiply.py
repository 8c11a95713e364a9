"""Products of all pairs of deltas in Numba."""

from __future__ import annotations

from collections.abc import Callable

from della_dist.ops.cpu.arguments import Experts, Inputs, Products, Scratch, Span, Tally
from della_dist.ops.cpu.band import expert_deltas, product_sums
from della_dist.ops.cpu.convert import widen
from della_dist.ops.cpu.support import entry


def make_multiply_block(source_digest: int) -> Callable[..., None]:
    """Return the compiled function that multiplies the deltas of one block."""

    @entry
    def multiply_block(
        span: Span,
        inputs: Inputs,
        experts: Experts,
        scratch: Scratch,
        tally: Tally,
        products: Products,
    ) -> None:
        _ = source_digest
        work = scratch.work
        num_experts = experts.keys.size
        band = work.b.size
        for first in range(0, span.num_elements, band):
            n = min(band, span.num_elements - first)
            b = work.b[:n]
            widen(inputs.codes[0], inputs.addresses[0], first, b, work.staging)
            for m in range(num_experts):
                v = work.v[m, :n]
                expert_deltas(m, first, b, v, False, span, inputs, experts, scratch, tally)
            pair = 0
            for i in range(num_experts):
                for j in range(i, num_experts):
                    sums = (products.sums[pair], products.chunk_sums[pair])
                    v, w = work.v[i, :n], work.v[j, :n]
                    product_sums(v, w, i == j, first, span.num_elements, span.unit, sums)
                    pair += 1

    return multiply_block
