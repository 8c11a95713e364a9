"""What merging a matrix as a whole takes: how often it is read, what is held of it, its operations.

A stack of matrices is merged one after another. Of each, square matrices are held, as wide as it
is, in float64; where it is turned, the deltas as well, and the merged one. Rules that tell inputs
from outputs turn it where the inputs are its rows, others where it is wider than high.
"""

from __future__ import annotations

from dataclasses import dataclass

from della_dist.specs.dtypes import num_elements
from della_dist.specs.recipe import BalanceRule, TensorRecipe, is_wide
from della_dist.specs.rows import row_shape

#: Rows that one product has, where bytes hang on their number: of steps so many, or a multiple.
PIECE_ROWS = 64

#: Square matrices that are held while LAPACK decomposes a triangle: that, a copy, both of its
#: vectors twice, and room to work in. Less before, while it is found of twice as many rows.
SVD_SQUARES = 10
#: Operations of one such decomposition, by N**3, as long as they take beside products.
SVD = 10


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
    def looks(self) -> int:
        """How often all rows are looked at before the merged ones follow."""
        return 2 if self.rule == "tsv" else 1

    @property
    def passes(self) -> int:
        """How often all of it is read.

        For the statistics and the largest deltas, for every look, and for the merged delta, unless
        the deltas are held: then the base alone is read once more.
        """
        return 2 if self.is_turned else 2 + self.looks

    @property
    def most_together(self) -> int:
        """How many matrices can be decomposed at once: each expert's, or two that follow."""
        return self.num_experts if self.rule == "tsv" else 1

    @property
    def leaves_threads(self) -> bool:
        """Whether threads wait for one that decomposes, and could merge another matrix."""
        return self.rule != "wudi"

    def held_bytes(self, threads: int, together: int = 1) -> int:
        """Return the bytes that are held beside the deltas of steps.

        Parameters
        ----------
        threads
            That look at steps.
        together
            Matrices that are decomposed at once.
        """
        match self.rule:
            case "wudi":
                # What threads add up; or, later, the sum and what becomes of it on the way to its
                # inverse.
                squares = self.num_experts + max(threads, 3)
            case "iso_c":
                squares = SVD_SQUARES
            case "tsv":
                # Twice as many rows of every expert, and what its triplets are; or the directions
                # of all, that of which is made orthonormal, and what comes of both.
                squares = max(2 * self.num_experts + SVD_SQUARES * together + 2, SVD_SQUARES + 4)
        # Of the narrowest matrices, each expert has a triplet all the same.
        held = 8 * squares * max(self.width, PIECE_ROWS, self.num_experts) ** 2
        if self.is_turned:
            held += self.itemsize * (self.num_experts + 1) * self.rows * self.cols
        return held

    @property
    def holds(self) -> str:
        """What is held, in words."""
        size = f"{self.width} x {self.width} numbers"
        match self.rule:
            case "wudi":
                return f"of each expert a matrix of {size}"
            case "iso_c":
                return f"the singular values of a matrix of {size}"
            case "tsv":
                return f"of each expert the singular values of a matrix of {size}"

    @property
    def step_element_bytes(self) -> int:
        """Bytes that an element of a step takes, beside what is read: deltas, grids, products."""
        return self.itemsize * self.num_experts + 8 * 5

    @property
    def seen_element_bytes(self) -> int:
        """Bytes of it that wait for those before it, once it was looked at."""
        match self.rule:
            case "wudi":
                return 0
            case "iso_c":
                return 8
            case "tsv":
                return max(8, self.itemsize * self.num_experts)

    @property
    def step_unit(self) -> int:
        """Rows that steps are multiples of, as the matrix is merged."""
        return 1 if self.rule == "wudi" else PIECE_ROWS

    @property
    def operations(self) -> int:
        """Multiplications and additions in float64, about, of which each thread does its part."""
        elements = self.num_matrices * self.rows * self.cols
        match self.rule:
            case "wudi":
                products = 2 * elements * self.width * (2 * self.num_experts + 1)
                return products + self.inverse_operations
            case "iso_c":
                return 2 * elements * self.width
            case "tsv":
                found = 4 * elements * self.width + self.num_matrices * SVD * self.width**3
                return 6 * elements * self.width + self.num_experts * found

    @property
    def inverse_operations(self) -> int:
        """Those of them that are an inverse, which is computed on the CPU whatever the device."""
        return self.num_matrices * self.width**3 if self.rule == "wudi" else 0

    @property
    def lone_operations(self) -> int:
        """Those that one thread does alone."""
        elements = self.num_matrices * self.rows * self.cols
        match self.rule:
            case "wudi":
                return 0
            case "iso_c":
                return 4 * elements * self.width + self.num_matrices * SVD * self.width**3
            case "tsv":
                return 4 * elements * self.width + 2 * self.num_matrices * SVD * self.width**3


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


def has_inputs(rule: BalanceRule) -> bool:
    """Return whether a rule tells inputs of a layer from outputs; others turn what is wider."""
    return rule == "wudi"


def can_be_balanced(shape: tuple[int, ...]) -> bool:
    """Return whether a tensor of this shape is a matrix, or a stack of them."""
    return len(shape) >= 2 and num_elements(shape) > 0
