"""The CPU backend: Numba kernels, called on blocks from threads of the caller's."""

from __future__ import annotations

import threading
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from della_dist.ops.angles import row_weights_bytes, weights_from_products
from della_dist.ops.blocks import SQUARES_SUMS, Block, BlockStats, U8Array
from della_dist.ops.cpu.arguments import (
    Drop,
    Experts,
    Fusion,
    Inputs,
    Output,
    Products,
    Scratch,
    Selection,
    Span,
    Tally,
    Totals,
)
from della_dist.ops.cpu.measure import LANES, make_measure_block
from della_dist.ops.cpu.merge import make_merge_block
from della_dist.ops.cpu.multiply import make_multiply_block
from della_dist.ops.cpu.rank import TABLE_COLS
from della_dist.ops.cpu.scratch import ScratchLayout, scratch_layout
from della_dist.ops.cpu.support import DTYPE_CODES, source_digest
from della_dist.ops.prepare import (
    Measurement,
    Multiplying,
    Pending,
    Prepared,
    Ready,
    Selected,
    Selecting,
    Summed,
    Summing,
    multiplied,
)
from della_dist.specs.passes import SELECT_BUCKETS, gathered_bytes, num_products, sums_magnitudes
from della_dist.specs.recipe import GUARD, TensorRecipe
from della_dist.specs.rows import row_view

#: Scratch of a thread is kept for its next call up to this size.
KEEP_SCRATCH_BYTES = 32 << 20

#: Tables of keep probabilities that are kept, for different rows and experts.
_NUM_TABLES = 16

_merge_block = make_merge_block(source_digest())
_measure_block = make_measure_block(source_digest())
_multiply_block = make_multiply_block(source_digest())


@lru_cache(maxsize=_NUM_TABLES)
def _probability_table(cols: int, density: float, epsilon: float) -> npt.NDArray[np.float32]:
    """Return the keep probability by twice the mean rank: (2 * cols - 1,)."""
    mean_rank = np.arange(2 * cols - 1, dtype=np.float64) * 0.5
    table: npt.NDArray[np.float64] = (density - epsilon) + (2.0 * epsilon) * (
        mean_rank / (cols - 1)
    )
    return table.astype(np.float32)


