"""The CPU backend: Numba kernels, called on blocks from threads of the caller's."""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np
import numpy.typing as npt

from della_dist.ops.angles import row_weights_bytes, weights_from_products
from della_dist.ops.blocks import SQUARES_SUMS, Block, BlockStats, U8Array
from della_dist.ops.cpu.arguments import (
    Fusion,
    Output,
    Products,
    Scratch,
    Totals,
)
from della_dist.ops.cpu.call import NO_SELECTION, NUM_TABLES, Call, selection_of
from della_dist.ops.cpu.measure import LANES, make_measure_block
from della_dist.ops.cpu.merge import make_merge_block
from della_dist.ops.cpu.multiply import make_multiply_block
from della_dist.ops.cpu.rank import TABLE_COLS
from della_dist.ops.cpu.scoring import measure_kept, scored, scoring_bytes
from della_dist.ops.cpu.scratch import ScratchLayout, scratch_layout
from della_dist.ops.cpu.support import DTYPE_CODES, source_digest
from della_dist.ops.exact_products import HostProducts
from della_dist.ops.measurements import Measurement, Selected, Summed, multiplied
from della_dist.ops.prepare import (
    Counting,
    Multiplying,
    Pending,
    Ready,
    Selecting,
    Squaring,
    Summing,
)
from della_dist.specs.passes import gathered_bytes, is_scored, num_products, sums_magnitudes
from della_dist.specs.recipe import GUARD, TensorRecipe
from della_dist.specs.rows import row_view

#: Scratch of a thread is kept for its next call up to this size.
KEEP_SCRATCH_BYTES = 32 << 20

_merge_block = make_merge_block(source_digest())
_measure_block = make_measure_block(source_digest())
_multiply_block = make_multiply_block(source_digest())


