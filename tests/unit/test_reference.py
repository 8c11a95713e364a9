"""The reference itself, against numbers worked out by hand, exact fractions and known answers."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from della_dist.errors import TensorDataError
from della_dist.ops import merge_arrays, merge_tensor
from della_dist.ops.philox import stream_key
from della_dist.ops.reference import (
    exact_abs_sum,
    l1_ratio,
    magprune_probability,
    merge_reference,
    merge_whole,
    philox4x32,
    uniforms,
)
from della_dist.ops.rounding import narrow, widen
from della_dist.ops.tensor import BackendName
from tests.tensors import DTYPES, awkward, family, from_raw, recipe_of, to_raw
from tests.unit.test_philox import KNOWN_ANSWERS

PLAIN: dict[str, Any] = {"drop": "none", "elect": False, "rescale": "none", "normalize": False}


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_known_answers(
    counter: tuple[int, int, int, int], key: tuple[int, int], words: tuple[int, ...]
) -> None:
    """The vectors of Random123's kat_vectors for philox4x32-10."""
    x0, x1, x2, x3 = (np.array([c], np.uint64) for c in counter)
    assert tuple(int(w[0]) for w in philox4x32((x0, x1, x2, x3), key)) == words


def test_uniforms_follow_the_layout() -> None:
    key = stream_key(7, "w", 2)
    u = uniforms(7, "w", 2, 11)
    assert u.shape == (11,)
    for i in (0, 1, 5, 10):
        counter = tuple(np.array([c], np.uint64) for c in (i // 4, 0, 0, 0))
        words = philox4x32(
            (counter[0], counter[1], counter[2], counter[3]), (key & 0xFFFFFFFF, key >> 32)
        )
        assert u[i] == (int(words[i % 4][0]) >> 8) / 2**24
    assert np.array_equal(uniforms(7, "w", 2, 7), u[:7])


def test_mean_ranks_by_hand() -> None:
    settings = recipe_of((5,), density=0.5, epsilon=0.25).settings
    # |x| = 3 0 1 1 7: ranks 3, 0, 1.5, 1.5, 4 of 4.
    p = magprune_probability(np.array([-3.0, 0.0, 1.0, -1.0, 7.0], np.float32), settings, 0)
    assert p.tolist() == [0.25 + 0.5 * r / 4 for r in (3, 0, 1.5, 1.5, 4)]
    all_equal = magprune_probability(np.full(8, 2.0, np.float32), settings, 0)
    assert all_equal.tolist() == [0.5] * 8
    assert magprune_probability(np.array([9.0]), settings, 0).tolist() == [0.5]


def nearest(value: Fraction, significand_bits: int, min_exponent: int) -> Fraction:
    """Round to nearest even in a format without an upper end, by exact arithmetic."""
    if value == 0:
        return value
    exponent = math.frexp(float(abs(value)))[1] - 1
    step = Fraction(2) ** (max(exponent, min_exponent) - significand_bits)
    return round(value / step) * step  # Python's round is to nearest even


@pytest.mark.parametrize(("dtype", "bits"), [("F16", (10, -14)), ("BF16", (7, -126))])
def test_narrowing_rounds_once(dtype: str, bits: tuple[int, int]) -> None:
    """Ties, their float64 neighbours, and numbers among the subnormals, against fractions."""
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 0x7B00, 400).astype("<u2")
    exact = widen(patterns.view(np.uint8), dtype).astype(np.float64)
    above = widen((patterns + np.uint16(1)).view(np.uint8), dtype).astype(np.float64)
    ties = (exact + above) / 2
    values = np.concatenate([exact, ties, np.nextafter(ties, 0), np.nextafter(ties, np.inf)])
    values = np.concatenate([values, -values])
    rounded = from_raw(narrow(values, dtype), dtype)
    for value, got in zip(values.tolist(), rounded.tolist(), strict=True):
        assert Fraction(got) == nearest(Fraction(value), *bits), value
    # Through float32 the neighbours of the ties would round to even, the wrong way half the time.
    with np.errstate(all="ignore"):
        twice = from_raw(narrow(values.astype(np.float32), dtype), dtype)
    assert np.count_nonzero(twice != rounded) > 100


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_every_16_bit_number_survives(dtype: str) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16).astype("<u2")
    with np.errstate(invalid="ignore"):
        values = widen(bits.view(np.uint8), dtype)
        for wide in (values.astype(np.float32), values.astype(np.float64)):
            back = narrow(wide, dtype).view("<u2")
            nan = np.isnan(wide)
            assert np.array_equal(back[~nan], bits[~nan])
            assert set(back[nan].tolist()) == {0x7E00 if dtype == "F16" else 0x7FC0}


