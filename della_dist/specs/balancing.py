"""What merging a matrix as a whole takes: how often it is read, what is held of it, its operations.

A stack of matrices is merged one after another. Of each, square matrices are held, as wide as it
is, in float64; where it is turned, the deltas as well, and the merged one. Rules that tell inputs
from outputs turn it where the inputs are its rows, others where it is wider than high.

`wudi` has three forms, of which the shapes and the experts' ranks tell the one whose square
matrices are the least: the *primal*, as wide as the matrix; the *dual*, as wide as the rows of all
experts' deltas together, which are held; and, where all experts are adapters, that of *low rank*,
as wide as their ranks together, in which no delta is formed but to be measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from della_dist.specs.dtypes import num_elements
from della_dist.specs.ranks import rank_of_all
from della_dist.specs.recipe import BalanceRule, is_wide
from della_dist.specs.sources import Balanced

#: How `wudi` merges a matrix; other rules have one form, which counts as ``primal``.
Form: TypeAlias = Literal["primal", "dual", "low_rank"]

#: Rows that one product has, where bytes hang on their number: of steps so many, or a multiple.
PIECE_ROWS = 64

#: Stacked rows whose products with all others one thread finds at once.
STRIP_ROWS = 128

#: Stacked rows from which on a device multiplies with them. An estimate: to add up fewer products
#: takes a core about as long as to copy what comes back from a device to where it belongs.
MIN_DEVICE_ROWS = 64

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
    form: Form = "primal"
    num_stacked: int = 0
    """Of other forms than the primal: rows that the right factors of all experts have together."""

    @property
    def width(self) -> int:
        """Columns of a matrix, as it is merged."""
        return self.rows if self.is_turned else self.cols

    @property
    def height(self) -> int:
        """Rows of a matrix, as it is merged."""
        return self.cols if self.is_turned else self.rows

    @property
    def looks(self) -> int:
        """How often all rows are looked at before the merged ones follow."""
        return 2 if self.rule == "tsv" else 1

    @property
    def passes(self) -> int:
        """How often all of it is read.

        For the statistics and the largest deltas, for every look, or to hold the deltas, and for
        what is written, which the deltas are compared with. Of low rank, all that is once.
        """
        if self.form == "low_rank":
            return 1
        return 3 if self.is_turned or self.form == "dual" else 2 + self.looks

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
        if self.form != "primal":
            return 8 * self._stacked_numbers(threads)
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

    def _stacked_numbers(self, threads: int) -> int:
        """Return how many numbers the other forms than the primal hold."""
        stacked, height, width = self.num_stacked, self.height, self.width
        if self.form == "dual":
            # All deltas; and their products with one another, which threads find in strips, a
            # copy of which becomes their inverse, and what follows of the same height.
            squares = 2 * stacked**2 + height * stacked
            return stacked * width + squares + 2 * threads * STRIP_ROWS * stacked
        # Of one expert, which may have nearly all ranks, the factors and their transposes, beside
        # those of all.
        return 4 * stacked * (width + height + stacked)

    @property
    def device_bytes(self) -> int:
        """Bytes that are held at most on a device where it multiplies; 0 where it does not.

        Of each expert a square matrix, and the inverse. Of the other forms what the rows of the
        merged delta are made of, and of the dual form, before, the products of all rows with one
        another. Singular values are found on the host, and so is what has few rows.
        """
        if self.rule != "wudi":
            return 0
        if self.form == "primal":
            return 8 * (self.num_experts + 1) * self.width**2
        if self.num_stacked < MIN_DEVICE_ROWS:
            return 0
        return 8 * self.num_stacked * max(self.cols, self.num_stacked)

    @property
    def holds(self) -> str:
        """What is held, in words."""
        stacked = f"a matrix of {self.num_stacked} x {self.num_stacked} numbers"
        if self.form == "dual":
            return f"all experts' deltas, {self.num_stacked} x {self.width} numbers, and {stacked}"
        if self.form == "low_rank":
            return f"all adapters' matrices, and {stacked}"
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
                return self._products + self._solving
            case "iso_c":
                return 2 * elements * self.width
            case "tsv":
                found = 4 * elements * self.width + self.num_matrices * SVD * self.width**3
                return 6 * elements * self.width + self.num_experts * found

    @property
    def device_operations(self) -> int:
        """Those of them that a device does, if it has room for `device_bytes`."""
        return self._products if self.device_bytes else 0

    @property
    def _products(self) -> int:
        """Return those of `wudi` that are exact."""
        elements = self.num_matrices * self.rows * self.cols
        if self.form == "primal":
            return 2 * elements * self.width * (2 * self.num_experts + 1)
        # Rows are multiplied with one another once, where BLAS does it.
        gram = self.num_matrices * self.num_stacked**2 * self.width
        return 2 * elements * self.num_stacked + (gram if self.form == "dual" else 0)

    @property
    def _solving(self) -> int:
        """Return the others of `wudi`, whose order is fixed: inverses, above all."""
        if self.form == "primal":
            return self.num_matrices * self.width**3
        a_square = self.num_stacked + 2 * self.height
        if self.form == "low_rank":
            a_square += 2 * self.width
        return self.num_matrices * self.num_stacked**2 * a_square

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


def balancing(source: Balanced) -> Balancing:
    """Return how a tensor is merged as a whole.

    Parameters
    ----------
    source
        Of two axes or more, none of which is empty.
    """
    recipe = source.of.recipe
    balance = recipe.settings.balance
    assert balance is not None
    num_matrices, rows, cols = matrices(recipe.shape, is_kernel=source.is_kernel)
    num_experts = len(recipe.expert_dtypes)
    form: Form = "primal"
    num_stacked, width = (cols, rows) if source.is_turned else (rows, cols)
    num_stacked *= num_experts
    if balance.rule == "wudi":
        rank = rank_of_all(source.of, num_matrices, rows, cols)
        if num_stacked < width:
            form = "dual"
        if rank is not None and rank < min(num_stacked, width):
            form, num_stacked = "low_rank", rank
    return Balancing(
        rule=balance.rule,
        num_matrices=num_matrices,
        rows=rows,
        cols=cols,
        is_turned=source.is_turned,
        num_experts=num_experts,
        itemsize=8 if is_wide(recipe) else 4,
        form=form,
        num_stacked=num_stacked,
    )


def matrices(shape: tuple[int, ...], *, is_kernel: bool) -> tuple[int, int, int]:
    """Return how many matrices a tensor is that `can_be_balanced`, and their rows and columns.

    Parameters
    ----------
    shape
        Of four axes or more it is one of filters.
    is_kernel
        Whether of three axes, too: otherwise these are a stack.
    """
    if len(shape) == 3 and not is_kernel:
        return shape
    return 1, shape[0], num_elements(shape) // shape[0]


def has_inputs(rule: BalanceRule) -> bool:
    """Return whether a rule tells inputs of a layer from outputs; others turn what is wider."""
    return rule == "wudi"


def can_be_balanced(shape: tuple[int, ...]) -> bool:
    """Return whether a tensor of this shape is a matrix, or a stack of them."""
    return len(shape) >= 2 and num_elements(shape) > 0