class NumbaBackend:
    """Merges blocks on the CPU; equal to the byte to every other backend.

    Any number of threads may call it at once: the kernels release the GIL, and every thread has
    scratch of its own.
    """

    name = "numba"

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
            total += _NUM_TABLES * 8 * TABLE_COLS
        if sums_magnitudes(recipe):
            total += LANES * 4 * 8 * 2048 * num_experts
        total += gathered_bytes(recipe)
        total += row_weights_bytes(recipe, block_elements)
        # The statistics of the block's units.
        return total + 8 * num_experts * (block_elements // view.unit + 1) + 65_536

    def merge(
        self, recipe: TensorRecipe, prepared: Ready, block: Block, out: npt.NDArray[Any]
    ) -> BlockStats:
        """Merge one block into `out`: uint8, ``(stop - start) * itemsize(out_dtype)`` bytes."""
        settings = recipe.settings
        call = _Call(recipe, prepared, block)
        layout, num_experts = call.layout, call.layout.num_experts
        assert len(prepared.weights) == num_experts  # the kernel looks nowhere else
        number = np.float64 if layout.wide else np.float32
        sum_abs = 0.0
        for weight in settings.weights:
            sum_abs += abs(weight)
        row_elements, weights = block.stop - block.start, np.array([prepared.weights], np.float64)
        if settings.angles is not None and settings.angles.by_row:
            row_elements = row_view(recipe).num_cols
            sums, _ = self._products(call, row_elements)
            weights = weights_from_products(recipe, sums).T
        with np.errstate(over="ignore"):
            weights = np.ascontiguousarray(weights.astype(number))
        fusion = Fusion(
            inverse=settings.rescale == "inverse",
            elect=settings.elect,
            normalize=settings.normalize,
            weights=weights,
            row_elements=row_elements,
            ratios=np.array(prepared.ratio, number),
            guard_lambda=np.array((GUARD * sum_abs, settings.lambda_), number),
        )
        num_units = -(-(block.stop - block.start) // call.span.unit)
        totals = Totals(
            sum_sq=np.zeros((num_experts, num_units), np.float64),
            chunk_sums=np.zeros((num_experts, SQUARES_SUMS)),
            totals=np.zeros(2, np.int64),
        )
        assert out.flags.c_contiguous
        if block.stop > block.start:
            _merge_block(
                call.span,
                call.drop,
                fusion,
                Output(DTYPE_CODES[recipe.out_dtype], out.ctypes.data),
                call.inputs,
                call.experts,
                self._scratch(layout),
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
            sum_sq=np.ascontiguousarray(totals.sum_sq.T),
            num_conflicts=int(totals.totals[0]),
            num_overflow=int(totals.totals[1]),
        )

    def measure(self, recipe: TensorRecipe, prepared: Pending, block: Block) -> Measurement:
        """Measure one block for the pass that `prepared` asks for."""
        call = _Call(recipe, prepared, block)
        layout, num_experts = call.layout, call.layout.num_experts
        if isinstance(prepared, Multiplying):
            sums, num_nonfinite = self._products(call, call.span.unit)
            return multiplied(num_nonfinite, sums)
        selection = _selection(prepared)
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
        self, call: _Call, unit: int
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


def _selection(prepared: Pending) -> Selection:
    """Return the arrays of a selection, empty ones for another pass."""
    if not isinstance(prepared, Selecting):
        none = np.zeros(0, np.uint64)
        empty = np.zeros((0, SELECT_BUCKETS), np.uint64)
        return Selection(0, 0, none, none != 0, empty.view(np.int64), empty, empty)
    buckets = (len(prepared.prefix), SELECT_BUCKETS)
    return Selection(
        shift=prepared.shift,
        bits=prepared.bits,
        prefix=np.array([max(0, bits) for bits in prepared.prefix], np.uint64),
        active=np.array(prepared.counted, np.bool_),
        counts=np.zeros(buckets, np.int64),
        key_min=np.full(buckets, np.iinfo(np.uint64).max, np.uint64),
        key_max=np.zeros(buckets, np.uint64),
    )


class _Call:
    """The arguments that merging and measuring a block have in common, as the kernels take them."""

    def __init__(self, recipe: TensorRecipe, prepared: Prepared, block: Block) -> None:
        view = row_view(recipe)
        assert block.start % view.unit == 0
        settings = recipe.settings
        self.layout = layout = scratch_layout(recipe, view)
        num_experts = layout.num_experts
        num_elements = block.stop - block.start
        self.span = Span(block.start, num_elements, layout.cols, view.unit)
        random = settings.drop in ("magprune", "random")
        self.drop = Drop(layout.ranked, random, settings.drop == "outliers")

        dtypes = (recipe.base_dtype or "F32", *recipe.expert_dtypes)
        codes = [DTYPE_CODES[dtype] for dtype in dtypes]
        assert all(raw.flags.c_contiguous for raw in block.experts)
        assert block.base is None or block.base.flags.c_contiguous
        addresses = [0 if block.base is None else block.base.ctypes.data]
        addresses += [raw.ctypes.data for raw in block.experts]
        self.inputs = Inputs(np.array(codes, np.int64), np.array(addresses, np.uint64))

        tables = [0] * num_experts
        if layout.ranked and layout.cols <= TABLE_COLS:
            pairs = zip(settings.densities, settings.epsilons, strict=True)
            self._tables = [_probability_table(layout.cols, d, e) for d, e in pairs]
            tables = [table.ctypes.data for table in self._tables]
        key = np.uint64 if layout.wide else np.uint32
        self.experts = Experts(
            is_delta=np.array(recipe.is_delta, np.bool_),
            keys=np.array(prepared.keys, np.uint64),
            densities=np.array(settings.densities, np.float64),
            epsilons=np.array(settings.epsilons, np.float64),
            tables=np.array(tables, np.uint64),
            const_p=np.array(settings.densities if random else (1.0,) * num_experts, np.float32),
            thresholds=np.array(prepared.threshold, key),
            ceilings=np.array(prepared.ceiling, key),
        )
        self.tally = self.new_tally()

    def new_tally(self) -> Tally:
        """Return counts of nothing."""
        num_experts = self.layout.num_experts
        key = np.uint64 if self.layout.wide else np.uint32
        return Tally(np.zeros((num_experts, 4), np.int64), np.zeros(num_experts, key))
