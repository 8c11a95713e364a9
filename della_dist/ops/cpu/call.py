"""The arguments of the kernels, as they are made of a recipe, what is known of it, and a block."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from della_dist.ops.blocks import Block
from della_dist.ops.cpu.arguments import Drop, Experts, Inputs, Selection, Span, Tally
from della_dist.ops.cpu.rank import TABLE_COLS
from della_dist.ops.cpu.scratch import scratch_layout
from della_dist.ops.cpu.support import DTYPE_CODES
from della_dist.ops.prepare import Pending, Prepared, Selecting
from della_dist.specs.passes import SELECT_BUCKETS
from della_dist.specs.recipe import TensorRecipe
from della_dist.specs.rows import row_view

#: Tables of keep probabilities that are kept, for different rows and experts.
NUM_TABLES = 16


@lru_cache(maxsize=NUM_TABLES)
def _probability_table(cols: int, density: float, epsilon: float) -> npt.NDArray[np.float32]:
    """Return the keep probability by twice the mean rank: (2 * cols - 1,)."""
    mean_rank = np.arange(2 * cols - 1, dtype=np.float64) * 0.5
    table: npt.NDArray[np.float64] = (density - epsilon) + (2.0 * epsilon) * (
        mean_rank / (cols - 1)
    )
    return table.astype(np.float32)


_NONE = np.zeros(0, np.uint64)
_EMPTY = np.zeros((0, SELECT_BUCKETS), np.uint64)
#: Of a pass that counts nothing.
NO_SELECTION = Selection(0, 0, _NONE, _NONE != 0, _EMPTY.view(np.int64), _EMPTY, _EMPTY)


def selection_of(prepared: Pending) -> Selection:
    """Return the arrays of a selection, empty ones for another pass."""
    if not isinstance(prepared, Selecting):
        return NO_SELECTION
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


class Call:
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
        self.drop = Drop(layout.ranked, random, settings.drop == "outliers", 0)

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
