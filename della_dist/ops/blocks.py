"""What the kernels are called with: blocks of a tensor, and their statistics.

**Sums of squares**, and of products of two deltas, are rounded in one order, which every
backend keeps to the bit. A unit (a row, where rows have angles of their own) is cut into chunks of
`SQUARES_CHUNK`, the last one shorter. In a chunk, element i is added to sum i % 16, from the first
to the last; the 16 sums are added up by halves (j and j + 8, j and j + 4, ...); the chunks are
added to the unit's sum in order. All in float64, from float64 products.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from della_dist.ops.exact_products import Products
from della_dist.ops.measurements import Measurement
from della_dist.ops.prepare import Pending, Ready
from della_dist.specs.dtypes import num_elements
from della_dist.specs.recipe import TensorRecipe
from della_dist.specs.statistics import ExpertStats, TensorStats

U8Array = npt.NDArray[np.uint8]

#: Elements whose squares are added up in `SQUARES_SUMS` sums before they join those of their unit.
SQUARES_CHUNK = 1024
SQUARES_SUMS = 16


@dataclass(frozen=True, slots=True)
class Block:
    """Elements ``start`` to ``stop`` of a tensor, as raw little-endian bytes of each checkpoint."""

    start: int
    stop: int
    base: U8Array | None
    """``(stop - start) * itemsize`` bytes; None where the recipe has no base."""
    experts: tuple[U8Array, ...]


@dataclass(frozen=True, slots=True)
class BlockStats:
    """Counts and sums over one block. M experts, U units in the block."""

    num_nonfinite: npt.NDArray[np.int64]
    """(M,): deltas that are NaN or infinite."""
    num_nonzero: npt.NDArray[np.int64]
    """(M,): deltas that are not zero."""
    num_kept: npt.NDArray[np.int64]
    """(M,): non-zero deltas that survived the drop step."""
    num_elected: npt.NDArray[np.int64]
    """(M,): non-zero contributions that entered the sum."""
    max_abs: npt.NDArray[np.float64]
    """(M,): the largest finite absolute delta."""
    sum_sq: npt.NDArray[np.float64]
    """(U, M): sum of the squared deltas of every unit, added up in the order stated above."""
    merged_sq: npt.NDArray[np.float64]
    """(U,): the same of the merged delta, which is that of the output as it is written."""
    dots: npt.NDArray[np.float64]
    """(U, M): sum of the products of each expert's delta and the merged one, in that order too."""
    merged_max_abs: float
    """The largest finite absolute merged delta."""
    num_conflicts: int
    """Elements at which the surviving contributions have both signs."""
    num_overflow: int
    """Elements that are not finite in the output although the base is."""


def combine_stats(
    recipe: TensorRecipe, blocks: Sequence[BlockStats], joined: Sequence[BlockStats] | None = None
) -> TensorStats:
    """Add up the statistics of all blocks of a tensor; the result is the same for any blocks.

    Parameters
    ----------
    recipe, blocks
        How it is merged, and what was measured.
    joined
        Of a tensor that is merged as a whole, the blocks in which its merged delta, which counts as
        the first of the experts, joined the base: what is measured of the output is theirs.
    """
    outputs = blocks if joined is None else joined
    skipped = 0 if joined is None else 1
    merged_l2 = _l2(float(x) for b in outputs for x in b.merged_sq)
    experts = []
    for m in range(len(recipe.expert_dtypes)):
        delta_l2 = _l2(float(x) for b in blocks for x in b.sum_sq[:, m])
        dots = (float(x) for b in outputs for x in b.dots[:, m + skipped])
        experts.append(
            ExpertStats(
                num_nonzero=sum(int(b.num_nonzero[m]) for b in blocks),
                num_kept=sum(int(b.num_kept[m]) for b in blocks),
                num_elected=sum(int(b.num_elected[m]) for b in blocks),
                delta_l2=delta_l2,
                delta_max_abs=max((float(b.max_abs[m]) for b in blocks), default=0.0),
                num_nonfinite=sum(int(b.num_nonfinite[m]) for b in blocks),
                cosine=_cosine(dots, delta_l2, merged_l2),
            )
        )
    return TensorStats(
        num_elements=num_elements(recipe.shape),
        num_conflicts=sum(b.num_conflicts for b in blocks),
        experts=tuple(experts),
        merged_l2=merged_l2,
        merged_max_abs=max((b.merged_max_abs for b in outputs), default=0.0),
    )


def _l2(squares: Iterable[float]) -> float:
    """Return the root of the sum; fsum is exactly rounded: the grouping into blocks cannot show."""
    try:
        return math.sqrt(math.fsum(squares))
    except OverflowError:  # finite float64 squares whose sum is not
        return math.inf


def _cosine(dots: Iterable[float], one: float, other: float) -> float | None:
    """Return the cosine of two deltas of these norms; None where float64 does not hold it."""
    if one == 0 or other == 0:
        return None
    try:
        cosine = math.fsum(dots) / one / other
    except (OverflowError, ValueError):  # the latter of infinities of both signs
        return None
    return max(-1.0, min(1.0, cosine)) if math.isfinite(one) and math.isfinite(other) else None


class Backend(Protocol):
    """The two implementations of the pipeline, Numba and torch, equal to the byte."""

    name: str
    block_elements: int
    """Of a block, beyond which nothing is gained."""
    staging_bytes: int
    """Of host memory that are held for as long as the backend is there."""
    device_memory: int
    """Bytes that may be used of a device with memory of its own; 0 where there is none."""

    def scratch_bytes(self, recipe: TensorRecipe, block_elements: int) -> int:
        """Return the bytes of host memory one call needs beyond the block and its output."""
        ...

    def products(self, name: str) -> Products:
        """Return where integers of a tensor's matrices are multiplied: the device, if any."""
        ...

    def device_bytes(self, recipe: TensorRecipe, block_elements: int) -> int:
        """Return the bytes of device memory that the calls of all threads take together."""
        ...

    def measure(self, recipe: TensorRecipe, prepared: Pending, block: Block) -> Measurement:
        """Measure one block for the pass that `prepared` asks for."""
        ...

    def merge(
        self, recipe: TensorRecipe, prepared: Ready, block: Block, out: npt.NDArray[Any]
    ) -> BlockStats:
        """Merge one block into `out`: uint8, ``(stop - start) * itemsize(out_dtype)`` bytes."""
        ...
