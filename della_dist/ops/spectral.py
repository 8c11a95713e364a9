"""Iso-C and TSV-Merge: matrices merged by their singular values.

Of a matrix with deltas ``D_m`` of M experts, (L, N) with L >= N (others are turned):

**Iso-C.** With ``sum_m w_m D_m = U diag(s) V'``, ``T = mean(s) U V'``: every direction that the sum
has counts the same.

**TSV-Merge.** Of every ``D_m = U_m diag(s_m) V_m'`` the first ``max(1, N // M)`` triplets are kept,
for M experts of weight other than 0. All ``U_m`` beside one another are replaced by the nearest
matrix of orthonormal columns (their polar factor), and so are all ``V_m``: ``T = U diag(w s) V'``.

**Directions that are nothing.** A sum of low rank, as of adapters, has N singular values all the
same, but those beyond its rank are what rounding left, and so are their directions. Singular values
of at most `NOTHING` of the Frobenius norm are zero here: their directions are left out, and the
mean is that of the others. So T has the nuclear norm of the sum, whatever its rank. (The authors'
code takes all N: the mean is smaller then, and most of T noise.) Of a ``D_m``, too, what is nothing
is left out, and of a polar factor, where experts share directions: what is orthonormal to them is
not theirs.

**How.** Only the triangle R of ``Q R`` of all rows is decomposed, (N, N), which has the same
singular values and right vectors: ``U V' = D V diag(1/s) V'``. So rows can be looked at step by
step, and those of T follow from those of the deltas. Beside `numpy.linalg.svd` of the whole, with
singular values from 1 down to 1e-4, 1e-6 and `NOTHING`, numbers of ``U V'`` come out the same but
for 1e-12, 1e-10 and 3e-10 of the largest. Through the Gram matrix ``D' D``, which would be quicker,
it is 3e-10, 2e-6 and 1e-3: too much where float32 has 6e-8.

**The same bytes.** All is done in float64, in steps that hang on the matrix alone, with LAPACK and
BLAS, whose last bits hang on the processor and on their version; and on the number of threads,
which is one here (`della_dist.runtime.task.blas`). On machines of one kind, results are equal to
the bit.

References
----------
Marczak, Magistri, Cygert and others: No Task Left Behind: Isotropic Model Merging with Common and
Task-Specific Subspaces. 2025, arXiv 2502.04959.

Gargiulo, Crisostomi, Bucarelli and others: Task Singular Vectors: Reducing Task Interference in
Model Merging. CVPR 2025, arXiv 2412.00081.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from typing import TypeVar

import numpy as np

from della_dist.ops.grids import F64Array, Floats
from della_dist.specs.balancing import PIECE_ROWS
from della_dist.specs.recipe import MergeSettings

Given = TypeVar("Given")
Made = TypeVar("Made")

#: Singular values that are nothing, as a part of the Frobenius norm. Of deltas in float32: of
#: products of rank 1 to 200, formed as those of adapters are, rounding leaves 0.06 to 0.3 * 2**-24.
NOTHING = 2.0**-22
#: Of deltas in float64: such that what becomes of the least that counts is right to 2**-22 or so.
NOTHING_WIDE = 2.0**-30


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
        while rows_rN.size:
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


class Tsv:
    """One matrix (`della_dist.ops.whole.Whole`), looked at twice: for ``V_m``, and for U.

    Parameters
    ----------
    settings
        Of its tensor.
    num_cols
        N.
    nothing
        See `NOTHING`.
    together
        How many matrices are decomposed at once.
    """

    def __init__(
        self, settings: MergeSettings, num_cols: int, nothing: float, together: int
    ) -> None:
        self._weights, self._nothing, self._at_once = settings.weights, nothing, together
        self._experts = [m for m, weight in enumerate(settings.weights) if weight]
        self._most = max(1, num_cols // max(1, len(self._experts)))
        self._triangles = [Triangle(num_cols) for _ in self._experts]
        self._triplets: list[tuple[F64Array, F64Array]] = []  # s_m, V_m'
        self._lefts: Triangle | None = None
        self._factor_KN: F64Array | None = None

    def look(self, deltas_rN: Sequence[Floats]) -> list[Floats]:
        """Return the deltas; later rows of all ``U_m``, beside one another."""
        if self._lefts is None:
            return [deltas_rN[m] for m in self._experts]
        return [self._left(deltas_rN)]

    def take(self, seen: Sequence[Floats], pool: Executor) -> None:
        """Add rows to what is decomposed."""
        if self._lefts is None:
            self._together(
                lambda given: given[0].add(given[1]), zip(self._triangles, seen, strict=True), pool
            )
        else:
            self._lefts.add(seen[0])

    def solve(self, pool: Executor) -> None:
        """Find the triplets of every expert; later what becomes of ``U_m``."""
        if self._lefts is None:
            self._triplets = self._together(self._triplets_of, self._triangles, pool)
            self._triangles = []
            self._lefts = Triangle(self._num_triplets)
            return
        if not self._num_triplets:
            return
        counted_K = np.concatenate(
            [values * self._weights[m] for m, (values, _) in self._with_triplets()]
        )
        rights_KN = np.concatenate([right_KN for _, right_KN in self._triplets])
        both = (self._lefts.factor(), True), (rights_KN, False)
        left_KK, right_KN = self._together(lambda given: self._orthonormal(*given), both, pool)
        self._factor_KN = (left_KK * counted_K) @ right_KN

    def merged(self, deltas_rN: Sequence[Floats]) -> F64Array:
        """Return rows of T."""
        if self._factor_KN is None:
            return np.zeros(deltas_rN[0].shape)
        factor_KN = self._factor_KN
        return _in_pieces(self._left(deltas_rN), lambda rows_rK: rows_rK @ factor_KN)

    def _left(self, deltas_rN: Sequence[Floats]) -> F64Array:
        """Return rows of all ``U_m``: those of ``D_m V_m / s_m``, (r, K)."""
        num_rows, stop = len(deltas_rN[0]), 0
        left_rK = np.empty((num_rows, self._num_triplets))
        for m, (values_k, right_kN) in self._with_triplets():
            start, stop = stop, stop + len(values_k)
            for first in range(0, num_rows, PIECE_ROWS):
                rows = slice(first, first + PIECE_ROWS)
                product_rk = deltas_rN[m][rows].astype(np.float64) @ right_kN.T
                left_rK[rows, start:stop] = product_rk / values_k
        return left_rK

    @property
    def _num_triplets(self) -> int:
        return sum(len(values) for values, _ in self._triplets)

    def _with_triplets(self) -> Iterator[tuple[int, tuple[F64Array, F64Array]]]:
        return zip(self._experts, self._triplets, strict=True)

    def _triplets_of(self, triangle: Triangle) -> tuple[F64Array, F64Array]:
        _, values_N, right_NN = np.linalg.svd(triangle.factor(), full_matrices=False)
        kept = min(self._most, _number_of_some(values_N, self._nothing))
        return values_N[:kept], right_NN[:kept].copy()

    def _orthonormal(self, matrix: F64Array, is_triangle: bool) -> F64Array:
        """Return the polar factor; of a triangle what makes it of the rows that it is of."""
        left, values, right = np.linalg.svd(matrix, full_matrices=False)
        kept = _number_of_some(values, self._nothing)
        if is_triangle:
            left = right.T[:, :kept] / values[:kept]
        made: F64Array = left[:, :kept] @ right[:kept]
        return made

    def _together(
        self, function: Callable[[Given], Made], given: Iterable[Given], pool: Executor
    ) -> list[Made]:
        """Return what a function makes of each, so many at once as there is room for."""
        waiting, made = list(given), list[Made]()
        for start in range(0, len(waiting), self._at_once):
            made += pool.map(function, waiting[start : start + self._at_once])
        return made


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
