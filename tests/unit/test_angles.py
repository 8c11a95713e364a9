"""Weights that follow from products, beside the same formulas written down for whole vectors."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, combinations_with_replacement
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pytest

from della_dist.errors import TensorDataError
from della_dist.ops.angles import weights_from_products
from della_dist.specs.recipe import AngleRule, TensorRecipe
from tests.tensors import RULES, angles_recipe

Vector: TypeAlias = npt.NDArray[np.float64]
RNG = np.random.default_rng(5)


def recipe_with(rule: AngleRule, weights: Sequence[float], **angles: Any) -> TensorRecipe:
    experts = ("F64",) * len(weights)
    return angles_recipe((500,), rule, experts=experts, weights=weights, **angles)


def factors_of(recipe: TensorRecipe, vectors: Sequence[Vector]) -> list[float]:
    """Return the factors that the products of the vectors give."""
    products = np.array([[a @ b] for a, b in combinations_with_replacement(vectors, 2)])
    factors = weights_from_products(recipe, products)
    assert factors.shape == (len(vectors), 1)
    return [float(f) for f in factors[:, 0]]


def merged(recipe: TensorRecipe, vectors: Sequence[Vector]) -> Vector:
    """Return the sum of the vectors times their factors."""
    factors = factors_of(recipe, vectors)
    return sum((f * v for f, v in zip(factors, vectors, strict=True)), np.zeros(1))


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
    out = merged(recipe_with(rule, (1 - t, t)), [a, b])
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
        assert (factors_of(recipe_with(rule, (0.7, 0.3)), [a, b]) == [0.7, 0.3]) == is_line


@pytest.mark.parametrize("rule", ["slerp", "nuslerp"])
def test_zero_counts_as_perpendicular(rule: AngleRule) -> None:
    """As in mergekit: a vector without a direction."""
    a = vectors(1)[0]
    for pair in ([a, 0 * a], [0 * a, a]):
        out = merged(recipe_with(rule, (0.75, 0.25)), pair)
        part = 0.75 if pair[0].any() else 0.25
        assert out == pytest.approx(np.sin(part * np.pi / 2) * a, rel=1e-12)


def test_products_that_no_float_holds_give_nothing_finite() -> None:
    for rule, _ in RULES:
        for products in ([[np.inf], [1.0], [1.0]], [[1.0], [np.nan], [1.0]]):
            factors = weights_from_products(recipe_with(rule, (0.5, 0.5)), np.array(products))
            assert np.isnan(factors).all()


def test_rows_are_independent() -> None:
    for rule in ("nuslerp", "model_stock"):
        recipe = recipe_with(rule, (0.6, 0.4))
        products = RNG.uniform(0.5, 1, (3, 7))
        together = weights_from_products(recipe, products)
        alone = [weights_from_products(recipe, products[:, r : r + 1]) for r in range(7)]
        assert np.array_equal(together, np.concatenate(alone, axis=1))


# ---------------------------------------------------------------- multislerp


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.2, 0.3, 0.5), (1.0, 2.0, -0.5, 0.25)])
@pytest.mark.parametrize("eps", [1e-8, 0.1])
def test_multislerp_is_its_definition(weights: tuple[float, ...], eps: float) -> None:
    """Whole vectors: the weighted directions, seen from their mean, and back onto the sphere."""
    given = vectors(len(weights), spread=2)
    norms = [np.linalg.norm(v) for v in given]
    directions = [v / (n + eps) for v, n in zip(given, norms, strict=True)]
    mean = unit(sum((w * u for w, u in zip(weights, directions, strict=True)), np.zeros(500)))
    seen = np.zeros(500)
    for w, u in zip(weights, directions, strict=True):
        seen += w * (u - (u @ mean) * mean)
    way = np.linalg.norm(seen) + eps
    length = sum(w * n for w, n in zip(weights, norms, strict=True))
    exact = length * (mean * np.cos(way) + seen * np.sin(way) / way)
    out = merged(recipe_with("multislerp", weights, eps=eps), given)
    assert out == pytest.approx(exact, rel=1e-9, abs=1e-12)


def test_multislerp_of_two_equal_weights_is_slerp() -> None:
    given = [unit(v) for v in vectors(2)]
    half = merged(recipe_with("slerp", (0.5, 0.5)), given)
    assert merged(recipe_with("multislerp", (0.5, 0.5)), given) == pytest.approx(half, rel=1e-7)


def test_multislerp_without_a_direction() -> None:
    a, b = vectors(2)
    assert factors_of(recipe_with("multislerp", (0.5, 0.5)), [a, -a]) == [0.5, 0.5]
    assert factors_of(recipe_with("multislerp", (0.3, 0.4, 0.3)), [0 * a] * 3) == [0.3, 0.4, 0.3]
    assert merged(recipe_with("multislerp", (1.0,)), [a]) == pytest.approx(a, rel=1e-7)
    opposite = [unit(a), unit(b), -unit(unit(a) + unit(b))]
    weights = (1.0, 1.0, float(np.linalg.norm(unit(a) + unit(b))))
    with pytest.raises(TensorDataError, match=r"up_proj.*directions of the experts cancel"):
        factors_of(recipe_with("multislerp", weights), opposite)


# ---------------------------------------------------------------- karcher


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_karcher_mean_is_where_all_ways_add_up_to_zero(count: int) -> None:
    given = vectors(count, spread=1.5)
    out = merged(recipe_with("karcher", (1.0,) * count, max_iter=500, tol=1e-7), given)
    norms = [np.linalg.norm(v) for v in given]
    assert np.linalg.norm(out) == pytest.approx(np.mean(norms), rel=1e-9)
    mean, ways = unit(out), np.zeros(500)
    for direction in map(unit, given):
        across = direction - (direction @ mean) * mean
        if count > 1:
            ways += angle(direction, mean) * unit(across)
    assert np.linalg.norm(ways) < 1e-6


def test_karcher_of_two_is_slerp() -> None:
    given = [unit(v) for v in vectors(2)]
    half = merged(recipe_with("slerp", (0.5, 0.5)), given)
    assert merged(recipe_with("karcher", (1.0, 1.0)), given) == pytest.approx(half, rel=1e-9)


def test_karcher_takes_max_iter_steps() -> None:
    given = [unit(v) for v in vectors(4, spread=3)]
    few, many, all_steps = (
        merged(recipe_with("karcher", (1.0,) * 4, max_iter=steps, tol=1e-12), given)
        for steps in (1, 2, 100)
    )
    apart = [angle(one, all_steps) for one in (few, many)]
    assert apart[0] > 3 * apart[1] > 0
    stopped = merged(recipe_with("karcher", (1.0,) * 4, max_iter=100, tol=apart[0] / 2), given)
    assert np.linalg.norm(stopped - few) > 0
    assert 0 < angle(stopped, all_steps) < apart[0]


def test_karcher_of_vectors_without_a_mean() -> None:
    """Opposite ones: the first; without any direction: zero; zeros shorten the others."""
    a, _ = vectors(2)
    assert merged(recipe_with("karcher", (1.0, 1.0)), [a, -a]) == pytest.approx(a, rel=1e-12)
    assert factors_of(recipe_with("karcher", (1.0, 1.0)), [0 * a, 1e-9 * a]) == [0, 0]
    half = merged(recipe_with("karcher", (1.0, 1.0)), [0 * a, a])
    assert half == pytest.approx(a / 2, rel=1e-12)


# ---------------------------------------------------------------- model_stock


@pytest.mark.parametrize("count", [2, 3, 5])
def test_model_stock_draws_the_mean_to_the_base(count: int) -> None:
    given = vectors(count, spread=2)
    cosines = [np.cos(angle(a, b)) for a, b in combinations(given, 2)]
    cos = np.mean(cosines)
    exact = count * cos / (1 + (count - 1) * cos)
    factors = factors_of(recipe_with("model_stock", (1.0,) * count), given)
    assert factors == pytest.approx([exact / count] * count, rel=1e-12)


def test_model_stock_of_nothing_in_common_is_the_base() -> None:
    a, b = vectors(2)
    across = b - (a @ b) / (a @ a) * a
    assert factors_of(recipe_with("model_stock", (1.0, 1.0)), [a, across]) == pytest.approx(
        [0, 0], abs=1e-12
    )
    for given in ([a, -a], [a, 0 * a], [0 * a, 0 * a]):
        assert factors_of(recipe_with("model_stock", (1.0, 1.0)), given) == [0, 0]


@pytest.mark.parametrize("scale", [1e-6, 1e-30, 1e30])
def test_model_stock_is_the_same_at_any_scale(scale: float) -> None:
    (a,) = vectors(1)
    factors = factors_of(recipe_with("model_stock", (1.0, 1.0)), [scale * a] * 2)
    assert factors == pytest.approx([0.5] * 2, rel=1e-12)
