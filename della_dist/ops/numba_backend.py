"""The CPU backend: Numba kernels, called on blocks from threads of the caller's."""

from __future__ import annotations

import threading
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from della_dist.ops.blocks import Block, BlockStats, RowView, row_view
from della_dist.ops.numba_band import BAND_ELEMENTS, CHUNK_ELEMENTS
from della_dist.ops.numba_measure import make_measure_block
from della_dist.ops.numba_merge import make_merge_block
from della_dist.ops.numba_rank import NUM_SLOTS, TABLE_COLS
from della_dist.ops.numba_sort import NUM_DIGIT_COUNTERS
from della_dist.ops.numba_support import DTYPE_CODES, source_digest
from della_dist.ops.prepare import GUARD, SELECT_BUCKETS, Measurement, Prepared
from della_dist.specs import DTYPE_BITS, TensorRecipe

#: Scratch of a thread is kept for its next call up to this size.
KEEP_SCRATCH_BYTES = 32 << 20

#: Tables of keep probabilities that are kept, for different rows and experts.
_NUM_TABLES = 8

_merge_block = make_merge_block(source_digest())
_measure_block = make_measure_block(source_digest())


class _Layout(NamedTuple):
    """How a tensor is worked through, and the shapes of the scratch that takes."""

    cols: int
    """Elements of a row; of a band where nothing is ranked."""
    band: int
    num_experts: int
    ranked: bool
    wide: bool

    def arrays(self) -> dict[str, tuple[tuple[int, ...], type[np.generic]]]:
        """Return shape and dtype of every scratch array."""
        number = np.float64 if self.wide else np.float32
        key = np.uint64 if self.wide else np.uint32
        cols = self.cols if self.ranked else 0
        slots = NUM_SLOTS if self.ranked else 0
        return {
            "v": ((self.num_experts, self.band), number),
            "b": ((self.band,), number),
            "p": ((self.band,), np.float32),
            "pairs": ((CHUNK_ELEMENTS // 2 + 4,), np.uint64),
            "sums": ((4, CHUNK_ELEMENTS), number),
            "signs": ((CHUNK_ELEMENTS,), np.uint32),
            # Read 64 at a time.
            "slot_of": ((cols + 63,), np.uint16),
            "counts16": ((slots,), np.uint16),
            "counts32": ((slots if cols > 0xFFFF else 0,), np.uint32),
            "slot_p": ((slots,), np.float32),
            "below": ((slots,), np.uint32),
            # Written four at a time.
            "filled": ((slots + 4,), np.uint16),
            "filled_counts": ((slots,), np.uint32),
            "keys_a": ((cols,), key),
            "keys_b": ((cols,), key),
            "order_a": ((cols,), np.uint32),
            "order_b": ((cols,), np.uint32),
            "digits": ((NUM_DIGIT_COUNTERS if self.ranked else 0,), np.uint32),
        }

    def num_bytes(self) -> int:
        """Return the size of the scratch."""
        return sum(
            int(np.prod(shape)) * np.dtype(dtype).itemsize
            for shape, dtype in self.arrays().values()
        )


def _layout(recipe: TensorRecipe, view: RowView) -> _Layout:
    cols = view.num_cols if view.ranked else BAND_ELEMENTS
    return _Layout(
        cols=cols,
        band=cols * -(-BAND_ELEMENTS // cols),
        num_experts=len(recipe.expert_dtypes),
        ranked=view.ranked,
        wide="F64" in (recipe.base_dtype, *recipe.expert_dtypes),
    )


@lru_cache(maxsize=_NUM_TABLES)
def _probability_table(cols: int, density: float, epsilon: float) -> npt.NDArray[np.float32]:
    """Return the keep probability by twice the mean rank: (2 * cols - 1,)."""
    mean_rank = np.arange(2 * cols - 1, dtype=np.float64) * 0.5
    table = (density - epsilon) + (2.0 * epsilon) * (mean_rank / (cols - 1))
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
        layout = _layout(recipe, view)
        num_experts = layout.num_experts
        total = layout.num_bytes()
        if view.ranked and view.num_cols <= TABLE_COLS:
            total += _NUM_TABLES * 8 * TABLE_COLS
        if recipe.settings.drop == "magnitude":
            total += 3 * 8 * SELECT_BUCKETS * num_experts
        if recipe.settings.rescale == "l1":
            total += 4 * 8 * 2048 * num_experts
        # A copy of the block where it is not aligned, and the statistics of its units.
        dtypes = (recipe.base_dtype or "BF16", *recipe.expert_dtypes, recipe.out_dtype)
        total += block_elements * sum(DTYPE_BITS[dtype] // 8 for dtype in dtypes)
        return total + 8 * num_experts * (block_elements // view.unit + 1) + 65_536

    def merge(
        self, recipe: TensorRecipe, prepared: Prepared, block: Block, out: npt.NDArray[Any]
    ) -> BlockStats:
        """Merge one block into `out`: uint8, ``(stop - start) * itemsize(out_dtype)`` bytes."""
        assert prepared.stage == "ready"
        settings = recipe.settings
        call = _Call(recipe, prepared, block)
        layout, num_experts = call.layout, call.layout.num_experts
        number = np.float64 if layout.wide else np.float32
        sum_abs = 0.0
        for weight in settings.weights:
            sum_abs += abs(weight)
        weights = np.array(settings.weights, number)
        ratios = np.array(prepared.ratio or (1.0,) * num_experts, number)
        guard_lambda = np.array((GUARD * sum_abs, settings.lambda_), number)
        totals = np.zeros(2, np.int64)
        aligned_out = _aligned(out, recipe.out_dtype)
        if block.stop > block.start:
            scratch = self._scratch(layout)
            _merge_block(
                call.block,
                (
                    *call.modes,
                    settings.rescale == "inverse",
                    settings.elect,
                    settings.normalize,
                ),
                (DTYPE_CODES[recipe.out_dtype], aligned_out.ctypes.data),
                call.inputs,
                call.experts,
                (weights, ratios, call.thresholds, guard_lambda),
                (scratch[:6], (scratch[6:13], scratch[13:])),
                (*call.results, totals),
            )
        if aligned_out is not out:
            out[:] = aligned_out
        counts, max_bits, sum_sq = call.results
        return BlockStats(
            num_nonfinite=counts[:, 0].copy(),
            num_nonzero=counts[:, 1].copy(),
            num_kept=counts[:, 2].copy(),
            num_elected=counts[:, 3 if settings.elect else 2].copy(),
            max_abs=max_bits.view(number).astype(np.float64),
            sum_sq=np.ascontiguousarray(sum_sq.T),
            num_conflicts=int(totals[0]),
            num_overflow=int(totals[1]),
        )

    def measure(self, recipe: TensorRecipe, prepared: Prepared, block: Block) -> Measurement:
        """Measure one block for the pass that `prepared` asks for."""
        assert prepared.stage != "ready"
        call = _Call(recipe, prepared, block)
        layout, num_experts = call.layout, call.layout.num_experts
        selecting = prepared.stage == "select"
        buckets = (num_experts if selecting else 0, SELECT_BUCKETS)
        bucket_counts = np.zeros(buckets, np.int64)
        key_min = np.full(buckets, np.iinfo(np.uint64).max, np.uint64)
        key_max = np.zeros(buckets, np.uint64)
        prefix = np.array([max(0, bits) for bits in prepared.prefix], np.uint64)
        active = np.array([bits >= 0 for bits in prepared.prefix], np.bool_)
        exponents = 2048 if layout.wide else 256
        l1 = np.zeros((0 if selecting else num_experts, 2, 2, exponents), np.int64)
        if block.stop > block.start:
            scratch = self._scratch(layout)
            v, b, p, pairs = scratch[:4]
            _measure_block(
                call.block,
                call.modes,
                call.inputs,
                call.experts,
                call.thresholds,
                ((v[0], b, p, pairs), (scratch[6:13], scratch[13:])),
                call.results,
                (prepared.shift, prepared.bits, prefix, active, bucket_counts, key_min, key_max),
                l1,
            )
        num_nonfinite = call.results[0][:, 0].copy()
        if selecting:
            return Measurement(num_nonfinite, bucket_counts, key_min, key_max)
        return Measurement(num_nonfinite, l1=l1)

    def _scratch(self, layout: _Layout) -> tuple[npt.NDArray[Any], ...]:
        kept: tuple[_Layout, tuple[npt.NDArray[Any], ...]] | None
        kept = getattr(self._local, "scratch", None)
        if kept is not None and kept[0] == layout:
            return kept[1]
        arrays = tuple(
            (np.zeros if name.startswith("counts") else np.empty)(shape, dtype)
            for name, (shape, dtype) in layout.arrays().items()
        )
        if layout.num_bytes() <= KEEP_SCRATCH_BYTES:
            self._local.scratch = (layout, arrays)
        return arrays


class _Call:
    """The arguments that merging and measuring a block have in common, as the kernels take them."""

    def __init__(self, recipe: TensorRecipe, prepared: Prepared, block: Block) -> None:
        view = row_view(recipe)
        assert block.start % view.unit == 0
        settings = recipe.settings
        self.layout = layout = _layout(recipe, view)
        num_experts = layout.num_experts
        num_elements = block.stop - block.start
        self.block = (block.start, num_elements, layout.cols, view.unit)
        random = settings.drop in ("magprune", "random")
        self.modes = (layout.ranked, random)

        raw = [_aligned(e, d) for e, d in zip(block.experts, recipe.expert_dtypes, strict=True)]
        codes = [DTYPE_CODES[dtype] for dtype in recipe.expert_dtypes]
        if block.base is None:
            addresses = [0]
            codes.insert(0, 0)
        else:
            assert recipe.base_dtype is not None
            base = _aligned(block.base, recipe.base_dtype)
            raw.append(base)
            addresses = [base.ctypes.data]
            codes.insert(0, DTYPE_CODES[recipe.base_dtype])
        addresses += [array.ctypes.data for array in raw[:num_experts]]
        self._alive = raw
        self.inputs = (np.array(codes, np.int64), np.array(addresses, np.uint64))

        tables = [0] * num_experts
        if layout.ranked and 1 < layout.cols <= TABLE_COLS:
            pairs = zip(settings.densities, settings.epsilons, strict=True)
            self._tables = [_probability_table(layout.cols, d, e) for d, e in pairs]
            tables = [table.ctypes.data for table in self._tables]
        self.experts = (
            np.array(prepared.keys, np.uint64),
            np.array(settings.densities, np.float64),
            np.array(settings.epsilons, np.float64),
            np.array(tables, np.uint64),
            np.array(settings.densities if random else (1.0,) * num_experts, np.float32),
        )
        key = np.uint64 if layout.wide else np.uint32
        self.thresholds = np.array(prepared.threshold or (0,) * num_experts, key)
        num_units = -(-num_elements // view.unit)
        self.results = (
            np.zeros((num_experts, 4), np.int64),
            np.zeros(num_experts, key),
            np.zeros((num_experts, num_units), np.float64),
        )


def _aligned(raw: npt.NDArray[Any], dtype: str) -> npt.NDArray[Any]:
    """Return `raw`, or a copy of it that is aligned to the item size of `dtype`."""
    if raw.ctypes.data % (DTYPE_BITS[dtype] // 8) or not raw.flags.c_contiguous:
        return raw.copy()
    return raw
