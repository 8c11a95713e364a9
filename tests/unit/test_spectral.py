"""Merging by singular values: against plain ones in float64, the same bytes however it is cut."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import pytest
from threadpoolctl import threadpool_limits

from della_dist.ops.exact_products import HostProducts
from della_dist.ops.whole import whole
from della_dist.specs.balancing import PIECE_ROWS, balancing
from della_dist.specs.recipe import Balance, BalanceRule, MergeSettings, TensorRecipe
from della_dist.specs.sources import Balanced, Merged

F64Array = npt.NDArray[np.float64]
Deltas = Sequence[npt.NDArray[np.floating]]

SHAPES = [(1, 1), (7, 1), (7, 3), (64, 64), (200, 96), (300, 40), (1000, 5)]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with threadpool_limits(1, "blas"):
        yield


def deltas(rows: int, cols: int, num_experts: int, rank: int = 0) -> list[npt.NDArray[np.float32]]:
    """Return deltas as training leaves them: a few directions, and noise; or of a rank alone."""
    random = np.random.default_rng([rows, cols, num_experts])
    directions = rank or min(8, rows, cols)
    noise = 0 if rank else 0.25
    return [
        (
            random.standard_normal((rows, directions)) @ random.standard_normal((directions, cols))
            + random.standard_normal((rows, cols)) * noise
        ).astype(np.float32)
        * np.float32(1e-3)
        for _ in range(num_experts)
    ]


def solve(
    rule: BalanceRule,
    given: Deltas,
    weights: Sequence[float],
    step: int = 1 << 20,
    together: int = 1,
) -> F64Array:
    settings = MergeSettings(weights=tuple(weights), balance=Balance(rule), elect=False)
    kind = "F64" if given[0].dtype == np.float64 else "BF16"
    recipe = TensorRecipe("w", given[0].shape, kind, (kind,) * len(given), "F32", settings)
    how = balancing(Balanced(Merged(recipe, None, ()), is_turned=False))
    largest = [float(np.abs(one).max(initial=0.0)) for one in given]
    made = whole(how, settings, largest, together, HostProducts())
    steps = [slice(start, start + step) for start in range(0, len(given[0]), step)]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(how.looks):
            for seen in pool.map(lambda s: made.look([one[s] for one in given]), steps):
                made.take(seen, pool)
            made.solve(pool)
        return np.concatenate([*pool.map(lambda s: made.merged([d[s] for d in given]), steps)])


def iso_c(given: Deltas, weights: Sequence[float]) -> F64Array:
    """As it is defined, by the singular values of the whole."""
    total = sum(w * one.astype(np.float64) for w, one in zip(weights, given, strict=True))
    left, values, right = np.linalg.svd(np.asarray(total), full_matrices=False)
    kept = values > 2.0**-22 * np.linalg.norm(values)
    if not kept.any():
        return np.zeros(given[0].shape)
    return np.asarray(np.mean(values[kept]) * left[:, kept] @ right[kept])


def tsv(given: Deltas, weights: Sequence[float]) -> F64Array:
    """As it is defined, by the singular values of every expert's delta."""
    pairs = [(w, one.astype(np.float64)) for w, one in zip(weights, given, strict=True) if w]
    lefts, counted, rights = [], [], []
    for weight, one in pairs:
        left, values, right = np.linalg.svd(one, full_matrices=False)
        most = max(1, len(values) // len(pairs))
        kept = min(most, int(np.sum(values > 2.0**-22 * np.linalg.norm(values))))
        lefts.append(left[:, :kept])
        counted.append(weight * values[:kept])
        rights.append(right[:kept])
    if not pairs or not np.concatenate(counted).size:
        return np.zeros(given[0].shape)
    made = polar(np.hstack(lefts)) * np.concatenate(counted) @ polar(np.vstack(rights))
    return np.asarray(made)


def polar(matrix: F64Array) -> F64Array:
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    kept = values > 2.0**-22 * np.linalg.norm(values)
    return np.asarray(left[:, kept] @ right[kept])


PLAINLY = {"iso_c": iso_c, "tsv": tsv}
RULES: list[BalanceRule] = ["iso_c", "tsv"]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
@pytest.mark.parametrize("weights", [(1.0,), (1.0, 1.0, 1.0), (0.5, -2.0, 0.0)])
def test_against_float64(
    rule: BalanceRule, rows: int, cols: int, weights: tuple[float, ...]
) -> None:
    given = deltas(rows, cols, len(weights))
    made, expected = solve(rule, given, weights), PLAINLY[rule](given, weights)
    assert np.linalg.norm(expected) > 0
    assert np.linalg.norm(made - expected) <= 1e-9 * np.linalg.norm(expected)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("cols", [33, 130])
def test_the_same_bytes_however_it_is_cut(rule: BalanceRule, cols: int) -> None:
    given = deltas(500, cols, 3)
    weights = (1.0, 0.3, 1.7)
    whole = solve(rule, given, weights)
    for step in (PIECE_ROWS, 3 * PIECE_ROWS, 320):
        assert solve(rule, given, weights, step).tobytes() == whole.tobytes()


def test_every_direction_counts_the_same() -> None:
    given = deltas(90, 40, 2)
    made = np.linalg.svd(solve("iso_c", given, (1.0, 1.0)), compute_uv=False)
    total = np.linalg.svd(np.sum(given, axis=0, dtype=np.float64), compute_uv=False)
    assert np.allclose(made, np.mean(total), rtol=1e-9)


def test_directions_that_are_nothing_are_left_out() -> None:
    """Of two adapters of rank 5, ten directions: with the nuclear norm of their sum."""
    given = deltas(150, 60, 2, rank=5)
    made = np.linalg.svd(solve("iso_c", given, (1.0, 1.0)), compute_uv=False)
    total = np.linalg.svd(np.sum(given, axis=0, dtype=np.float64), compute_uv=False)
    assert total[10] > 0  # what is left of rounding
    assert np.allclose(made[:10], np.mean(total[:10]), rtol=1e-6)
    assert made[10:].max() <= 1e-6 * made[0]
    assert np.isclose(made.sum(), total.sum(), rtol=1e-5)


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6])
def test_small_singular_values(condition: float) -> None:
    """Directions that hardly count are found as exactly as numpy finds them."""
    random = np.random.default_rng(3)
    left = np.linalg.qr(random.standard_normal((240, 80)))[0]
    right = np.linalg.qr(random.standard_normal((80, 80)))[0]
    values = np.geomspace(1.0, 1 / condition, 80)
    made = solve("iso_c", [(left * values) @ right], (1.0,))
    expected = np.mean(values) * left @ right
    assert np.abs(made - expected).max() <= 1e-15 * condition * np.abs(expected).max() + 1e-13


