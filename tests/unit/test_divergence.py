"""Divergences of rows, beside the functions of numpy and the formula in longer numbers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from della_dist.ops.cpu import scoring
from della_dist.ops.divergence import bits_of, exponential, least_importance, logarithm
from della_dist.ops.energy import weights_by_energy
from della_dist.ops.reference import divergence
from della_dist.specs.passes import MIN_KEPT_COLS, gathered_bytes
from tests.tensors import assert_like_reference, backend_of, family, scored_recipe


def test_exponential_and_logarithm_are_near_exact() -> None:
    rng = np.random.default_rng(0)
    x = np.concatenate([-rng.random(20_000) * 3, -rng.random(20_000) * 690, [0.0, -1e-300]])
    assert (np.abs(exponential(x) - np.exp(x)) <= 2 * np.spacing(np.exp(x))).all()
    assert exponential(np.array([0.0, -700.1, -np.inf])).tolist() == [1, 0, 0]
    y = np.concatenate([10 ** rng.uniform(-8, 8, 20_000), 1 + rng.normal(0, 1e-6, 20_000), [1.0]])
    assert (np.abs(logarithm(y) - np.log(y)) <= 3 * np.spacing(np.abs(np.log(y)))).all()
    assert logarithm(np.ones(1)).tolist() == [0]


def test_divergence_is_its_definition() -> None:
    rng = np.random.default_rng(1)
    for spread in (1e-3, 0.1, 30.0):
        base = rng.normal(0, 1, 3000)
        expert = base + rng.normal(0, spread, 3000)
        rows = []
        for x in (expert, base):
            e = [math.exp(v - max(x)) for v in x.tolist()]
            rows.append([v / math.fsum(e) + 1e-8 for v in e])
        exact = math.fsum(p * math.log(p / q) for p, q in zip(*rows, strict=True))
        assert divergence(expert, base) == pytest.approx(exact, rel=1e-8)
    assert divergence(base, base) == 0
    shifted = divergence(base + 4.0, base)  # the same distribution, but for rounding
    assert 0 <= shifted < 1e-14


def test_what_is_not_finite_is_left_out() -> None:
    x, y = np.array([1.0, 2.0, 0.5]), np.array([0.5, 1.0, 3.0])
    gone = np.array([-np.inf])
    assert divergence(np.append(x, gone), np.append(y, gone)) == divergence(x, y)
    assert divergence(gone, gone) == 0


@pytest.mark.parametrize("wide", [False, True])
def test_bounds_of_importance(wide: bool) -> None:
    quartiles = [bits_of(q, wide=wide) for q in (1.0, 1.5, 3.0)]
    assert least_importance(quartiles, wide=wide) == bits_of(4.5, wide=wide)
    assert least_importance([0, 0, 0], wide=wide) == 0
    infinite = bits_of(float("inf"), wide=wide)
    assert least_importance([0, 0, infinite], wide=wide) == infinite
    assert least_importance([infinite] * 3, wide=wide) > infinite  # no bound: nothing reaches it


def test_weights_by_energy() -> None:
    assert weights_by_energy([1.0, 3.0]) == (0.25, 0.75)
    assert weights_by_energy([0.0, 0.0, 0.0, 0.0]) == (0.25,) * 4
    assert weights_by_energy([1e-300, 0.0]) == (1.0, 0.0)
    assert all(map(math.isnan, weights_by_energy([1e308, 1e308])))


@pytest.mark.parametrize(("cols", "num_times"), [(MIN_KEPT_COLS, 1), (MIN_KEPT_COLS - 1, 3)])
def test_divergences_are_computed_once_if_they_are_few(
    cols: int, num_times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of long rows: by the first of three passes, whatever the order of its blocks."""
    computed = []
    compute = scoring._divergences

    def counted(call: Any, scratch: Any, num_cols: int) -> Any:
        computed.append(call.span.num_elements // num_cols)
        return compute(call, scratch, num_cols)

    monkeypatch.setattr(scoring, "_divergences", counted)
    recipe = scored_recipe((400, cols), base="F32", out="F32")
    base, experts = family(recipe, 3)
    stats = assert_like_reference(
        backend_of("numba"), recipe, base, experts, block_elements=1, shuffle=5
    )
    assert 0 < stats.experts[0].num_kept < 400 * cols
    assert len(computed) > 3
    assert sum(computed) == num_times * 400
    held = gathered_bytes(recipe) - gathered_bytes(scored_recipe((400 * cols, 1)))
    assert held == (16 * 400 if num_times == 1 else 0)
