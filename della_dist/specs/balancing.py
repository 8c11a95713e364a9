"""What merging a matrix as a whole takes: how often it is read, what is held of it, its operations.

A stack of matrices is merged one after another. Of each, a (C, C) matrix is held for every expert,
in float64; where the inputs are the rows, the deltas as well, turned, and the merged one. Of
several workers one at a time merges a matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

from della_dist.specs.dtypes import num_elements
from della_dist.specs.recipe import TensorRecipe, is_wide
from della_dist.specs.rows import row_shape


@dataclass(frozen=True, slots=True)
class Balancing:
    """How a tensor is merged as a whole."""

    num_matrices: int
    rows: int
    """Of each, as it is stored."""
    cols: int
    is_turned: bool
    num_experts: int
    itemsize: int
    """Bytes of a number of a delta."""

    @property
    def inputs(self) -> int:
        """Inputs of the layer."""
        return self.rows if self.is_turned else self.cols

    @property
    def passes(self) -> int:
        """How often all of it is read.

        For the statistics and the largest deltas, for what each expert uses, and for the merged
        delta, unless the deltas are held: then the base alone is read once more.
        """
        return 2 if self.is_turned else 3

    def held_bytes(self, threads: int) -> int:
        """Return the bytes that are held beside the deltas of steps."""
        square = 8 * self.inputs**2
        # What threads add up; or, later, the sum and what becomes of it on the way to its inverse.
        held = square * (self.num_experts + max(threads, 3))
        if self.is_turned:
            held += self.itemsize * (self.num_experts + 1) * self.rows * self.cols
        return held

    @property
    def step_element_bytes(self) -> int:
        """Bytes that an element of a step takes, beside what is read: deltas, grids, products."""
        return self.itemsize * self.num_experts + 8 * 5

    @property
    def operations(self) -> int:
        """Multiplications and additions in float64, about."""
        elements = self.num_matrices * self.rows * self.cols
        products = 2 * elements * self.inputs * (2 * self.num_experts + 1)
        return products + self.num_matrices * self.inputs**3


def balancing(recipe: TensorRecipe, *, is_turned: bool) -> Balancing:
    """Return how a tensor is merged as a whole.

    Parameters
    ----------
    recipe
        Of a tensor of two axes or more, none of which is empty.
    is_turned
        Whether the inputs of the layer are the rows.
    """
    rows, cols = row_shape(recipe.shape)
    num_matrices = recipe.shape[0] if len(recipe.shape) == 3 else 1
    return Balancing(
        num_matrices=num_matrices,
        rows=rows // num_matrices,
        cols=cols,
        is_turned=is_turned,
        num_experts=len(recipe.expert_dtypes),
        itemsize=8 if is_wide(recipe) else 4,
    )


def can_be_balanced(shape: tuple[int, ...]) -> bool:
    """Return whether a tensor of this shape is a matrix, or a stack of them."""
    return len(shape) >= 2 and num_elements(shape) > 0