def test_narrowing_at_the_ends() -> None:
    def bits(values: list[float], dtype: str, compute: type = np.float64) -> list[int]:
        raw = narrow(np.array(values, compute), dtype)
        return [int(x) for x in raw.view(f"<u{raw.size // len(values)}")]

    assert bits([65519.99, 65520.0, -65520.0, np.inf], "F16") == [0x7BFF, 0x7C00, 0xFC00, 0x7C00]
    assert bits([2.0**-25, 1.01 * 2.0**-25, -0.0], "F16") == [0, 1, 0x8000]
    largest = 2.0**128 - 2.0**120
    assert bits([largest, largest + 2.0**118, largest + 2.0**119], "BF16") == [
        *(0x7F7F, 0x7F7F, 0x7F80)
    ]
    assert bits([2.0**-134, 1.01 * 2.0**-134, -(2.0**-133)], "BF16") == [0, 1, 0x8001]
    assert bits([1e39, -1e-46, 2.0**-149], "F32") == [0x7F800000, 0x80000000, 1]
    assert bits([-np.nan], "F32", np.float32) == [0x7FC00000]
    assert bits([-np.nan], "F64") == [0x7FF8000000000000]


def test_l1_ratio_is_the_exact_quotient() -> None:
    rng = np.random.default_rng(1)
    delta = rng.normal(0, 1, 500) * 2.0 ** rng.integers(-60, 60, 500)
    keep = rng.random(500) < 0.4
    total = sum((abs(Fraction(d)) for d in delta.tolist()), Fraction(0))
    kept = sum((abs(Fraction(d)) for d in delta[keep].tolist()), Fraction(0))
    assert exact_abs_sum(delta) == total
    assert l1_ratio(delta, keep) == float(total / kept)
    assert l1_ratio(delta, np.zeros(500, np.bool_)) == 1.0
    assert l1_ratio(np.zeros(500), keep) == 1.0


def merged(recipe_changes: dict[str, Any], base: float, experts: list[float]) -> float:
    """Merge single numbers; every one of them is a float32."""
    recipe = recipe_of((), experts=("F32",) * len(experts), **recipe_changes)
    out, _ = merge_reference(recipe, to_raw([base], "F32"), [to_raw([e], "F32") for e in experts])
    return float(from_raw(out, "F32")[0])


def test_elect_and_fuse_by_hand() -> None:
    # Deltas 1, -0.5, 2 with weights 1, 2, 0.5: contributions 1, -1, 1; the sum elects +.
    elect: dict[str, Any] = {"drop": "none", "rescale": "none", "weights": (1, 2, 0.5)}
    assert merged(elect, 4.0, [5.0, 3.5, 6.0]) == np.float32(4.0) + np.float32(4 / 3)
    assert merged({**elect, "normalize": False, "lambda_": 0.5}, 4.0, [5.0, 3.5, 6.0]) == 5.0
    assert merged({**elect, "elect": False}, 4.0, [5.0, 3.5, 6.0]) == np.float32(4.0) + np.float32(
        2 / 7
    )
    # A sum of zero counts as positive.
    assert merged({"drop": "none", "rescale": "none"}, 4.0, [5.0, 3.0]) == 5.0
    # A weight may be negative: contributions -1 and +3 elect the second.
    negative: dict[str, Any] = {"drop": "none", "rescale": "none", "weights": (-1, 1)}
    assert merged(negative, 4.0, [5.0, 7.0]) == 7.0
    # Weights that cancel are not divided by.
    assert merged({**negative, "elect": False}, 4.0, [5.0, 7.0]) == 6.0


def test_rescale_by_hand() -> None:
    """DARE at one seed: kept elements are delta / p, the others the base."""
    recipe = recipe_of((64,), drop="random", density=0.25, normalize=False, name="w", seed=3)
    base = np.arange(64, 128, dtype=np.float32) / 64
    delta = np.float32(0.5)
    out, stats = merge_reference(
        recipe, to_raw(base, "F32"), [(base + delta).astype("<f4").view(np.uint8)]
    )
    keep = uniforms(3, "w", 0, 64) < 0.25
    assert np.array_equal(out.view("<f4"), base + np.where(keep, np.float32(2.0), np.float32(0)))
    assert stats.experts[0].num_kept == keep.sum() > 0
    assert stats.experts[0].num_nonzero == 64
    assert stats.experts[0].delta_l2 == 4.0
    assert stats.experts[0].delta_max_abs == 0.5


