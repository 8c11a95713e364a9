"""WUDI-Merging of adapters: deltas that are products of low rank, none of which is formed.

With ``D_m = B_m A_m``, (R, k_m) and (k_m, C), and the triangle U_m of ``B_m = Q_m U_m``, the rows
of ``S_m = U_m A_m`` stand for those of the delta in the dual form (`della_dist.ops.wudi_dual`),
since ``D_m = Q_m S_m`` with orthonormal columns of Q_m::

    n_m = ||S_m||^2,   s_m = sqrt(w_m / n_m),   K = S S' + mu I   of all rows s_m S_m       (K, K)
    T = F S,   F = [s_1 B_1 (A_1 S_1'), ..., s_M B_M (A_M S_M')] K^-1

Q_m is not needed, and the matrices are as wide as all ranks together. It is taken where that is
less than C and than the rows of the dual form.

**The same bytes.** The factors are taken as they are stored, times the scaling of their adapter,
which B has; those of several adapters of one expert lie beside one another. All is in float64:
the triangle is that of `della_dist.ops.cpu.triangle`, products those of
`della_dist.ops.cpu.products`. Each row of S is then rounded to a grid of its own, each row of F,
times the powers of two of these, too, and T is the exact product of both.

A delta whose norm is at most 2**-22 of the sum of the norms of what its ranks add, which cancel
then, is nothing: rounding leaves as much where it is formed in float32. Since no delta is formed,
and so none rounded to float32 or to a grid, the bytes are not those of the same adapters merged
into models, though the numbers are, within the grids.

Shapes: M experts, R rows (outputs), C columns (inputs), k ranks of an expert, K of all together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np

from della_dist.ops.exact_products import Products
from della_dist.ops.forming import F32Array
from della_dist.ops.grids import (
    EXACT_BITS,
    F64Array,
    ordered_sum,
    rows_on_grids,
    scale_to,
    sum_bits,
)
from della_dist.ops.wudi_dual import Counts, Product, left_factor, on_grids
from della_dist.specs.balancing import Balancing
from della_dist.specs.recipe import MergeSettings

#: Norms that are nothing, as a part of what they are the sums of.
NOTHING = 2.0**-22


@dataclass(frozen=True, slots=True)
class Term:
    """What one adapter adds to rows of a matrix as it is stored: ``scaling * left @ right``."""

    first: int
    left_rk: F32Array
    right_kC: F32Array
    scaling: float


def low_rank_product(
    experts: Sequence[Sequence[Term]],
    settings: MergeSettings,
    how: Balancing,
    pool: Executor,
    products: Products,
) -> Product | None:
    """Return the merged delta of a matrix; None where it is zero.

    Parameters
    ----------
    experts
        (M,): what the adapters of each add. Finite.
    settings
        Of the tensor.
    how
        How it is merged.
    pool
        Threads to compute on; the result is the same.
    products
        Where integers are multiplied: for the rows of the merged delta.
    """
    from della_dist.ops.cpu.products import product

    assert settings.balance is not None
    sizes = [sum(len(term.right_kC) for term in terms) for terms in experts]
    if not any(sizes):
        return None
    rights_KC = np.empty((sum(sizes), how.width))
    lefts_KR = np.empty((sum(sizes), how.height))
    places = [slice(sum(sizes[:m]), sum(sizes[: m + 1])) for m in range(len(sizes))]
    bounds = [
        _stack(_factors(terms, how), rights_KC[own], lefts_KR[own], pool)
        for terms, own in zip(experts, places, strict=True)
    ]
    turned_CK = np.ascontiguousarray(rights_KC.T)
    gram_KK = product(turned_CK, turned_CK, pool)
    del turned_CK
    squares = []
    for own, bound in zip(places, bounds, strict=True):
        square = ordered_sum(np.diagonal(gram_KK)[own])
        squares.append(square if math.sqrt(square) > NOTHING * bound else 0.0)
    counts = Counts(settings.weights, squares, sizes)
    ridge = counts.ridge(settings.balance.ridge, how.width)
    if ridge == 0:
        return None
    left_RK = left_factor(gram_KK, lefts_KR, counts.scales_N(), ridge, pool)
    bits = (EXACT_BITS - sum_bits(len(rights_KC))) // 2 + 1
    shift_K = rows_on_grids(rights_KC, bits, rights_KC, np.empty(rights_KC.shape))
    scale_to(left_RK, left_RK, -shift_K.T)
    return on_grids(left_RK, rights_KC, bits, products, is_turned=how.is_turned)


def _factors(terms: Sequence[Term], how: Balancing) -> tuple[F64Array, F64Array]:
    """Return the factors of the delta of an expert, as it is merged: (R, k) and (k, C)."""
    rank = sum(len(term.right_kC) for term in terms)
    left = np.zeros((how.rows, rank))
    right = np.empty((rank, how.cols))
    start = 0
    for term in terms:
        ranks = slice(start, start := start + len(term.right_kC))
        left[term.first : term.first + len(term.left_rk), ranks] = term.left_rk
        left[:, ranks] *= term.scaling
        right[ranks] = term.right_kC
    if how.is_turned:
        return np.ascontiguousarray(right.T), np.ascontiguousarray(left.T)
    return left, right


def _stack(
    factors: tuple[F64Array, F64Array], rows_kC: F64Array, lefts_kR: F64Array, pool: Executor
) -> float:
    """Write what one expert adds to the stack; return the sum of the norms of its ranks.

    Parameters
    ----------
    factors
        B and A.
    rows_kC
        Where S goes.
    lefts_kR
        Where ``B (A S')``, transposed, goes.
    """
    from della_dist.ops.cpu.products import product
    from della_dist.ops.cpu.triangle import triangle

    left_Rk, right_kC = factors
    left_kR, right_Ck = (one.T.copy("C") for one in factors)  # which are overwritten
    factor_kk = triangle(left_Rk)
    rows_kC[:] = product(np.ascontiguousarray(factor_kk.T), right_kC, pool)
    inner_kk = product(right_Ck, np.ascontiguousarray(rows_kC.T), pool)
    lefts_kR[:] = product(inner_kk, left_kR, pool)
    norms_k = _norms(factor_kk) * _norms(right_Ck)
    return ordered_sum(norms_k)


def _norms(matrix_nk: F64Array) -> F64Array:
    """Return the norms of the columns; overwrites these."""
    from della_dist.ops.cpu.products import product

    matrix_nk *= matrix_nk
    norms_k: F64Array = np.sqrt(product(matrix_nk, np.ones((len(matrix_nk), 1)))[:, 0])
    return norms_k
