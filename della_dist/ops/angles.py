"""Weights that follow from the angles between the deltas: spherical interpolation and its kin.

What these methods merge is a sum of the deltas, whose factors need no more of them than the
products of all pairs. The backends measure these; here is what follows, once for all, in float64
and without a function of the C library. Where there is no base, the experts are the deltas.

M experts, P pairs of them, R rows, or 1 for a whole tensor. ``G_ij`` is the product of deltas i and
j, ``n_i`` the norm, ``cos_ij = G_ij / (n_i n_j)``, and ``w`` are the weights of the settings. The
thresholds, and what becomes of deltas that are zero or parallel, are mergekit's.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, combinations_with_replacement
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from della_dist.errors import TensorDataError
from della_dist.ops.trigonometry import arc_cosine, cosine, sine
from della_dist.specs.passes import num_products
from della_dist.specs.recipe import Angles, TensorRecipe
from della_dist.specs.rows import row_view

F64Array: TypeAlias = npt.NDArray[np.float64]

#: Cosines above this, in magnitude, are of parallel deltas: what lies between is a line. For
#: ``nuslerp`` they are what float32 does not tell from one.
_PARALLEL = {"slerp": 0.9995, "nuslerp": 1 - 2.0**-25}

#: The norm of a sum of unit vectors that products do not tell from zero.
_NOTHING = 2.0**-24


def weights_from_products(recipe: TensorRecipe, products_PR: F64Array) -> F64Array:
    """Return the factors of the experts.

    Parameters
    ----------
    recipe
        Whose settings have ``angles`` with the rule, and weights.
    products_PR
        (P, R) float64: sums of products, of experts (0, 0), (0, 1), ..., (1, 1), ....

    Returns
    -------
    numpy.ndarray
        (M, R) float64; NaN where a product is infinite.

    Raises
    ------
    TensorDataError
        If ``multislerp`` has no direction: the weighted directions of the deltas cancel.
    """
    settings = recipe.settings
    angles, weights = settings.angles, settings.weights
    assert angles is not None
    gram = _Gram(len(weights), products_PR)
    with np.errstate(all="ignore"):
        match angles.rule:
            case "slerp":
                divisors = [np.where(n > 1e-8, n, 1.0) for n in gram.norms]
                rows = _between(gram.product(0, 1), divisors, weights, _PARALLEL["slerp"])
            case "nuslerp":
                divisors = [np.maximum(n, 1e-7) for n in gram.norms]
                rows = _between(gram.product(0, 1), divisors, weights, _PARALLEL["nuslerp"])
            case "multislerp":
                rows = _multislerp(gram, weights, angles.eps, recipe.name)
            case "karcher":
                rows = _karcher(gram, angles)
            case "model_stock":
                rows = _model_stock(gram)
        factors: F64Array = np.stack(rows)
        factors[:, ~np.isfinite(products_PR).all(axis=0)] = np.nan
    return factors


class _Gram:
    """The products of all pairs: of each, (R,) float64."""

    def __init__(self, num_experts: int, products_PR: F64Array) -> None:
        self.num_experts = num_experts
        pairs = combinations_with_replacement(range(num_experts), 2)
        self._products = dict(zip(pairs, products_PR, strict=True))
        self.norms = [np.sqrt(self._products[m, m]) for m in range(num_experts)]

    def product(self, i: int, j: int) -> F64Array:
        """Return the product of two deltas."""
        product: F64Array = self._products[min(i, j), max(i, j)]
        return product

    def norm(self, factors: Sequence[F64Array]) -> F64Array:
        """Return the norm of the sum of the deltas times `factors`."""
        square = np.zeros_like(self.norms[0])
        for i in range(self.num_experts):
            inner = np.zeros_like(square)
            for j in range(self.num_experts):
                inner = inner + factors[j] * self.product(i, j)
            square = square + factors[i] * inner
        norm: F64Array = np.sqrt(np.maximum(square, 0.0))
        return norm


def row_weights_bytes(recipe: TensorRecipe, block_elements: int) -> int:
    """Return the bytes that the weights of a block's rows take while they are found."""
    angles = recipe.settings.angles
    if angles is None or not angles.by_row:
        return 0
    num_experts = len(recipe.expert_dtypes)
    # Products, norms and weights, of these two copies, and the steps of sines and of an angle.
    numbers = num_products(num_experts) + 4 * num_experts + 24
    return 8 * numbers * (block_elements // max(1, row_view(recipe).num_cols) + 1)


def _between(
    product: F64Array, norms: list[F64Array], weights: tuple[float, ...], parallel: float
) -> list[F64Array]:
    """Return the factors of a point of the arc between two deltas: ``sin(w_m angle) / sin(angle)``.

    Both weights are the parts of the way, ``1 - t`` and ``t``.
    """
    cos = np.clip(product / (norms[0] * norms[1]), -1.0, 1.0)
    is_line = np.abs(cos) > parallel
    angle = arc_cosine(np.where(is_line, 0.0, cos))
    whole = sine(angle)
    return [np.where(is_line, w, sine(w * angle) / whole) for w in weights]


def _multislerp(gram: _Gram, weights: tuple[float, ...], eps: float, name: str) -> list[F64Array]:
    """Return the factors of the mean direction, as long as the deltas are on average.

    The method adds up, in the plane that touches the sphere at the mean direction, the weighted
    directions as they are seen from there. That sum is zero at the weighted mean, wherever the
    directions are: only the cosine of `eps` is left of the way back to the sphere.
    """
    mean = [w / (n + eps) for w, n in zip(weights, gram.norms, strict=True)]
    total, length = 0.0, np.zeros_like(gram.norms[0])
    for w, n in zip(weights, gram.norms, strict=True):
        total += abs(w)
        length = length + w * n
    norm = gram.norm(mean)
    is_zero = norm < max(eps, _NOTHING * total)
    nothing = np.max(gram.norms, axis=0) == 0.0
    if gram.num_experts > 2 and (is_zero & ~nothing).any():
        raise TensorDataError(
            f"tensor {name!r}: the weighted directions of the experts cancel, and leave multislerp "
            "no direction. Use other weights, or another method."
        )
    scale = cosine(eps) * length / norm
    return [np.where(is_zero, w, m * scale) for w, m in zip(weights, mean, strict=True)]


def _karcher(gram: _Gram, angles: Angles) -> list[F64Array]:
    """Return the factors of the mean on the sphere (Karcher), as long as the deltas on average.

    The mean starts at that of the directions, and goes, step by step, to where the ways to all
    directions add up to zero. Directions within ``tol`` of it, or of the opposite point, from which
    no way leads anywhere, count for nothing in a step, and deltas of norm ``tol`` in none.
    """
    zero, tol = np.zeros(1), angles.tol
    norms = [float(norm[0]) for norm in gram.norms]
    directed = [m for m, norm in enumerate(norms) if norm > tol]
    if not directed:
        return [zero for _ in norms]
    part = 1.0 / len(directed)
    # Factors of the deltas, as those of the mean are: of directions, divided by their norm.
    unit = [np.array([1.0 / n]) if m in directed else zero for m, n in enumerate(norms)]
    mean = [part * u for u in unit]
    norm = gram.norm(mean)
    first = directed[0]
    mean = (
        [u if m == first else zero for m, u in enumerate(unit)]
        if norm < tol
        else [f / norm for f in mean]
    )
    for _ in range(angles.max_iter):
        step = [zero for _ in norms]
        for i in directed:
            dot = zero
            for j in directed:
                dot = dot + mean[j] * gram.product(i, j)
            dot = np.clip(dot * unit[i], -1.0, 1.0)
            angle = arc_cosine(dot)
            if angle < tol or np.pi - angle < tol:
                continue
            way = part * (angle / sine(angle))
            step = [s - way * dot * f for s, f in zip(step, mean, strict=True)]
            step[i] = step[i] + way * unit[i]
        norm = gram.norm(step)
        if norm < tol:
            break
        turned, along = cosine(norm), sine(norm) / norm
        mean = [turned * f + along * s for f, s in zip(mean, step, strict=True)]
        norm = gram.norm(mean)
        if norm > tol:
            mean = [f / norm for f in mean]
    length = zero
    for norm in gram.norms:
        length = length + norm / len(norms)
    return [length * f for f in mean]


def _model_stock(gram: _Gram) -> list[F64Array]:
    """Return the factors of deltas whose mean is drawn to the base (Model Stock, section 4).

    The ratio is ``N cos / (1 + (N - 1) cos)``, with the mean cosine of all pairs of N deltas.
    """
    count, total = gram.num_experts, np.zeros_like(gram.norms[0])
    for i, j in combinations(range(count), 2):
        norms = gram.norms[i] * gram.norms[j]
        nothing = norms == 0
        cosine = gram.product(i, j) / np.where(nothing, 1.0, norms)
        total = total + np.where(nothing, 0.0, np.clip(cosine, -1.0, 1.0))
    cos = total / (count * (count - 1) // 2)
    below = 1.0 + (count - 1) * cos
    is_base = np.abs(below) < 1e-6
    ratio = np.where(is_base, 0.0, count * cos / np.where(is_base, 1.0, below))
    return [ratio / count] * count
