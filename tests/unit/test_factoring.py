"""Factors of a delta, against numpy's singular values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from threadpoolctl import threadpool_limits

from della_dist.ops.factoring import (
    Factors,
    factors_along,
    factors_of,
    first_basis,
    fused_weight,
    joined,
    orthonormal,
    seen,
    turned,
)
from della_dist.ops.philox import element_uniforms, stream_key
from della_dist.report.text import format_share
from della_dist.specs.factoring import SMALL_ELEMENTS, STEP_ROWS, TURNS, factoring
from della_dist.specs.recipe import MergeSettings, TensorRecipe, of_deltas

F32Array = npt.NDArray[np.float32]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Multiply as the program does."""
    with threadpool_limits(1, "blas"):
        yield


def recipe(shape: tuple[int, ...], **settings: Any) -> TensorRecipe:
    how = MergeSettings(weights=(1.0,), drop="none", **settings)
    return TensorRecipe("layers.0.up_proj.weight", shape, "BF16", ("BF16",), "BF16", how)


def spectrum(rows: int, cols: int, values: npt.NDArray[np.float64]) -> F32Array:
    """Return a matrix with these singular values."""
    rng = np.random.default_rng(3)
    left, right = (np.linalg.qr(rng.normal(size=(n, values.size)))[0] for n in (rows, cols))
    found: F32Array = ((left * values) @ right.T).astype(np.float32)
    return found


def along(delta_RC: F32Array, rank: int, step_rows: int | None = None) -> Factors:
    """Return what the passes of `della_dist.runtime.task.factors` make of a delta."""
    of = recipe(delta_RC.shape)
    how = factoring(of, rank)
    rows = how.step_elements // how.cols if step_rows is None else step_rows
    parts = [delta_RC[i : i + rows] for i in range(0, how.rows, rows)]
    basis_CL = first_basis(of, how.cols, how.columns)
    for _ in range(TURNS):
        total_CL = np.zeros_like(basis_CL)
        for part in parts:
            total_CL += turned(part, basis_CL)
        basis_CL = orthonormal(total_CL)
    read = [seen(part, basis_CL) for part in parts]
    seen_RL = np.concatenate([rows for rows, _ in read])
    return factors_along(seen_RL, basis_CL, how.rank, [square for _, square in read])


SPECTRA: dict[str, Callable[[int], Any]] = {
    "power": lambda n: np.arange(1, n + 1) ** -0.7,
    "steep": lambda n: 2.0 ** -np.arange(n),
    "of_rank_5": lambda n: np.where(np.arange(n) < 5, 1.0, 0.0),
    "large": lambda n: 1e15 * np.arange(1, n + 1) ** -1.0,
    "tiny": lambda n: 1e-18 * np.arange(1, n + 1) ** -1.0,
}


@pytest.mark.parametrize("shape", [(700, 500), (400, 900)])
@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("way", ["along", "whole"])
def test_factors_are_the_best(shape: tuple[int, int], kind: str, way: str) -> None:
    rank = 12
    delta = spectrum(*shape, SPECTRA[kind](min(shape)))
    found = along(delta, rank) if way == "along" else factors_of(delta.astype(np.float64), rank)
    values = np.linalg.svd(delta.astype(np.float64), compute_uv=False)
    best = float((values[:rank] ** 2).sum() / (values**2).sum())
    assert best >= found.energy - 1e-12
    assert found.energy == pytest.approx(best, rel=2e-4 if way == "along" else 1e-12)
    assert found.norm == pytest.approx(float(np.linalg.norm(values)), rel=1e-6)
    product = found.left_RK.astype(np.float64) @ found.right_KC.astype(np.float64)
    lost = float(((delta - product) ** 2).sum() / (values**2).sum())
    assert lost == pytest.approx(1 - found.energy, abs=1e-12)
    gram = found.right_KC.astype(np.float64) @ found.right_KC.T
    assert np.abs(gram - np.eye(rank)).max() < 1e-6
    # In order of what they keep, and of either sign the one with a positive largest number.
    lengths = np.linalg.norm(found.left_RK.astype(np.float64), axis=0)
    assert (np.diff(lengths) <= 1e-6 * lengths[0]).all()
    assert (found.right_KC[np.arange(rank), np.abs(found.right_KC).argmax(axis=1)] > 0).all()


def test_zeros() -> None:
    for found in (along(np.zeros((700, 500), np.float32), 4), factors_of(np.zeros((9, 7)), 4)):
        assert found.energy == 1.0
        assert found.norm == 0.0
        assert not found.left_RK.any()
        assert not found.right_KC.any()