def test_trim_keeps_ties_at_the_threshold() -> None:
    trim = {**PLAIN, "drop": "magnitude"}
    recipe = recipe_of((6,), base=None, density=0.34, **trim)
    out, stats = merge_reference(recipe, None, [to_raw([1, -3, 2, 3, 2, -2], "F32")])
    # k = int(2.04) = 2: only the threes.
    assert from_raw(out, "F32").tolist() == [0, -3, 0, 3, 0, 0]
    recipe = recipe_of((6,), base=None, density=0.5, **trim)
    out, stats = merge_reference(recipe, None, [to_raw([1, -3, 2, 3, 2, -2], "F32")])
    assert from_raw(out, "F32").tolist() == [0, -3, 2, 3, 2, -2]
    assert stats.experts[0].num_kept == 5


def test_statistics_by_hand() -> None:
    recipe = recipe_of((4,), base="F32", experts=("F32", "F32"), **{**PLAIN, "elect": True})
    base = to_raw([0, 0, 0, np.inf], "F32")
    experts = [to_raw([1, -1, np.nan, 1], "F32"), to_raw([-2, -2, 3, 2], "F32")]
    out, whole = merge_whole(recipe, base, experts)
    assert from_raw(out, "F32").tolist() == [-2, -3, 3, np.inf]
    assert whole.num_nonfinite.tolist() == [2, 1]
    assert whole.num_nonzero.tolist() == [2, 3]
    assert whole.num_elected.tolist() == [1, 3]
    assert whole.max_abs.tolist() == [1, 3]
    assert whole.sum_sq.tolist() == [[2, 17]]
    assert whole.num_conflicts == 1
    assert whole.num_overflow == 0


def test_float64_inputs_compute_in_float64() -> None:
    recipe = recipe_of((1,), base="F32", experts=("F64",), out="F64", **PLAIN)
    out, _ = merge_reference(recipe, to_raw([1.0], "F32"), [to_raw([1 + 2.0**-40], "F64")])
    assert from_raw(out, "F64")[0] == 1 + 2.0**-40


@pytest.mark.parametrize("backend", ["reference", "torch", "numba"])
def test_errors_name_tensor_expert_and_count(backend: BackendName) -> None:
    recipe = recipe_of((2, 3), experts=("F32", "F32"), on_nonfinite="error")
    base, experts = family(recipe, seed=0)
    assert base is not None
    bad = experts[1].copy()
    bad.view("<f4")[[1, 4]] = np.nan
    for rescale in ("inverse", "l1"):
        recipe = recipe_of((2, 3), experts=("F32", "F32"), on_nonfinite="error", rescale=rescale)
        with pytest.raises(TensorDataError, match=r"up_proj.*expert 1: 2 deltas"):
            merge_tensor(recipe, base, [experts[0], bad], backend=backend)
    recipe = recipe_of((2, 3), out="F16", weights=(1e9,), normalize=False)
    with pytest.raises(TensorDataError, match=r"up_proj.* do not fit into F16"):
        merge_tensor(recipe, base, [experts[0]], backend=backend)
    with pytest.raises(ValueError, match="the base: expected 24 uint8 for F32"):
        merge_tensor(recipe, base[1:], [experts[0]], backend=backend)
    with pytest.raises(ValueError, match="2 experts were given"):
        merge_tensor(recipe, base, experts, backend=backend)


@pytest.mark.parametrize("backend", ["reference", "torch", "numba"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_arrays(backend: BackendName, dtype: str) -> None:
    recipe = recipe_of((3, 4), base=dtype, experts=(dtype, "F32"), out=dtype, name="tensor")
    base, experts = family(recipe, seed=8)
    assert base is not None
    kind = {"F16": "<f2", "BF16": "<u2", "F32": "<f4", "F64": "<f8"}[dtype]
    arrays = [base.view(kind).reshape(3, 4), experts[0].view(kind).reshape(3, 4)]
    # A transposed copy: the same numbers in another memory order.
    second = np.asfortranarray(experts[1].view("<f4").reshape(3, 4))
    out, stats = merge_arrays(recipe.settings, arrays[0], [arrays[1], second], backend=backend)
    expected, expected_stats = merge_reference(recipe, base, experts)
    assert out.dtype == np.dtype(kind)
    assert out.tobytes() == expected.tobytes()
    assert stats.num_elements == expected_stats.num_elements == 12
    with pytest.raises(ValueError, match="int64 arrays cannot be merged"):
        merge_arrays(recipe.settings, None, [np.zeros(3, np.int64)])
    with pytest.raises(ValueError, match="differ"):
        merge_arrays(recipe.settings, arrays[0], [arrays[1][0]])


def test_alignment_does_not_matter() -> None:
    recipe = recipe_of((5, 5), base="BF16", experts=("F64",), out="F16")
    base, experts = family(recipe, seed=9)
    assert base is not None
    expected = merge_reference(recipe, base, experts)
    got = merge_reference(recipe, awkward(base), [awkward(experts[0])])
    assert np.array_equal(got[0], expected[0])
    assert got[1] == expected[1]
