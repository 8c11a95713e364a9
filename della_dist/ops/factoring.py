"""Factors of a delta: matrices of low rank whose product is the delta, as far as a rank goes.

All in float64, of a delta that is given step by step (`della_dist.specs.factoring`). Products are
those of BLAS, whose last bits hang on the processor, on its version and on its number of threads:
whoever calls this sees to it that it has one (`della_dist.runtime.task.blas`). On machines of one
kind results are then equal to the bit.

Shapes: R rows, C columns, L columns of the basis, K rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from della_dist.ops.philox import element_uniforms, stream_key
from della_dist.specs.recipe import GUARD, TensorRecipe

F64Array = npt.NDArray[np.float64]
F32Array = npt.NDArray[np.float32]
Delta = npt.NDArray[np.floating]

#: The place of no expert: what is drawn for factors is drawn for nothing else.
_STREAM = (1 << 32) - 1


@dataclass(frozen=True, slots=True)
class Factors:
    """``left @ right``, and how much of the delta it is."""

    left_RK: F32Array
    right_KC: F32Array
    norm: float
    """Frobenius norm of the delta."""
    energy: float
    """Share of the delta's squared norm that the factors keep, 0 to 1; 1 of a delta of zeros."""


def first_basis(recipe: TensorRecipe, cols: int, columns: int) -> F64Array:
    """Return random columns to begin with: (C, L), of the tensor's own stream of random words."""
    key = stream_key(recipe.settings.seed, recipe.name, _STREAM, recipe.stage)
    basis_CL = np.empty((cols, columns))
    for i in range(columns):
        basis_CL[:, i] = element_uniforms(key, i * cols, (i + 1) * cols)
    basis_CL -= 0.5
    return basis_CL


def turned(delta_RC: Delta, basis_CL: F64Array) -> F64Array:
    """Return what rows of the delta add to the turned basis: ``delta.T @ (delta @ basis)``."""
    delta = delta_RC.astype(np.float64)
    turned_CL: F64Array = delta.T @ (delta @ basis_CL)
    return turned_CL


def orthonormal(basis_CL: F64Array) -> F64Array:
    """Return orthonormal columns that span what the given ones do."""
    # Their squares are those of the delta's: tiny ones would be lost, and large ones overflow.
    largest = np.abs(basis_CL).max(initial=0.0)
    if largest > 0:
        basis_CL = basis_CL / largest
    return np.linalg.qr(basis_CL)[0]


def seen(delta_RC: Delta, basis_CL: F64Array) -> tuple[F64Array, float]:
    """Return rows of the delta along the basis, (R, L), and the sum of their squares."""
    delta = delta_RC.astype(np.float64)
    seen_RL = delta @ basis_CL
    return seen_RL, float(np.sum(np.multiply(delta, delta, out=delta)))


def factors_along(
    seen_RL: F64Array, basis_CL: F64Array, rank: int, squares: Sequence[float]
) -> Factors:
    """Return the best factors within the span of a basis.

    Parameters
    ----------
    seen_RL
        The delta times the basis.
    basis_CL
        Orthonormal.
    rank
        K.
    squares
        Of every step (`seen`).
    """
    # Their directions: of those with singular values below 1e-8 of the largest, any will do.
    values_L, inner_LL = np.linalg.eigh(seen_RL.T @ seen_RL)
    inner_LK = np.ascontiguousarray(inner_LL[:, ::-1][:, :rank])
    kept = float(np.sum(values_L[::-1][:rank]))
    return _factors(seen_RL @ inner_LK, (basis_CL @ inner_LK).T, kept, math.fsum(squares))


def factors_of(delta_RC: F64Array, rank: int) -> Factors:
    """Return the best factors of a delta that is there whole (LAPACK's singular values)."""
    left, values, right_KC = np.linalg.svd(delta_RC, full_matrices=False)
    squares = values * values
    kept = float(np.sum(squares[:rank]))
    return _factors(left[:, :rank] * values[:rank], right_KC[:rank], kept, float(np.sum(squares)))


def _factors(left_RK: F64Array, right_KC: F64Array, kept: float, square: float) -> Factors:
    """Return factors as they are written; the two arrays are changed."""
    if square == 0:
        zeros = np.zeros(left_RK.shape, np.float32), np.zeros(right_KC.shape, np.float32)
        return Factors(*zeros, norm=0.0, energy=1.0)
    # Of either sign, the one by which the largest number of each row of `right` is positive.
    rows = np.arange(len(right_KC))
    largest = right_KC[rows, np.abs(right_KC).argmax(axis=1)]
    signs = np.where(largest < 0, -1.0, 1.0)
    left_RK *= signs
    right_KC *= signs[:, None]
    return Factors(
        np.ascontiguousarray(left_RK, np.float32),
        np.ascontiguousarray(right_KC, np.float32),
        norm=math.sqrt(square),
        energy=min(1.0, max(0.0, kept / square)),
    )


def fused_weight(weights: Sequence[float]) -> float:
    """Return what a fused delta is divided by: the sum of the weights, unless they cancel."""
    total = sum(weights)
    return total if abs(total) > GUARD * sum(map(abs, weights)) else 1.0


def joined(products: Sequence[tuple[F32Array, F32Array, float]], shape: tuple[int, int]) -> Factors:
    """Return factors of a sum of products, exactly: theirs, one behind the other.

    Parameters
    ----------
    products
        Left (R, K), right (K, C), and what their product counts, which goes into the left one,
        rounded once.
    shape
        R and C.
    """
    rows, cols = shape
    lefts = [(left * np.float64(weight)).astype(np.float32) for left, _, weight in products]
    left_RK = np.concatenate([np.zeros((rows, 0), np.float32), *lefts], axis=1)
    rights = [right for _, right, _ in products]
    right_KC = np.concatenate([np.zeros((0, cols), np.float32), *rights])
    # |L R|^2 is the sum of the products of their Gram matrices, (K, K).
    left, right = left_RK.astype(np.float64), right_KC.astype(np.float64)
    square = float(np.sum((left.T @ left) * (right @ right.T)))
    return Factors(left_RK, right_KC, math.sqrt(max(0.0, square)), 1.0)
