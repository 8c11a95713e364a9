"""The dual form of `della_dist.ops.wudi`: where the experts' deltas have fewer rows than columns.

With ``n_m = ||D_m||^2``, ``s_m = sqrt(w_m / n_m)``, the ridge ``mu = ridge * (sum of the w_m) / C``
and S, (N, C), the rows of all ``s_m D_m``, one expert's below those of another, N = M R::

    A = S' S + mu I,   so   S A^-1 = K^-1 S   with   K = S S' + mu I                  (N, N)
    T = (sum_m w_m / n_m D_m D_m' D_m) A^-1 = F S,   F = [s_1 D_1 D_1', ..., s_M D_M D_M'] K^-1

and nothing is (C, C). It is taken where N < C, by the shapes alone.

**The same bytes.** Deltas are rounded to one grid an expert, of 18 bits (fewer where there are more
than 2**19 columns): integers ``q_m``, the delta is ``2**g_m q_m``. Their products ``q_m q_l'`` are
exact, and so are the ``n_m`` but for the sum along the diagonal, in its order. What follows is in
float64: every element of ``K``, by ``q_m q_l'``, times the ``s`` of its row, times that of its
column, is rounded by itself; the inverse is that of `della_dist.ops.cpu.inverse`, and the product
with it that of `della_dist.ops.cpu.products`, which add up in one order on every machine. Each row
of ``F`` is then rounded to a grid of its own, of as many bits as exact sums over N leave beside
those of ``q``; and ``T`` is the exact product. An expert without deltas, or of weight 0, has an
``s`` of 0 and no part in ``mu``.

Shapes: M experts, R rows (outputs), C columns (inputs), N stacked rows, r rows of a step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from della_dist.ops.grids import (
    EXACT_BITS,
    F64Array,
    Floats,
    exact_product,
    exponent_of,
    on_grid,
    ordered_sum,
    rows_on_grids,
    scale_to,
    sum_bits,
)
from della_dist.ops.wudi import DELTA_BITS
from della_dist.specs.balancing import STRIP_ROWS, Balancing
from della_dist.specs.recipe import MergeSettings


@dataclass(frozen=True, slots=True)
class Product:
    """A merged delta as the product of two matrices of integers."""

    left_RN: F64Array
    exponents_R: npt.NDArray[np.integer[Any]]
    """(R, 1): by which power of two each row is to be multiplied."""
    right_NC: F64Array
    is_turned: bool
    """Whether what is stored is the transpose of it."""

    def rows(self, start: int, stop: int) -> F64Array:
        """Return rows of the merged delta as it is stored."""
        rows = slice(start, stop)
        if self.is_turned:
            turned = exact_product(self.right_NC[:, rows].T, self.left_RN.T)
            return scale_to(turned, turned, self.exponents_R.T)
        made = exact_product(self.left_RN[rows], self.right_NC)
        return scale_to(made, made, self.exponents_R[rows])


class WudiDual:
    """One matrix.

    Parameters
    ----------
    settings
        Of its tensor.
    how
        How it is merged: by its dual form.
    largest
        Magnitudes that the experts' deltas have at most.
    """

    def __init__(self, settings: MergeSettings, how: Balancing, largest: Sequence[float]) -> None:
        assert settings.balance is not None
        self._weights, self._ridge = settings.weights, settings.balance.ridge
        self._how = how
        self._exponents = [exponent_of(one) for one in largest]
        self._bits = delta_bits(how.width)
        self._stack_NC = np.empty((how.num_stacked, how.width))
        self._deltas = self._stack_NC.reshape(how.num_experts, how.height, how.width)

    def hold(self, first: int, deltas: Sequence[Floats]) -> None:
        """Keep rows of every expert's delta, as they are stored; called by several threads.

        Parameters
        ----------
        first
            The first of them, of the matrix.
        """
        for into, delta, exponent in zip(self._deltas, deltas, self._exponents, strict=True):
            rows = slice(first, first + len(delta))
            grid = on_grid(delta, exponent, self._bits)
            if self._how.is_turned:
                into[:, rows] = grid.T
            else:
                into[rows] = grid

    def solve(self, pool: Executor) -> Product | None:
        """Return the merged delta, once all rows are held; None where it is zero."""
        num_rows, stack_NC = self._how.height, self._stack_NC
        gram_NN = self._gram(pool)
        lefts_NR = np.empty((len(gram_NN), num_rows))
        squares = []
        for m, exponent in enumerate(self._exponents):
            own = slice(m * num_rows, (m + 1) * num_rows)
            squares.append(ordered_sum(np.diagonal(gram_NN)[own]))
            grid = math.ldexp(1.0, exponent - self._bits + 1)
            np.multiply(gram_NN[own, own], grid, out=lefts_NR[own])
        counts = Counts(self._weights, squares, [num_rows] * len(squares))
        ridge = counts.ridge(self._ridge, self._how.width)
        if ridge == 0:
            return None
        left_RN = left_factor(gram_NN, lefts_NR, counts.scales_N(), ridge, pool)
        return on_grids(left_RN, stack_NC, self._bits, is_turned=self._how.is_turned)

    def _gram(self, pool: Executor) -> F64Array:
        """Return the products of all rows with one another, (N, N)."""
        from della_dist.ops.cpu.products import done, strips

        stack_NC = self._stack_NC
        gram_NN = np.empty((len(stack_NC), len(stack_NC)))

        def multiply(rows: slice) -> None:
            part = exact_product(stack_NC[rows], stack_NC[rows.start :].T)
            gram_NN[rows, rows.start :] = part
            gram_NN[rows.start :, rows] = part.T

        done(pool.map(multiply, strips(0, len(stack_NC), STRIP_ROWS)))
        return gram_NN


@dataclass(frozen=True, slots=True)
class Counts:
    """What each expert counts; one without deltas, or of weight 0, counts nothing."""

    weights: Sequence[float]
    squares: Sequence[float]
    """(M,): the squared norms of the deltas."""
    sizes: Sequence[int]
    """(M,): how many of the stacked rows are of each."""

    def scales_N(self) -> F64Array:
        """Return what every stacked row is multiplied by: ``sqrt(w_m / n_m)``."""
        scales = [
            math.sqrt(weight / square) if square else 0.0
            for weight, square in zip(self.weights, self.squares, strict=True)
        ]
        return np.repeat(scales, self.sizes)

    def ridge(self, ridge: float, num_cols: int) -> float:
        """Return what is added to the diagonal: a part of the mean diagonal of the (C, C) form."""
        pairs = zip(self.weights, self.squares, strict=True)
        return ridge * (ordered_sum(np.array([w for w, square in pairs if square])) / num_cols)


def delta_bits(num_cols: int) -> int:
    """Return how many bits the numbers of stacked rows have, the sign included."""
    return min(DELTA_BITS, (EXACT_BITS - sum_bits(num_cols)) // 2 + 1)


def left_factor(
    gram_NN: F64Array, lefts_NR: F64Array, scales_N: F64Array, ridge: float, pool: Executor
) -> F64Array:
    """Return F: what the stacked rows, before they are scaled, are to be multiplied by.

    Parameters
    ----------
    gram_NN
        The products of the stacked rows with one another. Overwritten.
    lefts_NR
        Of each expert its delta times the transpose of its stacked rows, transposed. Overwritten.
    scales_N
        What every stacked row is multiplied by.
    ridge
        Above 0.
    pool
        Threads to compute on; the result is the same.

    Returns
    -------
    array
        (R, N).
    """
    from della_dist.ops.cpu.inverse import inverse
    from della_dist.ops.cpu.products import product

    gram_NN *= scales_N[:, None]
    gram_NN *= scales_N
    np.einsum("ii->i", gram_NN)[:] += ridge
    lefts_NR *= scales_N[:, None]
    left_RN = product(lefts_NR, inverse(gram_NN, pool), pool)
    left_RN *= scales_N
    return left_RN


def on_grids(left_RN: F64Array, right_NC: F64Array, bits: int, *, is_turned: bool) -> Product:
    """Return a product of matrices, whose left one is rounded to a grid a row.

    Parameters
    ----------
    left_RN
        Overwritten.
    right_NC
        Integers.
    bits
        Of these, the sign included.
    is_turned
        See `Product`.
    """
    left = EXACT_BITS - sum_bits(len(right_NC)) - (bits - 1) + 1
    shift_R = rows_on_grids(left_RN, left, left_RN, np.empty(left_RN.shape))
    return Product(left_RN, -shift_R, right_NC, is_turned)