class NumbaBackend:
    """Merges blocks on the CPU; equal to the byte to every other backend.

    Any number of threads may call it at once: the kernels release the GIL, and every thread has
    scratch of its own.
    """

    name = "numba"
    #: At this size the fixed cost of a block is below a percent of it.
    block_elements = 1 << 20
    staging_bytes = 0
    device_memory = 0

    def __init__(self) -> None:
        self._local = threading.local()

    def scratch_bytes(self, recipe: TensorRecipe, block_elements: int) -> int:
        """Return the bytes one call needs beyond the block itself and its output.

        The threads of a process share the tables of probabilities, which are counted in full.
        """
        view = row_view(recipe)
        layout = scratch_layout(recipe, view)
        num_experts = layout.num_experts
        total = layout.num_bytes()
        if view.ranked and view.num_cols <= TABLE_COLS:
            total += NUM_TABLES * 8 * TABLE_COLS
        if sums_magnitudes(recipe):
            total += LANES * 4 * 8 * 2048 * num_experts
        total += gathered_bytes(recipe)
        total += row_weights_bytes(recipe, block_elements)
        total += scoring_bytes(recipe, block_elements)
        # The statistics of the block's units.
        return total + 8 * (2 * num_experts + 1) * (block_elements // view.unit + 1) + 65_536

    def products(self, name: str) -> HostProducts:
        """Return where integers of a tensor's matrices are multiplied."""
        del name
        return HostProducts()

    def device_bytes(self, recipe: TensorRecipe, block_elements: int) -> int:
        """Return 0: everything is on the host."""
        del recipe, block_elements
        return 0

    def merge(
        self, recipe: TensorRecipe, prepared: Ready, block: Block, out: npt.NDArray[Any]
    ) -> BlockStats:
        """Merge one block into `out`: uint8, ``(stop - start) * itemsize(out_dtype)`` bytes."""
        settings = recipe.settings
        call = Call(recipe, prepared, block)
        layout, num_experts = call.layout, call.layout.num_experts
        assert len(prepared.weights) == num_experts  # the kernel looks nowhere else
        number = np.float64 if layout.wide else np.float32
        sum_abs = 0.0
        for weight in settings.weights:
            sum_abs += 0.0 if settings.by_energy else abs(weight)
        limit = math.inf if settings.limit is None else settings.limit
        row_elements, weights = block.stop - block.start, np.array([prepared.weights], np.float64)
        shares, ratios = weights[0], np.array(prepared.ratio)
        if settings.by_energy:
            weights = np.ones_like(weights)
        if settings.overlap is not None:
            shares, ratios = ratios, np.ones_like(ratios)
        if settings.angles is not None and settings.angles.by_row:
            row_elements = row_view(recipe).num_cols
            sums, _ = self._products(call, row_elements)
            weights = weights_from_products(recipe, sums).T
        with np.errstate(over="ignore"):
            weights = np.ascontiguousarray(weights.astype(number))
            shares, ratios = shares.astype(number), ratios.astype(number)
        fusion = Fusion(
            inverse=settings.rescale == "inverse",
            elect=settings.elect,
            normalize=settings.normalize,
            late=settings.by_energy,
            overlap=settings.overlap is not None,
            weights=weights,
            shares=shares,
            row_elements=row_elements,
            ratios=ratios,
            constants=np.array((GUARD * sum_abs, settings.lambda_, limit), number),
        )
        num_units = -(-(block.stop - block.start) // call.span.unit)
        totals = Totals(
            squares=np.zeros((num_experts + 1, num_units)),
            dots=np.zeros((num_experts, num_units)),
            chunk_sums=np.zeros((2 * num_experts + 1, SQUARES_SUMS)),
            merged_max_bits=np.zeros_like(call.tally.max_bits[:1]),
            totals=np.zeros(2, np.int64),
        )
        assert out.flags.c_contiguous
        if block.stop > block.start:
            scratch, mask = self._scratch(layout), np.empty(0, np.uint8)
            experts = call.experts
            if is_scored(recipe):
                mask = np.empty(block.stop - block.start, np.uint8)
                scored(recipe, call, scratch, prepared, NO_SELECTION, mask)
                # Bounds are of scores: no magnitude of a delta is too small.
                experts = experts._replace(thresholds=np.zeros_like(experts.thresholds))
            _merge_block(
                call.span,
                call.drop._replace(mask=mask.ctypes.data if mask.size else 0),
                fusion,
                Output(DTYPE_CODES[recipe.out_dtype], out.ctypes.data),
                call.inputs,
                experts,
                scratch,
                call.tally,
                totals,
            )
        counts, max_bits = call.tally
        return BlockStats(
            num_nonfinite=counts[:, 0].copy(),
            num_nonzero=counts[:, 1].copy(),
            num_kept=counts[:, 2].copy(),
            num_elected=counts[:, 3 if settings.elect else 2].copy(),
            max_abs=max_bits.view(number).astype(np.float64),
            sum_sq=np.ascontiguousarray(totals.squares[:-1].T),
            merged_sq=totals.squares[-1],
            dots=np.ascontiguousarray(totals.dots.T),
            merged_max_abs=float(totals.merged_max_bits.view(number)[0]),
            num_conflicts=int(totals.totals[0]),
            num_overflow=int(totals.totals[1]),
        )

    def measure(self, recipe: TensorRecipe, prepared: Pending, block: Block) -> Measurement:
        """Measure one block for the pass that `prepared` asks for."""
        call = Call(recipe, prepared, block)
        layout, num_experts = call.layout, call.layout.num_experts
        if isinstance(prepared, Multiplying):
            sums, num_nonfinite = self._products(call, call.span.unit)
            return multiplied(num_nonfinite, sums)
        if isinstance(prepared, (Squaring, Counting)) and block.stop > block.start:
            return measure_kept(recipe, call, self._scratch(layout), prepared)
        selection = selection_of(prepared)
        if isinstance(prepared, Selecting) and is_scored(recipe):
            num_nonfinite = np.zeros(num_experts, np.int64)
            kept: list[tuple[int, npt.NDArray[np.float64]]] = []
            if block.stop > block.start:
                scratch, none = self._scratch(layout), np.empty(0, np.uint8)
                num_nonfinite, kept = scored(recipe, call, scratch, prepared, selection, none)
            counts = (selection.counts, selection.key_min, selection.key_max)
            return Selected(num_nonfinite, *counts, kept)
        exponents = 2048 if layout.wide else 256
        num_summed = num_experts if isinstance(prepared, Summing) else 0
        l1 = np.zeros((num_summed, LANES, 2, 2, exponents), np.int64)
        if block.stop > block.start:
            _measure_block(
                call.span,
                call.drop,
                call.inputs,
                call.experts,
                self._scratch(layout),
                call.tally,
                selection,
                l1,
            )
        num_nonfinite = call.tally.counts[:, 0].copy()
        if isinstance(prepared, Summing):
            return Summed(num_nonfinite, l1.sum(axis=1))
        return Selected(num_nonfinite, selection.counts, selection.key_min, selection.key_max)

    def _products(
        self, call: Call, unit: int
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
        """Return sums of products (P, U), a unit at a time, and the non-finite deltas (M,)."""
        num_elements, num_pairs = call.span.num_elements, num_products(call.layout.num_experts)
        products = Products(
            sums=np.zeros((num_pairs, -(-num_elements // unit) if unit else 0)),
            chunk_sums=np.zeros((num_pairs, SQUARES_SUMS)),
        )
        tally = call.new_tally()
        if num_elements:
            _multiply_block(
                call.span._replace(unit=unit),
                call.inputs,
                call.experts,
                self._scratch(call.layout),
                tally,
                products,
            )
        return products.sums, tally.counts[:, 0].copy()

    def _scratch(self, layout: ScratchLayout) -> Scratch:
        """Return the scratch of this thread; every call of the thread gets the same memory."""
        local = self._local
        if getattr(local, "layout", None) == layout:
            scratch: Scratch = local.scratch
            return scratch
        buffer: U8Array | None = getattr(local, "buffer", None)
        if buffer is None or buffer.size < layout.num_bytes():
            buffer = np.zeros(layout.num_bytes(), np.uint8)
        scratch = layout.carve(buffer)
        if layout.num_bytes() <= KEEP_SCRATCH_BYTES:
            local.layout, local.scratch, local.buffer = layout, scratch, buffer
        return scratch
