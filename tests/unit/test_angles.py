"""Weights that follow from products, beside the same formulas written down for whole vectors."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations_with_replacement
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pytest

from della_dist.ops.angles import weights_from_products
from della_dist.specs.recipe import AngleRule, Angles, MergeSettings

Vector: TypeAlias = npt.NDArray[np.float64]
RNG = np.random.default_rng(5)


def settings_of(rule: AngleRule, weights: Sequence[float], **angles: float) -> MergeSettings:
    return MergeSettings(
        weights=tuple(weights),
        drop="none",
        elect=False,
        rescale="none",
        normalize=False,
        angles=Angles(rule=rule, **angles),  # type: ignore[arg-type]
    )


def merged(settings: MergeSettings, vectors: Sequence[Vector]) -> Vector:
    """Return the sum of the vectors times the factors that their products give."""
    products = np.array([[a @ b] for a, b in combinations_with_replacement(vectors, 2)])
    factors = weights_from_products(settings, products)
    assert factors.shape == (len(vectors), 1)
    return sum((f * v for f, v in zip(factors[:, 0], vectors, strict=True)), np.zeros(1))


def unit(vector: Vector) -> Vector:
    length: float = np.linalg.norm(vector).item()
    return vector / length


def angle(a: Vector, b: Vector) -> float:
    difference, total = (np.linalg.norm(unit(a) + sign * unit(b)) for sign in (-1, 1))
    return float(2 * np.arctan2(difference, total))


def vectors(count: int, *, spread: float = 1.0, seed: int = 5) -> list[Vector]:
    """Vectors of several lengths around one direction."""
    rng = np.random.default_rng(seed)
    start = rng.normal(0, 1, 500)
    return [(start + spread * rng.normal(0, 1, 500)) * (0.5 + m) for m in range(count)]


# ---------------------------------------------------------------- slerp


@pytest.mark.parametrize("t", [0.0, 0.2, 0.5, 1.0, 1.5, -0.3])
@pytest.mark.parametrize("rule", ["slerp", "nuslerp"])
@pytest.mark.parametrize("spread", [0.1, 1.0, 9.0])
def test_slerp_is_the_arc(rule: AngleRule, t: float, spread: float) -> None:
    """Of unit vectors, the output has length one, and lies t of the angle away from the first."""
    a, b = map(unit, vectors(2, spread=spread))
    out = merged(settings_of(rule, (1 - t, t)), [a, b])
    assert np.linalg.norm(out) == pytest.approx(1, rel=1e-12)
    assert angle(a, out) == pytest.approx(abs(t) * angle(a, b), rel=1e-9, abs=1e-12)
    if 0 <= t <= 1:
        assert angle(out, b) == pytest.approx((1 - t) * angle(a, b), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("rule", "apart"), [("slerp", 0.03), ("nuslerp", 2e-4)])
@pytest.mark.parametrize("sign", [1, -1])
def test_parallel_vectors_are_joined_by_a_line(rule: AngleRule, apart: float, sign: int) -> None:
    a, c = map(unit, vectors(2, spread=3))
    across = unit(c - (a @ c) * a)
    for angle_between, is_line in ((apart, True), (1.3 * apart, False), (0.0, True)):
        b = sign * 2 * (np.cos(angle_between) * a + np.sin(angle_between) * across)
        factors = weights_from_products(
            settings_of(rule, (0.7, 0.3)), np.array([[a @ a], [a @ b], [b @ b]])
        )
        assert (factors[:, 0].tolist() == [0.7, 0.3]) == is_line


@pytest.mark.parametrize("rule", ["slerp", "nuslerp"])
def test_zero_counts_as_perpendicular(rule: AngleRule) -> None:
    """As in mergekit: a vector without a direction."""
    a = vectors(1)[0]
    for pair in ([a, 0 * a], [0 * a, a]):
        out = merged(settings_of(rule, (0.75, 0.25)), pair)
        part = 0.75 if pair[0].any() else 0.25
        assert out == pytest.approx(np.sin(part * np.pi / 2) * a, rel=1e-12)


def test_products_that_no_float_holds_give_nothing_finite() -> None:
    for products in ([[np.inf], [1.0], [1.0]], [[1.0], [np.nan], [1.0]]):
        factors = weights_from_products(settings_of("slerp", (0.5, 0.5)), np.array(products))
        assert np.isnan(factors).all()


def test_rows_are_independent() -> None:
    settings = settings_of("nuslerp", (0.6, 0.4))
    products = RNG.uniform(0.5, 1, (3, 7))
    together = weights_from_products(settings, products)
    alone = [weights_from_products(settings, products[:, r : r + 1]) for r in range(7)]
    assert np.array_equal(together, np.concatenate(alone, axis=1))