@pytest.mark.parametrize("rule", RULES)
def test_experts_that_change_nothing(rule: BalanceRule) -> None:
    one, other = deltas(20, 10, 2)
    zero = np.zeros_like(one)
    assert not solve(rule, [zero, zero], (1.0, 1.0)).any()
    assert not solve(rule, [one, other], (0.0, 0.0)).any()
    assert not solve("iso_c", [one, -one], (1.0, 1.0)).any()
    with_zero, alone = solve("iso_c", [zero, one], (1.0, 1.0)), solve("iso_c", [one], (1.0,))
    assert np.array_equal(with_zero, alone)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("exponent", [-1000, -125, 100, 900])
def test_any_scale(rule: BalanceRule, exponent: int) -> None:
    given = [one.astype(np.float64) for one in deltas(30, 20, 2)]
    made = solve(rule, given, (1.0, 1.0))
    scaled = solve(rule, [np.ldexp(one, exponent) for one in given], (1.0, 1.0))
    assert np.allclose(np.ldexp(scaled, -exponent), made, rtol=1e-9, atol=1e-12)


def test_one_expert_is_itself() -> None:
    """All of its triplets are kept, and they are orthonormal already."""
    (delta,) = deltas(90, 40, 1)
    assert np.allclose(solve("tsv", [delta], (0.5,)), 0.5 * delta, rtol=0, atol=1e-12)


def test_experts_that_are_one() -> None:
    """Their shared directions are theirs alone: the largest half of what each of them says."""
    (delta,) = deltas(90, 40, 1)
    left, values, right = np.linalg.svd(delta.astype(np.float64), full_matrices=False)
    half = left[:, :20] * values[:20] @ right[:20]
    made = solve("tsv", [delta, delta], (1.0, 1.0))
    assert np.linalg.norm(made - half) <= 1e-9 * np.linalg.norm(half)


def test_experts_that_share_nothing_are_added() -> None:
    """Adapters in other rows and columns: nothing of any is lost."""
    given = [np.zeros((90, 40)), np.zeros((90, 40))]
    given[0][:50, :20] = deltas(50, 20, 1, rank=6)[0]
    given[1][50:, 20:] = deltas(40, 20, 1, rank=9)[0]
    made = solve("tsv", given, (1.0, -0.5))
    assert np.allclose(made, given[0] - 0.5 * given[1], rtol=0, atol=1e-6 * np.abs(given[0]).max())


@pytest.mark.parametrize(("cols", "num_experts"), [(10, 3), (3, 3), (2, 3), (1, 5)])
def test_triplets_that_are_kept(cols: int, num_experts: int) -> None:
    """N // M of each, and one where there are more experts than columns."""
    given = deltas(30, cols, num_experts)
    made = solve("tsv", given, (1.0,) * num_experts)
    kept = max(1, cols // num_experts) * num_experts
    assert np.linalg.matrix_rank(made, tol=1e-9) == min(cols, kept)


@pytest.mark.parametrize("together", [1, 2, 3])
def test_how_many_are_decomposed_at_once_does_not_show(together: int) -> None:
    given = deltas(200, 60, 3)
    made = solve("tsv", given, (1.0, 0.5, 0.25), together=together)
    assert made.tobytes() == solve("tsv", given, (1.0, 0.5, 0.25)).tobytes()
