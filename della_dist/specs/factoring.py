"""How the delta of a matrix is factored: in which pieces, how often it is formed, what that holds.

The delta D of a matrix, (R, C), becomes ``left @ right`` of a rank r: (R, r) and (r, C). It is
formed in *steps* of whole rows, whose number hangs on the matrix alone, since sums over steps are
rounded in their order: no block size, no memory limit shows in the result.

Small matrices, and those of which most of the rank is wanted, are held whole and factored by LAPACK
(`SMALL_ELEMENTS`). Of others a basis of `columns` columns is turned towards the largest singular
values by `TURNS` passes, each of which forms the delta anew (Halko, Martinsson, Tropp: Finding
structure with randomness. SIAM Review 53, 2011, algorithm 4.4).
"""

from __future__ import annotations

from dataclasses import dataclass

from della_dist.specs.recipe import TensorRecipe, is_wide
from della_dist.specs.rows import row_shape, row_view

#: Matrices of at most this many elements are factored whole.
SMALL_ELEMENTS = 1 << 18

#: Columns of the basis beyond the rank, at least.
MORE_COLUMNS = 16

#: Passes that turn the basis, before the one that reads the factors off it.
TURNS = 3

#: Rows of a step, at least: fewer would be added up more often than multiplied.
STEP_ROWS = 64


@dataclass(frozen=True, slots=True)
class Factoring:
    """How the delta of one matrix is factored."""

    rows: int
    cols: int
    rank: int
    """Of the factors: at most what was asked for, and no more than the matrix can have."""
    columns: int
    """Of the basis."""
    is_whole: bool
    """Whether the delta is held whole, and factored by LAPACK."""
    step_elements: int
    """Of a step; the last one may have fewer."""
    itemsize: int
    """Bytes of a number of the delta."""

    @property
    def forms(self) -> int:
        """How often the delta is formed."""
        return 1 if self.is_whole else TURNS + 1

    @property
    def held_bytes(self) -> int:
        """Bytes that are held of a matrix, beside the steps in flight, at most."""
        rows, cols, size = self.rows, self.cols, 8 * self.columns
        factors = 4 * self.rank * (rows + cols)
        if self.is_whole:  # the delta, a copy for LAPACK, its work, and all singular vectors
            least = min(rows, cols)
            svd = rows * cols + least * (rows + cols) + 4 * least * (least + 16)
            return 8 * (rows * cols + svd) + 2 * factors
        turning = 4 * cols * size  # two bases, and what QR copies
        reading = (cols + rows) * size + 16 * self.rank * max(rows, cols)
        return max(turning, reading) + 2 * factors

    @property
    def step_bytes(self) -> int:
        """Bytes that are held of each step in flight, beside the delta and what it is formed of."""
        doubles = 8 * self.step_elements
        if self.is_whole:
            return doubles
        rows = -(-self.step_elements // self.cols)
        return doubles + 8 * self.columns * (self.cols + 2 * rows)

    @property
    def operations(self) -> int:
        """Multiplications and additions in float64, about."""
        if self.is_whole:
            return 12 * self.rows * self.cols * min(self.rows, self.cols)
        return (4 * TURNS + 2) * self.rows * self.cols * self.columns


def factoring(recipe: TensorRecipe, rank: int) -> Factoring:
    """Return how the delta of a matrix is factored.

    Parameters
    ----------
    recipe
        Of a tensor with two axes, none of which is empty, and whole rows in its units.
    rank
        At most.
    """
    rows, cols = row_shape(recipe.shape)
    least = min(rows, cols)
    rank = min(rank, least)
    columns = min(least, rank + max(MORE_COLUMNS, rank // 2))
    unit = row_view(recipe).unit
    step = unit * -(-STEP_ROWS * cols // unit)
    return Factoring(
        rows=rows,
        cols=cols,
        rank=rank,
        columns=columns,
        is_whole=rows * cols <= SMALL_ELEMENTS or 2 * columns >= least,
        step_elements=min(step, -(-rows * cols // unit) * unit),
        itemsize=8 if is_wide(recipe) else 4,
    )
