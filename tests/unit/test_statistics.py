"""What the random choices promise on average. Seeds are fixed: a failure is never bad luck."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pytest

from della_dist.ops.blocks import Backend
from della_dist.specs.recipe import TensorRecipe
from tests.tensors import BACKENDS, backend_of, recipe_of, stream

Values: TypeAlias = npt.NDArray[np.floating[Any]]

#: With no base, one expert of weight 1 and this, the output is the pruned delta itself.
PRUNED: dict[str, Any] = {"base": None, "elect": False, "normalize": False}


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    return backend_of(request.param)


def prune(backend: Backend, recipe: TensorRecipe, delta: Values) -> Values:
    """Return the pruned delta of a recipe made with `PRUNED`."""
    raw = delta.astype("<f4").reshape(-1).view(np.uint8)
    out, _ = stream(backend, recipe, None, [raw])
    pruned: Values = out.view("<f4").reshape(delta.shape).astype(np.float64)
    return pruned


def shuffled_rows(rows: int, cols: int, seed: int) -> Values:
    """The magnitudes 1 to `cols` in every row, in an order and with signs of its own."""
    rng = np.random.default_rng(seed)
    delta_RC = np.tile(np.arange(1.0, cols + 1), (rows, 1))
    sign_RC: Values = rng.choice([-1.0, 1.0], (rows, cols))
    shuffled_RC: Values = sign_RC * rng.permuted(delta_RC, axis=1)
    return shuffled_RC


def chi_square(num_kept: Values, rows: int, p: Values) -> float:
    """Distance of binomial counts from their means, in squared standard deviations."""
    return float(np.sum((num_kept - rows * p) ** 2 / (rows * p * (1 - p))))


def test_keep_rate_of_every_rank(backend: Backend) -> None:
    rows, cols, density, epsilon = 4096, 256, 0.45, 0.2
    delta_RC = shuffled_rows(rows, cols, seed=1)
    recipe = recipe_of((rows, cols), density=density, epsilon=epsilon, **PRUNED)
    kept_RC = prune(backend, recipe, delta_RC) != 0
    rank_RC = np.abs(delta_RC).astype(np.int64) - 1
    num_kept = np.bincount(rank_RC[kept_RC], minlength=cols).astype(np.float64)

    def p(half_width: float, d: float = density) -> Values:
        return d - half_width + 2 * half_width * np.arange(cols) / (cols - 1)

    # 256 degrees of freedom: 256 +- 22.6; four standard deviations each way.
    assert 165 < chi_square(num_kept, rows, p(epsilon)) < 347
    # The bound is sharp: near misses of the formula are far outside.
    for wrong in (p(0.18), p(0.22), p(-epsilon), p(epsilon, 0.46), p(0.0)):
        assert chi_square(num_kept, rows, wrong) > 500


def test_tied_magnitudes_share_one_rate(backend: Backend) -> None:
    """Half of every row is zero, a quarter 1, a quarter 2; position must not matter."""
    rows, cols = 2048, 256
    magnitude_RC = np.tile(np.repeat([1e-3, 1e-3, 1.0, 2.0], cols // 4), (rows, 1))
    recipe = recipe_of((rows, cols), density=0.5, epsilon=0.3, **PRUNED)
    kept_RC = prune(backend, recipe, magnitude_RC) != 0
    for first, last in ((0, 127), (128, 191), (192, 255)):
        p = 0.2 + 0.6 * ((first + last) / 2) / (cols - 1)
        num_kept = kept_RC[:, first : last + 1].sum(axis=0).astype(np.float64)
        width = last - first + 1
        spread = 4.5 * np.sqrt(2 * width)
        assert abs(chi_square(num_kept, rows, np.full(width, p)) - width) < spread


@pytest.mark.parametrize("changes", [{"epsilon": 0.2}, {"drop": "random"}], ids=str)
def test_unbiased_in_every_decile_of_magnitude(backend: Backend, changes: dict[str, Any]) -> None:
    rng = np.random.default_rng(2)
    rows, cols = 4096, 1024
    delta_RC = rng.normal(0, 1, (rows, cols)).astype(np.float32).astype(np.float64)
    recipe = recipe_of((rows, cols), density=0.5, **changes, **PRUNED)
    pruned_RC = prune(backend, recipe, delta_RC)
    decile_RC = np.searchsorted(
        np.quantile(np.abs(delta_RC), np.linspace(0.1, 0.9, 9)), np.abs(delta_RC)
    )
    sign_RC = np.sign(delta_RC)
    for decile in range(10):
        inside = decile_RC == decile
        ratio = (pruned_RC * sign_RC)[inside].sum() / np.abs(delta_RC[inside]).sum()
        assert abs(ratio - 1) < 0.01, (decile, ratio)
        # Unscaled survivors are far from it, or the test would show nothing.
        survivors = np.abs(delta_RC[inside & (pruned_RC != 0)]).sum()
        assert survivors / np.abs(delta_RC[inside]).sum() < 0.75


@pytest.mark.parametrize("density", [0.05, 0.3, 0.5, 0.9])
def test_dare_keep_rate(backend: Backend, density: float) -> None:
    n = 1_000_000
    recipe = recipe_of((n,), drop="random", density=density, **PRUNED)
    pruned = prune(backend, recipe, np.ones(n))
    spread = 4 * np.sqrt(density * (1 - density) / n)
    assert abs((pruned != 0).mean() - density) < spread
    assert np.unique(pruned).tolist() == [0, float(np.float32(1) / np.float32(density))]
    # Also within every residue: no word of the four of a counter is odd.
    for residue in range(4):
        rate = (pruned[residue::4] != 0).mean()
        assert abs(rate - density) < 2 * spread


def correlation(a: npt.NDArray[np.bool_], b: npt.NDArray[np.bool_]) -> float:
    return float(np.corrcoef(a.reshape(-1), b.reshape(-1))[0, 1])


def test_streams_are_independent(backend: Backend) -> None:
    """Between tensors, seeds, experts, stages, and neighbours within a tensor."""
    n = 1 << 20
    bound = 4.5 / np.sqrt(n)

    def kept(**changes: Any) -> npt.NDArray[np.bool_]:
        recipe = recipe_of((n,), drop="random", density=0.5, **{**PRUNED, **changes})
        mask: npt.NDArray[np.bool_] = prune(backend, recipe, np.ones(n)) != 0
        return mask

    # Two experts in one output: 1 of the first, 16 of the second.
    recipe = recipe_of(
        (n,), experts=("F32",) * 2, drop="random", density=0.5, rescale="none", **PRUNED
    )
    raw = [np.full(n, v, "<f4").view(np.uint8) for v in (1, 16)]
    both = stream(backend, recipe, None, raw)[0].view("<f4").astype(np.int64)
    first, second = both % 16 == 1, both >= 16
    assert np.array_equal(first, kept())
    assert abs(correlation(first, second)) < bound

    others = [
        second,
        kept(name="model.layers.1.mlp.up_proj.weight"),
        kept(name="x"),
        kept(seed=43),
        kept(stage=1),
        kept(stage=2),
    ]
    for i, a in enumerate(others):
        for b in (first, *others[:i]):
            assert abs(correlation(a, b)) < bound
    for lag in (1, 2, 3, 4, 8, 4096, 65_536):
        assert abs(correlation(first[lag:], first[:-lag])) < bound
    assert correlation(first, kept(lambda_=0.5)) == 1


def test_ties_trimming_keeps_what_reaches_the_kth_largest(backend: Backend) -> None:
    rng = np.random.default_rng(3)
    for distinct in (True, False):
        delta = rng.permutation(np.arange(1.0, 200_001)) * rng.choice([-1, 1], 200_000)
        if not distinct:
            delta = np.round(delta / 5000)
        for density in (0.001, 0.2, 0.7):
            recipe = recipe_of((200, 1000), drop="magnitude", density=density, **PRUNED)
            kept = prune(backend, recipe, delta) == delta
            k = int(density * delta.size)
            threshold = -np.partition(-np.abs(delta), k - 1)[k - 1]
            assert np.array_equal(kept & (delta != 0), (np.abs(delta) >= threshold) & (delta != 0))
            assert (kept.sum() == k) == distinct
