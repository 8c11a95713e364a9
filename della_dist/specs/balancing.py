"""What merging a matrix as a whole takes: how often it is read, what is held of it, its operations.

A stack of matrices is merged one after another. Of each, square matrices are held, as wide as it
is, in float64; where it is turned, the deltas as well, and the merged one. Of several workers one
at a time merges a matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

from della_dist.specs.dtypes import num_elements
from della_dist.specs.recipe import BalanceRule, TensorRecipe, is_wide
from della_dist.specs.rows import row_shape


@dataclass(frozen=True, slots=True)
class Balancing:
    """How a tensor is merged as a whole."""

    rule: BalanceRule
    num_matrices: int
    rows: int
    """Of each, as it is stored."""
    cols: int
    is_turned: bool
    num_experts: int
    itemsize: int
    """Bytes of a number of a delta."""

    @property
    def width(self) -> int:
        """Columns of a matrix, as it is merged."""
        return self.rows if self.is_turned else self.cols

    @property
    def length(self) -> int:
        """Rows of a matrix, as it is merged."""
        return self.cols if self.is_turned else self.rows

    @property
    def looks(self) -> int:
        """How often all rows are looked at before the merged ones follow."""
        return 1

    @property
    def passes(self) -> int:
        """How often all of it is read.

        For the statistics and the largest deltas, for every look, and for the merged delta, unless
        the deltas are held: then the base alone is read once more.
        """
        return 2 if self.is_turned else 2 + self.looks

    def held_bytes(self, threads: int) -> int:
        """Return the bytes that are held beside the deltas of steps."""
        # What threads add up; or, later, the sum and what becomes of it on the way to its inverse.
        held = 8 * self.width**2 * (self.num_experts + max(threads, 3))
        if self.is_turned:
            held += self.itemsize * (self.num_experts + 1) * self.rows * self.cols
        return held

    @property
    def holds(self) -> str:
        """What is held, in words."""
        return f"of each expert a matrix of {self.width} x {self.width} numbers"

    @property
    def step_element_bytes(self) -> int:
        """Bytes that an element of a step takes, beside what is read: deltas, grids, products."""
        return self.itemsize * self.num_experts + 8 * 5

    @property
    def operations(self) -> int:
        """Multiplications and additions in float64, about."""
        elements = self.num_matrices * self.rows * self.cols
        products = 2 * elements * self.width * (2 * self.num_experts + 1)
        return products + self.num_matrices * self.width**3


def balancing(recipe: TensorRecipe, *, is_turned: bool) -> Balancing:
    """Return how a tensor is merged as a whole.

    Parameters
    ----------
    recipe
        Of a tensor of two axes or more, none of which is empty, with a `Balance`.
    is_turned
        Whether a matrix is merged as its transpose.
    """
    balance = recipe.settings.balance
    assert balance is not None
    num_matrices, rows, cols = matrices(recipe.shape)
    return Balancing(
        rule=balance.rule,
        num_matrices=num_matrices,
        rows=rows,
        cols=cols,
        is_turned=is_turned,
        num_experts=len(recipe.expert_dtypes),
        itemsize=8 if is_wide(recipe) else 4,
    )


def matrices(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Return how many matrices a tensor is that `can_be_balanced`, and their rows and columns."""
    rows, cols = row_shape(shape)
    num_matrices = shape[0] if len(shape) == 3 else 1
    return num_matrices, rows // num_matrices, cols


def can_be_balanced(shape: tuple[int, ...]) -> bool:
    """Return whether a tensor of this shape is a matrix, or a stack of them."""
    return len(shape) >= 2 and num_elements(shape) > 0
