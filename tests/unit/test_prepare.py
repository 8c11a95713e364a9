"""What is measured before a merge: the selection of the k-th largest and the exact l1 ratio."""

from __future__ import annotations

import itertools
import math
import random
import sys
from copy import deepcopy
from dataclasses import fields
from fractions import Fraction
from functools import reduce
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pytest

from della_dist.ops.blocks import Backend, Block
from della_dist.ops.measurements import (
    Measurement,
    Multiplied,
    Selected,
    Summed,
    merge_measurements,
    multiplied,
)
from della_dist.ops.prepare import Multiplying, Pending, Ready, Selecting, Summing, absorb, prepare
from della_dist.ops.reference import drop
from della_dist.ops.rounding import widen
from della_dist.ops.tensor import block_spans, slice_block
from della_dist.specs.passes import SELECT_BUCKETS, gathered_bytes
from della_dist.specs.recipe import TensorRecipe
from tests.tensors import BACKENDS, angles_recipe, backend_of, family, recipe_of, to_raw

Values: TypeAlias = npt.NDArray[np.floating[Any]]


@pytest.fixture(scope="module", params=["plain", *BACKENDS])
def measure(request: pytest.FixtureRequest) -> Backend | None:
    """A backend that measures; None: the plain loop below, which shows that `prepare` is right."""
    return None if request.param == "plain" else backend_of(request.param)


def measure_plainly(recipe: TensorRecipe, prepared: Pending, block: Block) -> Measurement:
    """Measure a block that is the whole tensor, one element at a time."""
    num_experts = len(block.experts)
    compute, integer, mantissa = (
        (np.float64, np.uint64, 52) if prepared.wide else (np.float32, np.uint32, 23)
    )
    num_nonfinite = np.zeros(num_experts, np.int64)
    num_searches = len(prepared.prefix) if isinstance(prepared, Selecting) else 0
    counts = np.zeros((num_searches, SELECT_BUCKETS), np.int64)
    key_min = np.full((num_searches, SELECT_BUCKETS), 2**64 - 1, np.uint64)
    key_max = np.zeros((num_searches, SELECT_BUCKETS), np.uint64)
    l1 = np.zeros((num_experts, 2, 2, 2048 if prepared.wide else 256), np.int64)
    for m, raw in enumerate(block.experts):
        delta = widen(raw, recipe.expert_dtypes[m]).astype(compute)
        if block.base is not None and recipe.base_dtype is not None:
            delta -= widen(block.base, recipe.base_dtype).astype(compute)
        finite = np.isfinite(delta)
        num_nonfinite[m] = np.count_nonzero(~finite)
        delta = np.where(finite, delta, compute(0))
        keep = drop(recipe, m, delta)[0]
        for key, kept in zip(np.abs(delta).view(integer).tolist(), keep.tolist(), strict=True):
            if isinstance(prepared, Selecting):
                bucket = (key >> prepared.shift) % 2**prepared.bits
                for s in range(m, num_searches, num_experts):
                    above = key >> (prepared.shift + prepared.bits)
                    if not prepared.counted[s] or above != prepared.prefix[s]:
                        continue
                    counts[s, bucket] += 1
                    key_min[s, bucket] = min(int(key_min[s, bucket]), key)
                    key_max[s, bucket] = max(int(key_max[s, bucket]), key)
            else:
                exponent = key >> mantissa
                significand = key % 2**mantissa + (2**mantissa if exponent else 0)
                for stage in range(1 + kept):
                    l1[m, stage, 0, max(exponent, 1)] += significand % 2**26
                    l1[m, stage, 1, max(exponent, 1)] += significand >> 26
    if isinstance(prepared, Selecting):
        return Selected(num_nonfinite, counts, key_min, key_max)
    return Summed(num_nonfinite, l1)


def run_pass(
    measure: Backend | None, recipe: TensorRecipe, prepared: Pending, block: Block
) -> Measurement:
    """Measure with the backend, whose numbers must be those of the plain loop."""
    plain = measure_plainly(recipe, prepared, block)
    if measure is None:
        return plain
    got = measure.measure(recipe, prepared, block)
    assert type(got) is type(plain)
    found = arrays_of(got)
    for name, right in arrays_of(plain).items():
        assert found[name].dtype == right.dtype
        assert np.array_equal(found[name], right), name
    return got


