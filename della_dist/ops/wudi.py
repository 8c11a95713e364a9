"""WUDI-Merging in closed form, the same bytes wherever it is computed.

Of a matrix with deltas ``D_m`` of M experts, (R, C), the merged delta T minimises ``sum_m w_m
||(T - D_m) D_m'||^2 / ||D_m||^2``, with a ridge::

    G_m = D_m' D_m / ||D_m||^2            (C, C): which inputs expert m uses
    A   = sum_m w_m G_m + ridge * mean(diag(sum_m w_m G_m)) * I
    T   = (sum_m w_m D_m G_m) A^-1

**Exact products.** Sums of products of integers below 2**53 are exact in float64, whatever library
adds them up, in whatever order. Every factor is therefore rounded to a grid: to multiples of a
power of two, so that its largest magnitude has a number of bits (`Bits`; ties to even). Deltas have
one grid a matrix, of 18 bits (fewer where there are more than 2**19 rows), and so have ``G_m`` and
``A^-1``; of ``Y = sum_m w_m D_m G_m`` every row has its own. A sum that is zero is 0, never -0.
What is not a product of matrices is rounded element by element in a stated order: sums over experts
in theirs, the trace from the first element to the last. The inverse is that of
`della_dist.ops.cpu.inverse`, on every device; products are computed where
`della_dist.ops.exact_products` has them.

**Deltas of few directions**, as of models that adapters were merged into: ``A^-1`` is large where
no delta is, by which the rounding of ``Y`` and ``A^-1`` would be multiplied. Where
``|A|_F^2 / tr(A) * max(diag(A^-1))`` exceeds `MOST_AMPLIFIED`, ``W_m = G_m A^-1`` is computed in
float64, every sum in one order (`della_dist.ops.cpu.products`), and rounded to a grid of as many
bits as that of ``G_m``; and ``T = sum_m w_m D_m W_m``.

This is the primal form. Where fewer rows or ranks than columns say all, the same T follows from
less: `della_dist.ops.wudi_dual` and `della_dist.ops.wudi_low_rank`.

Shapes: M experts, R rows (outputs), C columns (inputs), r rows of a step.

References
----------
Cheng, Xiong, Wei and others: Whoever Started the Interference Should End It: Guiding Data-Free
Model Merging via Task Vectors. 2025, arXiv 2503.08099 (gradient descent, without weights).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace

import numpy as np

from della_dist.ops.exact_products import Held, HostProducts, PerThread, Products
from della_dist.ops.grids import (
    EXACT_BITS,
    F64Array,
    Floats,
    exponent_of,
    on_grid,
    ordered_sum,
    round_to,
    rows_on_grids,
    scale_to,
    sum_bits,
    unit_of,
)
from della_dist.specs.balancing import Balancing
from della_dist.specs.recipe import MergeSettings

#: Bits of a delta on its grid at most, the sign included: sums of 2**19 products are exact.
DELTA_BITS = 18

#: By how much rounding may be multiplied. Deltas of full rank have up to 10; at 32 it makes 1e-4 or
#: so of the merged delta.
MOST_AMPLIFIED = 32.0


def delta_bits(length: int) -> int:
    """Return how many bits deltas have, the sign included, whose sums of products are so long."""
    return min(DELTA_BITS, (EXACT_BITS - sum_bits(length)) // 2 + 1)


@dataclass(frozen=True, slots=True)
class Bits:
    """Bits of the other factors on their grids, the sign included: as many as sums over C leave."""

    gram: int
    product: int
    inverse: int


def bits_of(num_cols: int) -> Bits:
    """Return how many bits the factors of a matrix with so many columns have."""
    left = EXACT_BITS - sum_bits(num_cols)
    return Bits(left - (DELTA_BITS - 1) + 1, left // 2 + 1, left - left // 2 + 1)


@dataclass(frozen=True, slots=True)
class Solution:
    """What the merged delta is made of: ``T = (sum_m scales[m] * q_m @ factors_CC[m]) A^-1``."""

    scales: tuple[float, ...]
    """(M,): what the products on the grids are multiplied by; 0 where an expert adds nothing."""
    factors_CC: tuple[Held | None, ...]
    """(M,) on their grids: ``G_m``, or ``W_m``."""
    inverse_CC: Held | None
    """``A^-1`` on its grid; None where the ``W_m`` have it."""
    inverse_exponent: int
    """By which power of two it is to be multiplied."""


def solution(
    grams_CC: Sequence[F64Array],
    units: Sequence[int],
    weights: Sequence[float],
    ridge: float,
    pool: Executor | None = None,
) -> Solution | None:
    """Return what T is made of; None where it is zero.

    Parameters
    ----------
    grams_CC
        The sums over all rows of ``q' q``, of the deltas' integers on their grids. Overwritten.
    units
        Of these grids, as powers of two.
    weights
        At least 0.
    ridge
        Above 0.
    pool
        Threads for the inverse.
    """
    from della_dist.ops.cpu.inverse import inverse
    from della_dist.ops.cpu.products import product

    num_cols = len(grams_CC[0])
    bits = bits_of(num_cols)
    total_CC = np.zeros((num_cols, num_cols))
    counts = []
    for gram_CC, weight in zip(grams_CC, weights, strict=True):
        trace = ordered_sum(np.diagonal(gram_CC))
        counts.append(trace != 0 and weight != 0)
        if counts[-1]:
            np.divide(gram_CC, trace, out=gram_CC)
            total_CC += weight * gram_CC
    if not any(counts):
        return None
    diagonal = np.einsum("ii->i", total_CC)
    trace = ordered_sum(diagonal)
    diagonal += ridge * (trace / num_cols)
    signal = _sum_of_squares(total_CC) / trace
    inverse_CC = inverse(total_CC, pool)
    largest = float(np.diagonal(inverse_CC).max())
    is_amplified = signal * largest > MOST_AMPLIFIED
    scales: list[float] = []
    factors: list[F64Array | None] = []
    for m, (unit, weight) in enumerate(zip(units, weights, strict=True)):
        if not counts[m]:
            scales.append(0.0)
            factors.append(None)
            continue
        factor_CC = product(grams_CC[m], inverse_CC, pool) if is_amplified else grams_CC[m]
        top = exponent_of(max(float(factor_CC.max()), -float(factor_CC.min())))
        round_to(grams_CC[m], factor_CC, np.asarray(bits.gram - 1 - top))
        scales.append(math.ldexp(weight, unit + top - bits.gram + 1))
        factors.append(grams_CC[m])
    if is_amplified:
        return Solution(tuple(scales), tuple(factors), None, 0)
    top = exponent_of(largest)
    round_to(inverse_CC, inverse_CC, np.asarray(bits.inverse - 1 - top))
    return Solution(tuple(scales), tuple(factors), inverse_CC, top - bits.inverse + 1)


def _sum_of_squares(matrix_CC: F64Array) -> float:
    """Return the squared norm: of each column from the first row to the last, then of all."""
    total_C = np.zeros(len(matrix_CC))
    for row_C in matrix_CC:
        total_C += row_C * row_C
    return ordered_sum(total_C)


def merged(
    solution: Solution,
    deltas_rC: Sequence[Floats],
    units: Sequence[int],
    scratch: F64Array | None = None,
    products: Products | None = None,
) -> F64Array:
    """Return rows of T.

    Parameters
    ----------
    solution
        Of the whole matrix.
    deltas_rC
        (M, r, C): the same rows of every expert's delta.
    units
        Of the deltas' grids.
    scratch
        (3, r, C) float64, or more rows, of which the result is a part; None: a new array.
    products
        Where the matrices of the solution are held; None: on the host.
    """
    multiply = (products or HostProducts()).multiply
    num_rows, num_cols = deltas_rC[0].shape
    if scratch is None:
        scratch = np.empty((3, num_rows, num_cols))
    product_rC: F64Array
    product_rC, part_rC, grid_rC = scratch[:, :num_rows]
    product_rC[:] = 0.0
    for m, factor_CC in enumerate(solution.factors_CC):
        if factor_CC is not None:
            round_to(grid_rC, deltas_rC[m], np.asarray(-units[m]))
            multiply(grid_rC, factor_CC, part_rC)
            part_rC *= solution.scales[m]
            product_rC += part_rC
    if solution.inverse_CC is None:
        return product_rC
    # Each row has a grid of its own, so that no other row need be known.
    shift_r = rows_on_grids(product_rC, bits_of(num_cols).product, grid_rC, part_rC)
    multiply(grid_rC, solution.inverse_CC, part_rC)
    return scale_to(part_rC, part_rC, solution.inverse_exponent - shift_r)


class Wudi:
    """One matrix (`della_dist.ops.whole.Whole`).

    Parameters
    ----------
    settings
        Of its tensor.
    how
        How it is merged: by its primal form.
    largest
        Magnitudes that the experts' deltas have at most.
    products
        Where integers are multiplied.
    """

    def __init__(
        self,
        settings: MergeSettings,
        how: Balancing,
        largest: Sequence[float],
        products: Products,
    ) -> None:
        assert settings.balance is not None
        self._weights, self._ridge = settings.weights, settings.balance.ridge
        self._units = [unit_of(one, delta_bits(how.height)) for one in largest]
        self._products = products
        self._grams = [products.zeros(how.width) for _ in largest]
        self._scratch = PerThread()
        self._solution: Solution | None = None

    def look(self, deltas_rC: Sequence[Floats]) -> list[Floats]:
        """Add what rows say: exactly, and so in any order."""
        for m, delta_rC in enumerate(deltas_rC):
            self._products.add_square(self._grams[m], on_grid(delta_rC, self._units[m]))
        return []

    def take(self, seen: Sequence[Floats], pool: Executor) -> None:
        """Do nothing: it was added."""

    def solve(self, pool: Executor) -> None:
        """Find what every row of T is made of: on the host."""
        grams, self._grams = [self._products.fetch(gram) for gram in self._grams], []
        found = solution(grams, self._units, self._weights, self._ridge, pool)
        if found is not None:
            hold = self._products.hold
            held = tuple(None if one is None else hold(one) for one in found.factors_CC)
            inverse_CC = None if found.inverse_CC is None else hold(found.inverse_CC)
            found = replace(found, factors_CC=held, inverse_CC=inverse_CC)
        self._solution = found

    def merged(self, deltas_rC: Sequence[Floats]) -> F64Array:
        """Return rows of T; those of the next call of the same thread overwrite them."""
        if self._solution is None:
            return np.zeros(deltas_rC[0].shape)
        scratch = self._scratch.array((3, *deltas_rC[0].shape))
        return merged(self._solution, deltas_rC, self._units, scratch, self._products)
