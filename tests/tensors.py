"""Small tensors, recipes and a plain loop over blocks for the tests of `della_dist.ops`."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import reduce
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from della_dist.ops.blocks import Backend, BlockStats, U8Array, combine_stats
from della_dist.ops.measurements import merge_measurements
from della_dist.ops.prepare import Ready, absorb, prepare
from della_dist.ops.reference import merge_whole
from della_dist.ops.rounding import narrow, widen
from della_dist.ops.tensor import block_spans, load_backend, slice_block
from della_dist.specs.dtypes import DTYPE_BITS, num_bytes
from della_dist.specs.recipe import AngleRule, Angles, MergeSettings, TensorRecipe
from della_dist.specs.statistics import TensorStats

DTYPES = ("F16", "BF16", "F32", "F64")
BACKENDS = ("numba", "torch")

#: Rules of `della_dist.ops.angles`, and whether rows have weights of their own.
RULES: tuple[tuple[AngleRule, bool], ...] = (
    ("slerp", False),
    ("nuslerp", False),
    ("nuslerp", True),
    ("multislerp", False),
    ("karcher", False),
    ("model_stock", False),
    ("model_stock", True),
)

#: Shapes of every kind; (2, 3, 4, 5) has rows of 60 elements.
SHAPES: tuple[tuple[int, ...], ...] = (
    *((), (1,), (37,), (1, 37), (37, 1), (5, 19), (2, 3, 17), (3, 1, 1), (2, 3, 4, 5)),
    *((3, 2, 1, 2, 2), (0,), (0, 5), (5, 0), (2, 0, 3), (0, 2, 3, 4)),
)


def backend_of(name: str) -> Backend:
    """Return a backend: "numba" or "torch" on the CPU, or torch on "cuda" (skips without one)."""
    if name == "cuda":
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        return load_backend("torch", "cuda")
    if name == "torch":
        import torch

        torch.set_num_threads(1)  # small tensors: threads would only wait for each other
        return load_backend("torch")
    assert name == "numba"
    return load_backend("numba")


def recipe_of(
    shape: tuple[int, ...],
    *,
    base: str | None = "F32",
    experts: Sequence[str] = ("F32",),
    out: str = "F32",
    name: str = "model.layers.0.mlp.up_proj.weight",
    density: float | Sequence[float] = 0.5,
    epsilon: float | Sequence[float] | None = None,
    weights: Sequence[float] | None = None,
    gammas: Sequence[float] | None = None,
    stage: int = 0,
    is_delta: Sequence[bool] = (),
    **settings: Any,
) -> TensorRecipe:
    """Return a recipe; anything of `MergeSettings` may be given, the default is DELLA."""
    m = len(experts)
    densities = (density,) * m if isinstance(density, float | int) else tuple(density)
    if epsilon is None:
        epsilons = tuple(min(0.15, 1 - d, d / 2) for d in densities)
    else:
        epsilons = (epsilon,) * m if isinstance(epsilon, float | int) else tuple(epsilon)
    if settings.get("drop", "magprune") != "magprune":
        epsilons = (0.0,) * m
    chosen: dict[str, Any] = {
        "drop": "magprune",
        "elect": True,
        "rescale": "inverse",
        "normalize": True,
        "lambda_": 1.0,
        "granularity": "row",
        "on_nonfinite": "zero",
        "seed": 42,
        **settings,
    }
    return TensorRecipe(
        name=name,
        shape=shape,
        base_dtype=base,
        expert_dtypes=tuple(experts),
        out_dtype=out,
        settings=MergeSettings(
            **chosen,
            weights=tuple(weights) if weights is not None else (1.0,) * m,
            densities=densities,
            epsilons=epsilons,
            gammas=(0.1,) * m if gammas is None else tuple(gammas),
        ),
        stage=stage,
        is_delta=tuple(is_delta),
    )


def angles_recipe(
    shape: tuple[int, ...],
    rule: AngleRule,
    *,
    base: str | None = None,
    experts: Sequence[str] = ("F32", "F32"),
    out: str = "F32",
    weights: Sequence[float] | None = None,
    lambda_: float = 1.0,
    **angles: Any,
) -> TensorRecipe:
    """Return a recipe whose weights follow from angles."""
    return recipe_of(
        shape,
        base=base,
        experts=experts,
        out=out,
        density=1.0,
        weights=weights,
        drop="none",
        elect=False,
        rescale="none",
        normalize=False,
        lambda_=lambda_,
        angles=Angles(rule=rule, **angles),
    )


def scored_recipe(
    shape: tuple[int, ...],
    drop: str = "importance",
    *,
    experts: Sequence[str] = ("F32",),
    **settings: Any,
) -> TensorRecipe:
    """Return a recipe where what is kept is told by scores of all experts together."""
    chosen = {"elect": False, "normalize": False, "rescale": "none", "density": 1.0, **settings}
    return recipe_of(shape, experts=experts, drop=drop, **chosen)


def to_raw(values: npt.ArrayLike, dtype: str) -> U8Array:
    """Return `values` as raw bytes of `dtype`."""
    with np.errstate(all="ignore"):
        return narrow(np.asarray(values, np.float64).reshape(-1), dtype)


def from_raw(raw: U8Array, dtype: str) -> npt.NDArray[np.float64]:
    """Return the numbers in raw bytes."""
    return widen(raw, dtype).astype(np.float64)


def awkward(raw: U8Array) -> U8Array:
    """Return a read-only copy of `raw` that starts at an odd address."""
    buffer = np.empty(raw.size + 2, np.uint8)
    shift = 1 - buffer.ctypes.data % 2
    copy = buffer[shift : shift + raw.size]
    copy[:] = raw
    copy.flags.writeable = False
    return copy


def family(
    recipe: TensorRecipe, seed: int, *, ties: bool = False
) -> tuple[U8Array | None, list[U8Array]]:
    """Return a base and experts that differ from it by little, in places not at all.

    With `ties` every delta is one of five numbers.
    """
    rng = np.random.default_rng(seed)
    n = num_bytes("U8", recipe.shape)
    base = rng.normal(0, 0.02, n)
    if ties:
        base = np.round(base * 64) / 64
    raw_base, start = None, np.zeros(n)
    if recipe.base_dtype is not None:
        raw_base = to_raw(base, recipe.base_dtype)
        start = from_raw(raw_base, recipe.base_dtype)
    experts = []
    for dtype in recipe.expert_dtypes:
        if ties:
            delta = rng.integers(-2, 3, n) / 64
        else:
            delta = rng.normal(0, 0.003, n) * (rng.random(n) < 0.8)
        experts.append(to_raw(start + delta, dtype))
    return raw_base, experts


def stream(
    backend: Backend,
    recipe: TensorRecipe,
    base: U8Array | None,
    experts: Sequence[U8Array],
    *,
    block_elements: int = 1 << 22,
    shuffle: int | None = None,
) -> tuple[U8Array, list[BlockStats]]:
    """Merge over blocks, raising nothing; `shuffle` seeds the order in which they are visited."""
    spans = list(block_spans(recipe, block_elements))
    if shuffle is not None:
        random.Random(shuffle).shuffle(spans)
    blocks = [slice_block(recipe, base, experts, *span) for span in spans]
    prepared = prepare(recipe)
    while not isinstance(prepared, Ready):
        measured = [backend.measure(recipe, prepared, block) for block in blocks]
        prepared = absorb(recipe, prepared, reduce(merge_measurements, measured))
    itemsize = DTYPE_BITS[recipe.out_dtype] // 8
    out = np.full(num_bytes(recipe.out_dtype, recipe.shape), 0xA5, np.uint8)
    stats = [
        backend.merge(recipe, prepared, b, out[b.start * itemsize : b.stop * itemsize])
        for b in blocks
    ]
    return out, stats


def assert_like_reference(
    backend: Backend,
    recipe: TensorRecipe,
    base: U8Array | None,
    experts: Sequence[U8Array],
    **options: Any,
) -> TensorStats:
    """Assert that `backend` gives the reference's bytes and statistics."""
    expected, whole = merge_whole(recipe, base, experts)
    out, blocks = stream(backend, recipe, base, experts, **options)
    if not np.array_equal(out, expected):
        itemsize = DTYPE_BITS[recipe.out_dtype] // 8
        wrong = np.flatnonzero((out != expected).reshape(-1, itemsize).any(axis=1))
        i = wrong[0]
        pytest.fail(
            f"{len(wrong)} of {out.size // itemsize} elements differ, first at {i}: "
            f"{from_raw(out, recipe.out_dtype)[i]!r} instead of "
            f"{from_raw(expected, recipe.out_dtype)[i]!r} for {recipe}"
        )
    for field in ("num_nonfinite", "num_nonzero", "num_kept", "num_elected"):
        counted = sum((getattr(b, field) for b in blocks), np.zeros(len(experts), np.int64))
        assert counted.tolist() == getattr(whole, field).tolist(), (field, recipe)
    max_abs = np.zeros(len(experts))
    for b in blocks:
        max_abs = np.maximum(max_abs, b.max_abs)
    assert max_abs.tolist() == whole.max_abs.tolist(), recipe
    assert sum(b.num_conflicts for b in blocks) == whole.num_conflicts, recipe
    assert sum(b.num_overflow for b in blocks) == whole.num_overflow, recipe
    stats = combine_stats(recipe, blocks)
    assert stats == combine_stats(recipe, [whole]), recipe
    return stats