def arrays_of(measured: Measurement) -> dict[str, npt.NDArray[Any]]:
    """Return what was counted, by name; divergences are not looked at here."""
    values = {field.name: getattr(measured, field.name) for field in fields(measured)}
    assert not values.pop("divergences", [])
    return values


def threshold_and_passes(
    measure: Backend | None, values: Values, dtype: str, density: float
) -> tuple[int, int]:
    recipe = recipe_of(
        (values.size,),
        base=None,
        experts=(dtype,),
        drop="magnitude",
        rescale="none",
        density=density,
    )
    block = slice_block(recipe, None, [to_raw(values, dtype)], 0, values.size)
    prepared, passes = prepare(recipe), 0
    while isinstance(prepared, Selecting):
        prepared = absorb(recipe, prepared, run_pass(measure, recipe, prepared, block))
        passes += 1
    assert isinstance(prepared, Ready)
    return prepared.threshold[0], passes


def kth_largest(values: Values, dtype: str, density: float) -> int:
    compute, integer = (np.float64, np.uint64) if dtype == "F64" else (np.float32, np.uint32)
    magnitude = np.sort(np.abs(values).astype(compute).view(integer))
    return int(magnitude[values.size - max(1, int(density * values.size))])


def near(exponent: int, seed: int = 0) -> Values:
    """200 numbers between 1 and 1 + 2**exponent, both signs."""
    rng = np.random.default_rng(seed)
    sign: Values = rng.choice([-1.0, 1.0], 200)
    return sign * (1 + rng.random(200) * 2.0**exponent)


@pytest.mark.parametrize(
    ("values", "dtype", "passes"),
    [
        (np.arange(-100, 100.0), "BF16", 1),
        (np.arange(-100, 100.0), "F32", 1),
        (np.full(200, 1 / 3), "F64", 1),
        (near(-9), "F32", 2),
        (near(-10), "F64", 2),
        (near(-25), "F64", 3),
        (near(-43), "F64", 4),
        (np.zeros(50), "F32", 1),
        (np.arange(64) * 2.0**-149, "F32", 2),
        (np.arange(64) * 2.0**-1074, "F64", 4),
    ],
)
def test_selection(measure: Backend | None, values: Values, dtype: str, passes: int) -> None:
    needed = []
    for density in (0.003, 0.1, 0.37, 0.5, 0.995):
        threshold, n = threshold_and_passes(measure, values, dtype, density)
        assert threshold == kth_largest(values, dtype, density)
        needed.append(n)
    assert max(needed) == passes


def test_experts_finish_at_different_passes(measure: Backend | None) -> None:
    recipe = recipe_of(
        (200,), base=None, experts=("F64",) * 3, drop="magnitude", rescale="none", density=0.3
    )
    columns = [2.0 ** (np.arange(200) % 7), near(-43), near(-25)]
    block = slice_block(recipe, None, [to_raw(c, "F64") for c in columns], 0, 200)
    prepared, open_experts = prepare(recipe), []
    while isinstance(prepared, Selecting):
        open_experts.append(sum(p >= 0 for p in prepared.prefix))
        prepared = absorb(recipe, prepared, run_pass(measure, recipe, prepared, block))
    assert open_experts == [3, 2, 2, 1]
    assert prepared.threshold == tuple(kth_largest(c, "F64", 0.3) for c in columns)


@pytest.mark.parametrize("dtype", ["BF16", "F32", "F64"])
def test_both_bounds_are_found_together(measure: Backend | None, dtype: str) -> None:
    """The least and the largest that are kept, also where they end in one bucket, or are equal."""
    for values in (np.arange(-100, 100.0), near(-9), near(-25), np.ones(200), np.zeros(200)):
        raw = to_raw(values, dtype)
        ordered = np.sort(np.abs(widen(raw, dtype)).astype("f8" if dtype == "F64" else "f4"))
        bits = ordered.view(f"u{ordered.itemsize}").tolist()
        for density, gamma in ((0.5, 0.01), (0.003, 0.3), (0.9, 0.1), (0.37, 0.004), (1.0, 0.5)):
            recipe = recipe_of(
                (200,),
                base=None,
                experts=(dtype,) * 2,
                drop="outliers",
                rescale="none",
                density=(density, 0.5),
                gammas=(gamma, 0.25),
            )
            block = slice_block(recipe, None, [raw, raw], 0, 200)
            prepared = prepare(recipe)
            while isinstance(prepared, Selecting):
                prepared = absorb(recipe, prepared, run_pass(measure, recipe, prepared, block))
            assert isinstance(prepared, Ready)
            assert (prepared.threshold[1], prepared.ceiling[1]) == (bits[50], bits[149])
            above, kept = int(gamma * 200), max(1, int(density * 200))
            if density == 1:
                above = 0
                assert prepared.threshold[0] == 0
            else:
                assert prepared.threshold[0] == bits[200 - above - kept]
            most = bits[199 - above]
            assert (prepared.ceiling[0] == most) if above else prepared.ceiling[0] >= most


