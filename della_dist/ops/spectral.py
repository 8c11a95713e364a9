"""Iso-C and TSV-Merge: matrices merged by their singular values.

Of a matrix with deltas ``D_m`` of M experts, (L, N) with L >= N (others are turned):

**Iso-C.** With ``sum_m w_m D_m = U diag(s) V'``, ``T = mean(s) U V'``: every direction that the sum
has counts the same.

**Directions that are nothing.** A sum of low rank, as of adapters, has N singular values all the
same, but those beyond its rank are what rounding left, and so are their directions. Singular values
of at most `NOTHING` of the Frobenius norm are zero here: their directions are left out, and the
mean is that of the others. So T has the nuclear norm of the sum, whatever its rank. (The authors'
code takes all N: the mean is smaller then, and most of T noise.)

**How.** Only the triangle R of ``Q R`` of all rows is decomposed, (N, N), which has the same
singular values and right vectors: ``U V' = D V diag(1/s) V'``. So rows can be looked at step by
step, and those of T follow from those of the deltas. Against `numpy.linalg.svd` of the whole, of
singular values down to 1e-6 of the largest, this errs by 1e-10 as that does itself; the shorter way
through the Gram matrix ``D' D`` by 2e-6, and below that by everything.

**The same bytes.** All is done in float64, in steps that hang on the matrix alone, with LAPACK and
BLAS, whose last bits hang on the processor and on their version; and on the number of threads,
which is one here (`della_dist.runtime.task.blas`). On machines of one kind, results are equal to
the bit.

References
----------
Marczak, Magistri, Cygert and others: No Task Left Behind: Isotropic Model Merging with Common and
Task-Specific Subspaces. 2025, arXiv 2502.04959.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor

import numpy as np

from della_dist.ops.wudi import F64Array, Floats
from della_dist.specs.balancing import PIECE_ROWS
from della_dist.specs.recipe import MergeSettings

#: Singular values that are nothing, as a part of the Frobenius norm: of deltas in float32, about
#: five times what the rounding of their numbers makes at most; of others in float64.
NOTHING = 2.0**-22
NOTHING_WIDE = 2.0**-40


class Triangle:
    """R of the QR decomposition of rows that come one after another.

    Parameters
    ----------
    num_cols
        N.
    """

    def __init__(self, num_cols: int) -> None:
        self._rows = np.empty((num_cols + max(num_cols, PIECE_ROWS), num_cols))
        self._filled = 0

    def add(self, rows_rN: Floats) -> None:
        """Add rows; where they are cut does not show."""
        while len(rows_rN):
            if self._filled == len(self._rows):
                self._reduce()
            taken = min(len(rows_rN), len(self._rows) - self._filled)
            self._rows[self._filled : self._filled + taken] = rows_rN[:taken]
            self._filled += taken
            rows_rN = rows_rN[taken:]

    def factor(self) -> F64Array:
        """Return R, (N, N), or with fewer rows if fewer were added; nothing can be added then."""
        self._reduce()
        factor_NN: F64Array = self._rows[: self._filled].copy()
        self._rows = np.empty((0, 0))
        return factor_NN

    def _reduce(self) -> None:
        factor = np.linalg.qr(self._rows[: self._filled], mode="r")
        self._rows[: len(factor)] = factor
        self._filled = len(factor)


class IsoC:
    """One matrix (`della_dist.ops.whole.Whole`).

    Parameters
    ----------
    settings
        Of its tensor.
    num_cols
        N.
    nothing
        See `NOTHING`.
    """

    def __init__(self, settings: MergeSettings, num_cols: int, nothing: float) -> None:
        self._weights, self._nothing = settings.weights, nothing
        self._triangle = Triangle(num_cols)
        self._factor_NN: F64Array | None = None

    def look(self, deltas_rN: Sequence[Floats]) -> list[Floats]:
        """Return rows of the sum."""
        return [self._sum(deltas_rN)]

    def take(self, seen: Sequence[Floats], pool: Executor) -> None:
        """Add rows to what is decomposed."""
        self._triangle.add(seen[0])

    def solve(self, pool: Executor) -> None:
        """Find the directions, and the mean of their singular values."""
        _, values, right_NN = np.linalg.svd(self._triangle.factor(), full_matrices=False)
        kept = _number_of_some(values, self._nothing)
        if kept:
            right_KN = right_NN[:kept]
            scaled_KN = right_KN * (np.mean(values[:kept]) / values[:kept])[:, None]
            self._factor_NN = scaled_KN.T @ right_KN

    def merged(self, deltas_rN: Sequence[Floats]) -> F64Array:
        """Return rows of T."""
        if self._factor_NN is None:
            return np.zeros(deltas_rN[0].shape)
        factor_NN = self._factor_NN
        return _in_pieces(self._sum(deltas_rN), lambda rows_rN: rows_rN @ factor_NN)

    def _sum(self, deltas_rN: Sequence[Floats]) -> F64Array:
        total_rN = np.zeros(deltas_rN[0].shape)
        for delta_rN, weight in zip(deltas_rN, self._weights, strict=True):
            if weight:
                total_rN += np.multiply(delta_rN, weight, dtype=np.float64)
        return total_rN


def _number_of_some(values: F64Array, nothing: float) -> int:
    """Return how many singular values, the largest first, are more than nothing."""
    if not values.any():
        return 0
    shares = values / values[0]  # squares of tiny ones would be lost
    return int(np.count_nonzero(shares > nothing * np.sqrt(np.sum(shares * shares))))


def _in_pieces(rows_rN: F64Array, function: Callable[[F64Array], F64Array]) -> F64Array:
    """Return what becomes of rows, so many at a time, so that no step shows in a product."""
    pieces = range(0, len(rows_rN), PIECE_ROWS)
    return np.concatenate([function(rows_rN[i : i + PIECE_ROWS]) for i in pieces])
