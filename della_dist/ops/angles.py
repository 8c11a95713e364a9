"""Weights that follow from the angles between the deltas: spherical interpolation and its kin.

What these methods merge is a sum of the deltas, whose factors need no more of them than the
products of all pairs. The backends measure these; here is what follows, once for all, in float64
and without a function of the C library. Where there is no base, the experts are the deltas.

M experts, P pairs of them, R rows, or 1 for a whole tensor. ``G_ij`` is the product of deltas i and
j, ``n_i`` the norm, ``cos_ij = G_ij / (n_i n_j)``, and ``w`` are the weights of the settings. The
thresholds, and what becomes of deltas that are zero or parallel, are mergekit's.
"""

from __future__ import annotations

from itertools import combinations_with_replacement
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from della_dist.ops.trigonometry import arc_cosine, sine
from della_dist.specs.passes import num_products
from della_dist.specs.recipe import MergeSettings, TensorRecipe
from della_dist.specs.rows import row_view

F64Array: TypeAlias = npt.NDArray[np.float64]

#: Cosines above this, in magnitude, are of parallel deltas: what lies between is a line. For
#: ``nuslerp`` they are what float32 does not tell from one.
_PARALLEL = {"slerp": 0.9995, "nuslerp": 1 - 2.0**-25}

#: Squared norms of sums of unit vectors that products do not tell from zero.
_NOTHING = 2.0**-48


def weights_from_products(settings: MergeSettings, products_PR: F64Array) -> F64Array:
    """Return the factors of the experts.

    Parameters
    ----------
    settings
        With ``angles``, whose rule is used, and weights.
    products_PR
        (P, R) float64: sums of products, of experts (0, 0), (0, 1), ..., (1, 1), ....

    Returns
    -------
    numpy.ndarray
        (M, R) float64; NaN where a product is infinite, or where ``multislerp`` has no direction.
    """
    angles, weights = settings.angles, settings.weights
    assert angles is not None
    pairs = combinations_with_replacement(range(len(weights)), 2)
    gram = dict(zip(pairs, products_PR, strict=True))
    with np.errstate(all="ignore"):
        norms = [np.sqrt(gram[m, m]) for m in range(len(weights))]
        match angles.rule:
            case "slerp":
                divisors = [np.where(n > 1e-8, n, 1.0) for n in norms]
                rows = _between(gram[0, 1], divisors, weights, _PARALLEL["slerp"])
            case "nuslerp":
                divisors = [np.maximum(n, 1e-7) for n in norms]
                rows = _between(gram[0, 1], divisors, weights, _PARALLEL["nuslerp"])
        factors = np.stack(rows)
        factors[:, ~np.isfinite(products_PR).all(axis=0)] = np.nan
    return factors


def row_weights_bytes(recipe: TensorRecipe, block_elements: int) -> int:
    """Return the bytes that the weights of a block's rows take while they are found."""
    angles = recipe.settings.angles
    if angles is None or not angles.by_row:
        return 0
    num_experts = len(recipe.expert_dtypes)
    # Products, norms and weights, of these two copies, and the steps of a sine.
    numbers = num_products(num_experts) + 4 * num_experts + 16
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