def test_everything_is_kept_without_a_pass() -> None:
    for shape, density in (((10,), 1.0), ((), 0.2), ((0,), 0.5), ((1,), 0.01)):
        prepared = prepare(recipe_of(shape, drop="magnitude", density=density, rescale="none"))
        assert isinstance(prepared, Ready)
        assert prepared.threshold == (0,)
    assert isinstance(prepare(recipe_of((10,), drop="magnitude", density=0.99)), Selecting)
    assert isinstance(prepare(recipe_of((0, 4), rescale="l1")), Ready)


@pytest.mark.parametrize("dtype", ["BF16", "F32", "F64"])
@pytest.mark.parametrize("drop_", ["magprune", "random", "magnitude", "outliers", "none"])
def test_l1_ratio_is_exact(measure: Backend | None, drop_: str, dtype: str) -> None:
    recipe = recipe_of(
        (4, 100), base="F16", experts=(dtype, "F16"), drop=drop_, rescale="l1", density=0.4
    )
    rng = np.random.default_rng(2)
    base, experts = family(recipe, seed=2)
    spread = 3 if drop_ in ("magnitude", "outliers") else 100
    wild = rng.normal(0, 1, 400) * 2.0 ** rng.integers(-spread, spread, 400)
    experts[0] = to_raw(wild, dtype)
    block = slice_block(recipe, base, experts, 0, 400)
    prepared = prepare(recipe)
    while not isinstance(prepared, Ready):
        prepared = absorb(recipe, prepared, run_pass(measure, recipe, prepared, block))
    compute = np.float64 if prepared.wide else np.float32
    for m, raw in enumerate(experts):
        assert base is not None
        delta = widen(raw, recipe.expert_dtypes[m]).astype(compute)
        delta -= widen(base, "F16").astype(compute)
        keep = drop(recipe, m, delta)[0]
        exact = [abs(Fraction(d)) for d in delta.tolist()]
        kept = sum(itertools.compress(exact, keep.tolist()), Fraction(0))
        assert prepared.ratio[m] == float(compute(float(sum(exact, Fraction(0)) / kept)))
        assert (prepared.ratio[m] == 1) == (drop_ == "none")


def test_l1_of_subnormals_and_extremes(measure: Backend | None) -> None:
    """Subnormal deltas count; a ratio that no float holds is infinite, nothing kept gives 1."""
    tiny = 2.0**-1074
    for values, density, ratio in (
        ([3 * tiny, 2 * tiny, 1 * tiny], 0.4, 2.0),
        ([1e308, 1e308, 1e308], 0.4, 1.0),
        ([0.0, 0.0, 0.0], 0.4, 1.0),
    ):
        recipe = recipe_of(
            (3,), base=None, experts=("F64",), drop="magnitude", rescale="l1", density=density
        )
        block = slice_block(recipe, None, [to_raw(values, "F64")], 0, 3)
        prepared = prepare(recipe)
        while not isinstance(prepared, Ready):
            prepared = absorb(recipe, prepared, run_pass(measure, recipe, prepared, block))
        assert prepared.ratio == (ratio,)


def test_absurd_ratios_are_infinite() -> None:
    """Trimming cannot lead here, sampling can: only a subnormal of many large deltas is kept."""
    for dtype, exponents in (("F64", 2048), ("F32", 256)):
        recipe = recipe_of((9,), base=None, experts=(dtype,), rescale="l1")
        l1 = np.zeros((1, 2, 2, exponents), np.int64)
        l1[0, 0, 0, exponents - 3] = 1 << 22
        l1[0, :, 0, 1] = 1
        pending = prepare(recipe)
        assert isinstance(pending, Summing)
        prepared = absorb(recipe, pending, Summed(np.zeros(1, np.int64), l1))
        assert isinstance(prepared, Ready)
        assert prepared.ratio == (np.inf,)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("rescale", ["none", "l1"])
