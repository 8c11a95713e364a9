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
those of ``q``; and ``T`` is the exact product, where what is zero is 0, never -0. An expert without
deltas, or of weight 0, has an ``s`` of 0 and no part in ``mu``. Exact products are computed where
`della_dist.ops.exact_products` has them.

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

from della_dist.ops.exact_products import Held, Products
from della_dist.ops.grids import (
    EXACT_BITS,
    F64Array,
    Floats,
    on_grid,
    ordered_sum,
    rows_on_grids,
    scale_to,
    sum_bits,
    unit_of,
)
from della_dist.ops.wudi import delta_bits
from della_dist.specs.balancing import Balancing
from della_dist.specs.recipe import MergeSettings


@dataclass(frozen=True, slots=True)
class Product:
    """A merged delta, as it is stored, as the product of two matrices of integers.

    Of r x c numbers: those of T, or of its transpose.
    """

    left_rN: F64Array
    right: Held
    """(N, c), where `products` has it."""
    num_cols: int
    exponents_R: npt.NDArray[np.integer[Any]]
    """(R, 1): by which power of two each row of T is to be multiplied."""
    is_turned: bool
    """Whether what is stored is the transpose of T."""
    products: Products

    def rows(self, start: int, stop: int) -> F64Array:
        """Return rows of the merged delta as it is stored."""
        made = np.empty((stop - start, self.num_cols))
        self.products.multiply(self.left_rN[start:stop], self.right, made)
        exponents = self.exponents_R.T if self.is_turned else self.exponents_R[start:stop]
        return scale_to(made, made, exponents)


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
        self._how, self._products = how, products
        self._bits = delta_bits(how.width)
        self._units = [unit_of(one, self._bits) for one in largest]
        self._stack_NC = np.empty((how.num_stacked, how.width))
        self._deltas = self._stack_NC.reshape(how.num_experts, how.height, how.width)

    def hold(self, first: int, deltas: Sequence[Floats]) -> None:
        """Keep rows of every expert's delta, as they are stored; called by several threads.

        Parameters
        ----------
        first
            The first of them, of the matrix.
        """
        for into, delta, unit in zip(self._deltas, deltas, self._units, strict=True):
            rows = slice(first, first + len(delta))
            grid = on_grid(delta, unit)
            if self._how.is_turned:
                into[:, rows] = grid.T
            else:
                into[rows] = grid

    def solve(self, pool: Executor) -> Product | None:
        """Return the merged delta, once all rows are held; None where it is zero."""
        num_rows, stack_NC = self._how.height, self._stack_NC
        gram_NN = self._products.gram(stack_NC, pool)
        lefts_NR = np.empty((len(gram_NN), num_rows))
        squares = []
        for m, unit in enumerate(self._units):
            own = slice(m * num_rows, (m + 1) * num_rows)
            squares.append(ordered_sum(np.diagonal(gram_NN)[own]))
            np.multiply(gram_NN[own, own], math.ldexp(1.0, unit), out=lefts_NR[own])
        counts = Counts(self._weights, squares, [num_rows] * len(squares))
        ridge = counts.ridge(self._ridge, self._how.width)
        if ridge == 0:
            return None
        left_RN = left_factor(gram_NN, lefts_NR, counts.scales_N(), ridge, pool)
        how = self._how
        return on_grids(left_RN, stack_NC, self._bits, self._products, is_turned=how.is_turned)


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


def on_grids(
    left_RN: F64Array, right_NC: F64Array, bits: int, products: Products, *, is_turned: bool
) -> Product:
    """Return a product of matrices, whose left one is rounded to a grid a row.

    Parameters
    ----------
    left_RN
        Overwritten.
    right_NC
        Integers.
    bits
        Of these, the sign included.
    products
        Where they are multiplied.
    is_turned
        Whether what is stored is the transpose.
    """
    left = EXACT_BITS - sum_bits(len(right_NC)) - (bits - 1) + 1
    shift_R = rows_on_grids(left_RN, left, left_RN, np.empty(left_RN.shape))
    left_rN, right_Nc = (right_NC.T, left_RN.T) if is_turned else (left_RN, right_NC)
    held, num_cols = products.hold(right_Nc), right_Nc.shape[1]
    return Product(left_rN, held, num_cols, -shift_R, is_turned, products)