def test_of_full_rank_nothing_is_lost() -> None:
    delta = np.random.default_rng(0).normal(size=(40, 30))
    found = factors_of(delta, 30)
    assert found.energy == 1.0
    assert np.abs(found.left_RK @ found.right_KC - delta).max() < 1e-5


@pytest.mark.parametrize(
    ("shape", "rank", "is_whole"),
    [
        ((512, 512), 8, True),
        ((513, 512), 8, False),
        ((4096, 4096), 64, False),
        ((4096, 4096), 1400, True),
        ((100_000, 64), 32, True),
        ((1, 5000), 8, True),
        ((128_256, 4096), 128, False),
        ((8192, 28_672), 64, False),
    ],
)
def test_how_it_is_done(shape: tuple[int, int], rank: int, is_whole: bool) -> None:
    how = factoring(recipe(shape), rank)
    assert how.is_whole == is_whole
    assert is_whole or shape[0] * shape[1] > SMALL_ELEMENTS
    assert how.rank == min(rank, *shape)
    assert how.rank <= how.columns <= min(shape)
    assert how.step_elements % how.cols == 0
    assert how.step_elements >= min(STEP_ROWS, shape[0]) * how.cols
    assert how.forms == (1 if is_whole else TURNS + 1)
    # What is held does not grow with the product of both sides, but where it is held whole.
    assert is_whole or how.held_bytes < 64 * (shape[0] + shape[1]) * how.columns


def test_ranks_of_a_whole_tensor_keep_its_steps_whole() -> None:
    how = MergeSettings(weights=(1.0,), densities=(0.5,), epsilons=(0.1,), granularity="tensor")
    of = TensorRecipe("a", (1000, 600), "F32", ("F32",), "F32", how)
    assert factoring(of, 8).step_elements == 600_000


def test_the_first_basis_is_of_the_tensor_alone() -> None:
    """Words of a stream that no expert has."""
    of = recipe((700, 500), seed=5)
    basis = first_basis(of, 500, 24)
    key = stream_key(5, of.name, (1 << 32) - 1, 0)
    assert (basis[:, 3] == element_uniforms(key, 1500, 2000) - 0.5).all()
    other = first_basis(recipe((700, 500), seed=6), 500, 24)
    assert not (basis == other).any(axis=0).all()


def test_orthonormal_columns_of_any_size() -> None:
    basis = np.random.default_rng(0).normal(size=(50, 4)) * [1e150, 1e150, 1e145, 1e150]
    found = orthonormal(basis)
    assert np.abs(found.T @ found - np.eye(4)).max() < 1e-12
    assert np.isfinite(orthonormal(np.zeros((50, 4)))).all()


def test_joined() -> None:
    rng = np.random.default_rng(0)
    pairs = [
        (rng.normal(size=(30, k)).astype(np.float32), rng.normal(size=(k, 20)).astype(np.float32))
        for k in (3, 5)
    ]
    found = joined(
        [(*pair, weight) for pair, weight in zip(pairs, (0.5, -1.25), strict=True)], (30, 20)
    )
    wanted = 0.5 * pairs[0][0].astype(np.float64) @ pairs[0][1]
    wanted += -1.25 * pairs[1][0].astype(np.float64) @ pairs[1][1]
    assert np.abs(found.left_RK.astype(np.float64) @ found.right_KC - wanted).max() < 1e-5
    assert found.norm == pytest.approx(float(np.linalg.norm(wanted)), rel=1e-6)
    assert (found.right_KC[:3] == pairs[0][1]).all()
    assert (found.left_RK[:, :3] == pairs[0][0] * np.float32(0.5)).all()


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (1.0, "100 %"),
        (1 - 2.0**-53, "100 %"),
        (0.0, "0.00 %"),
        (0.33689, "33.68 %"),
        (0.98999, "98.99 %"),
        (0.99996, "99.9960 %"),
        (0.9999999, "99.9999900 %"),
    ],
)
def test_shares_are_never_rounded_up(share: float, text: str) -> None:
    assert format_share(share) == text


def test_weights_that_cancel_divide_nothing() -> None:
    assert fused_weight((0.5, 0.25)) == 0.75
    assert fused_weight((0.5, -0.5)) == 1.0
    assert fused_weight((1.0, -1.0 + 2.0**-22)) == 1.0


def test_the_recipe_of_the_delta() -> None:
    of = recipe((4, 4))
    assert of_deltas(of).base_dtype is None
    assert (of_deltas(of).expert_dtypes, of_deltas(of).out_dtype) == (("F32",), "F32")
    wide = TensorRecipe("a", (4, 4), "F64", ("F32",), "F32", of.settings, is_delta=(True,))
    assert of_deltas(wide).expert_dtypes == ("F64",)
    assert of_deltas(wide).settings is wide.settings
