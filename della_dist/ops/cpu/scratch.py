"""The memory that a call of the Numba kernels works in: which arrays, and where they lie."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from della_dist.ops.blocks import U8Array
from della_dist.ops.cpu.arguments import RankScratch, Scratch, SlotScratch, SortScratch, Work
from della_dist.ops.cpu.band import BAND_ELEMENTS, CHUNK_ELEMENTS
from della_dist.ops.cpu.convert import STAGED_ELEMENTS
from della_dist.ops.cpu.slots import NUM_SLOTS
from della_dist.ops.cpu.sort import NUM_DIGIT_COUNTERS
from della_dist.specs.passes import is_scored
from della_dist.specs.recipe import TensorRecipe, is_wide
from della_dist.specs.rows import RowView

_Record = TypeVar("_Record", Work, SlotScratch, SortScratch)

#: Rows up to this length are sorted with 32-bit integers for places and ranks.
NARROW_ORDER_COLS = 1 << 31

#: Rows up to this length are kept while their divergences are found, and computed again otherwise.
KEPT_ROW_ELEMENTS = 1 << 14

_GAP_BYTES = 128


class ScratchLayout(NamedTuple):
    """How a tensor is worked through, and the shapes of the scratch that takes."""

    cols: int
    """Elements of a row; of a band where nothing is ranked."""
    band: int
    num_experts: int
    ranked: bool
    wide: bool
    row_numbers: int
    """Elements of a row whose divergence is found, or of a chunk, that are kept in float64."""

    def arrays(self) -> dict[str, tuple[tuple[int, ...], type[np.generic]]]:
        """Return shape and dtype of every scratch array, by its name in the records of scratch."""
        number = np.float64 if self.wide else np.float32
        key = np.uint64 if self.wide else np.uint32
        # Twice a rank must fit.
        order = np.uint32 if self.cols <= NARROW_ORDER_COLS else np.uint64
        cols = self.cols if self.ranked else 0
        slots = NUM_SLOTS if self.ranked else 0
        return {
            "v": ((self.num_experts, self.band), number),
            "w": ((self.num_experts, self.band), number),
            "b": ((self.band,), number),
            "p": ((self.band,), np.float32),
            "pairs": ((CHUNK_ELEMENTS // 2 + 4,), np.uint64),
            "staging": ((8 * STAGED_ELEMENTS,), np.uint8),
            "sums": ((4, CHUNK_ELEMENTS), number),
            "signs": ((CHUNK_ELEMENTS,), np.uint32),
            "rows": ((2, self.row_numbers), np.float64),
            # Read 64 at a time.
            "slot_of": ((cols + 63,), np.uint16),
            "counts16": ((NUM_SLOTS,), np.uint16),
            "counts32": ((NUM_SLOTS,), np.uint32),
            "slot_p": ((slots,), np.float32),
            "below": ((slots,), np.uint32),
            # Written four at a time.
            "filled": ((slots + 4,), np.uint16),
            "filled_counts": ((slots,), np.uint32),
            "keys_a": ((cols,), key),
            "keys_b": ((cols,), key),
            "order_a": ((cols,), order),
            "order_b": ((cols,), order),
            "digits": ((NUM_DIGIT_COUNTERS if self.ranked else 0,), np.uint32),
        }

    def num_bytes(self) -> int:
        """Return the size of the buffer that holds all scratch arrays."""
        return sum(_padded_bytes(shape, dtype) for shape, dtype in self.arrays().values())

    def carve(self, buffer: U8Array) -> Scratch:
        """Return the scratch arrays as views of `buffer`.

        The counters come first: they are zero before and after every call, wherever the other
        arrays lie.
        """
        arrays = self.arrays()
        views: dict[str, npt.NDArray[Any]] = {}
        offset = 0
        for name in sorted(arrays, key=lambda name: not name.startswith("counts")):
            shape, dtype = arrays[name]
            count = math.prod(shape)
            piece = buffer[offset : offset + count * np.dtype(dtype).itemsize]
            views[name] = piece.view(dtype).reshape(shape)
            offset += _padded_bytes(shape, dtype)

        def record(kind: type[_Record]) -> _Record:
            return kind(*(views[name] for name in kind._fields))

        return Scratch(record(Work), RankScratch(record(SlotScratch), record(SortScratch)))


def _padded_bytes(shape: tuple[int, ...], dtype: type[np.generic]) -> int:
    """Return the bytes of an array, rounded up to a whole cache line, and of a gap behind it.

    Without one, arrays of a power of two bytes contend for the same lines of the cache.
    """
    return -(-math.prod(shape) * np.dtype(dtype).itemsize // 64) * 64 + _GAP_BYTES


def scratch_layout(recipe: TensorRecipe, view: RowView) -> ScratchLayout:
    """Return the scratch that merging or measuring any block of `recipe`'s tensor takes."""
    # A row of one element has no ranks.
    ranked = view.ranked and view.num_cols > 1
    cols = view.num_cols if ranked else BAND_ELEMENTS
    row_numbers = CHUNK_ELEMENTS if is_scored(recipe) else 0
    if recipe.settings.drop == "importance" and view.num_cols <= KEPT_ROW_ELEMENTS:
        row_numbers = max(row_numbers, view.num_cols)
    return ScratchLayout(
        cols=cols,
        band=cols * -(-BAND_ELEMENTS // cols),
        num_experts=len(recipe.expert_dtypes),
        ranked=ranked,
        wide=is_wide(recipe),
        row_numbers=row_numbers,
    )