def test_measurements_merge_in_any_order(name: str, rescale: str) -> None:
    backend = backend_of(name)
    drop_ = "magnitude" if rescale == "none" else "random"
    recipe = recipe_of(
        (300_000,), base="BF16", experts=("F32", "BF16"), drop=drop_, rescale=rescale, density=0.2
    )
    base, experts = family(recipe, seed=3)
    prepared = prepare(recipe)
    assert isinstance(prepared, Selecting if rescale == "none" else Summing)
    whole = backend.measure(recipe, prepared, slice_block(recipe, base, experts, 0, 300_000))
    parts = [
        backend.measure(recipe, prepared, slice_block(recipe, base, experts, *span))
        for span in block_spans(recipe, 1)
    ]
    assert len(parts) == 5
    gathered = sum(array.nbytes for array in arrays_of(whole).values())
    assert 0.8 * gathered < gathered_bytes(recipe) < 1.2 * gathered
    for seed in range(3):
        random.Random(seed).shuffle(parts)
        total = reduce(merge_measurements, deepcopy(parts))
        for field, array in arrays_of(whole).items():
            assert np.array_equal(arrays_of(total)[field], array), field
        assert absorb(recipe, prepared, total) == absorb(recipe, prepared, whole)


@pytest.mark.parametrize("name", BACKENDS)
def test_products_of_all_pairs(name: str) -> None:
    """In any order of the blocks, and near the exact ones."""
    backend = backend_of(name)
    recipe = angles_recipe((300_000,), "model_stock", base="BF16", experts=("F32", "BF16", "F16"))
    base, experts = family(recipe, seed=3)
    pending = prepare(recipe)
    assert isinstance(pending, Multiplying)
    whole = backend.measure(recipe, pending, slice_block(recipe, base, experts, 0, 300_000))
    parts = [
        backend.measure(recipe, pending, slice_block(recipe, base, experts, *span))
        for span in block_spans(recipe, 1)
    ]
    assert len(parts) == 5
    assert isinstance(whole, Multiplied)
    for seed in range(3):
        random.Random(seed).shuffle(parts)
        total = reduce(merge_measurements, deepcopy(parts))
        assert isinstance(total, Multiplied)
        assert total.sums == whole.sums
        assert absorb(recipe, pending, total) == absorb(recipe, pending, whole)
    held = [total for total in whole.sums if total is not None]
    assert len(held) == 6
    assert 2 * sum(map(sys.getsizeof, held)) < gathered_bytes(recipe)
    assert base is not None
    start = widen(base, "BF16")
    pairs = zip(experts, recipe.expert_dtypes, strict=True)
    deltas = [widen(raw, dtype).astype(np.float32) - start for raw, dtype in pairs]
    for exact, (a, b) in zip(held, itertools.combinations_with_replacement(deltas, 2), strict=True):
        products = a.astype(np.float64) * b.astype(np.float64)
        bound = 2.0**-44 * np.linalg.norm(a) * np.linalg.norm(b)
        assert abs(exact / (1 << 1074) - math.fsum(products.tolist())) <= bound


def test_products_that_no_float64_holds() -> None:
    recipe = angles_recipe((2,), "slerp", experts=("F64", "F64"))
    pending = prepare(recipe)
    assert isinstance(pending, Multiplying)
    none = np.zeros(2, np.int64)
    big = 1.5 * 2.0**1023
    for sums in ([[1, np.inf], [1, 1], [1, 1]], [[1, 1], [1, np.nan], [1, 1]], [[big, big]] * 3):
        ready = absorb(recipe, pending, multiplied(none, np.array(sums)))
        assert isinstance(ready, Ready)
        assert all(map(math.isnan, ready.weights))
    finite = multiplied(none, np.array([[1.0, 1.0]] * 3))
    infinite = multiplied(none, np.array([[1.0, np.inf]] * 3))
    merged = merge_measurements(finite, infinite)
    assert isinstance(merged, Multiplied)
    assert merged.sums == [None] * 3
