"""Every backend gives the bytes of the reference, for any input and any blocks."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from della_dist.ops.blocks import Backend, combine_stats
from della_dist.ops.reference import merge_reference, uniforms
from della_dist.specs.dtypes import DTYPE_BITS
from della_dist.specs.recipe import AngleRule, Overlap, TensorRecipe
from della_dist.specs.rows import row_view
from tests.tensors import (
    BACKENDS,
    DTYPES,
    RULES,
    SHAPES,
    angles_recipe,
    assert_like_reference,
    awkward,
    backend_of,
    family,
    from_raw,
    recipe_of,
    scored_recipe,
    stream,
    to_raw,
)

DROPS = ("none", "magprune", "random", "magnitude", "outliers")
RESCALES = ("inverse", "l1", "none")
TWO = ("slerp", "nuslerp")


@pytest.fixture(scope="module", params=[*BACKENDS, pytest.param("cuda", marks=pytest.mark.gpu)])
def backend(request: pytest.FixtureRequest) -> Backend:
    return backend_of(request.param)


@pytest.mark.parametrize("drop", DROPS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(backend: Backend, shape: tuple[int, ...], drop: str) -> None:
    for granularity, rescale in itertools.product(("row", "tensor"), ("inverse", "l1")):
        recipe = recipe_of(
            shape,
            base="BF16",
            experts=("BF16", "BF16"),
            out="BF16",
            drop=drop,
            granularity=granularity,
            rescale=rescale,
        )
        assert_like_reference(backend, recipe, *family(recipe, seed=len(shape)))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("drop", DROPS)
def test_every_method(backend: Backend, drop: str, ties: bool) -> None:
    for elect, rescale, normalize, granularity in itertools.product(
        (True, False), RESCALES, (True, False), ("row", "tensor")
    ):
        recipe = recipe_of(
            (6, 71),
            base="BF16",
            experts=("BF16",) * 3,
            out="BF16",
            density=(0.5, 0.3, 0.85),
            weights=(1.0, -0.4, 0.3),
            lambda_=0.7,
            drop=drop,
            elect=elect,
            rescale=rescale,
            normalize=normalize,
            granularity=granularity,
        )
        stats = assert_like_reference(backend, recipe, *family(recipe, seed=5, ties=ties))
        assert stats.num_conflicts > 0


@pytest.mark.parametrize("base", [None, "BF16", "F64"])
@pytest.mark.parametrize(("rule", "by_row"), RULES)
def test_weights_of_angles(
    backend: Backend, rule: AngleRule, by_row: bool, base: str | None
) -> None:
    experts = ("BF16", "F32") if rule in TWO else ("BF16", "F32", "F16")
    for shape in (*SHAPES, (300, 45), (2, 70_001), (3, 4_000, 2)):
        recipe = angles_recipe(
            shape, rule, base=base, experts=experts, weights=(0.7, 0.4, -0.1)[: len(experts)],
            lambda_=0.9, by_row=by_row,
        )  # fmt: skip
        raw = family(recipe, seed=3)
        expected = assert_like_reference(backend, recipe, *raw)
        again = assert_like_reference(backend, recipe, *raw, block_elements=1, shuffle=4)
        assert again == expected


@pytest.mark.parametrize(("rule", "by_row"), RULES)
def test_angles_of_deltas_that_are_awkward(backend: Backend, rule: AngleRule, by_row: bool) -> None:
    """Zero, parallel, opposite, enormous, tiny, and not finite."""
    one = np.random.default_rng(1).normal(0, 1, 60)
    big = 1.5 * 2.0**127
    for dtype, scale in (("F32", 2.0**100), ("F32", 2.0**-140), ("F64", 2.0**600), ("BF16", 1.0)):
        with np.errstate(all="ignore"):
            for second in (
                *(one, -one, 3 * one, one * 0, one + 1e-7, np.full(60, np.nan), one * big),
                np.roll(one, 1),  # whose products are infinite with both signs
            ):
                recipe = angles_recipe(
                    (3, 20), rule, experts=(dtype,) * 2, out=dtype, weights=(0.7, 0.3),
                    by_row=by_row,
                )  # fmt: skip
                raw = [to_raw(x * scale, dtype) for x in (one, second)]
                for experts in (raw, raw[::-1], [raw[1], raw[1]]):
                    assert_like_reference(backend, recipe, None, experts)


#: What scores of all experts together tell, and how many experts are looked at.
SCORED = (("importance", 1), ("variance", 3))
#: How `sce` and `ram*` put together what is left.
BY_ENERGY: dict[str, Any] = {"elect": True, "normalize": True, "by_energy": True}
OVERLAPS = (Overlap(), Overlap(0.1, 0.2), Overlap(3.0, 0.5), Overlap(1.0, 100.0))


@pytest.mark.parametrize(("drop", "count"), SCORED)
def test_scores(backend: Backend, drop: str, count: int) -> None:
    for shape in (*SHAPES, (70, 1100), (2, 2100), (3, 400, 2)):
        for base, expert, out in (("BF16", "BF16", "BF16"), (None, "F16", "F32"),
                                  ("F32", "F64", "F32")):  # fmt: skip
            how = {} if count == 1 else {**BY_ENERGY, "density": 0.3}
            recipe = scored_recipe(
                shape, drop, base=base, experts=(expert,) * count, out=out, **how
            )
            raw = family(recipe, seed=3)
            expected = assert_like_reference(backend, recipe, *raw)
            again = assert_like_reference(backend, recipe, *raw, block_elements=1, shuffle=4)
            assert again == expected
            if math.prod(shape) > 2000 and shape[-1] > 2:
                assert all(0 < e.num_kept < e.num_nonzero for e in expected.experts)


@pytest.mark.parametrize(("drop", "count"), SCORED)
def test_scores_that_are_awkward(backend: Backend, drop: str, count: int) -> None:
    """Of deltas that are zero, equal, enormous, tiny, given, and not finite, bases among them."""
    one = np.random.default_rng(1).normal(0, 1, 60)
    for dtype, scale in (("F32", 2.0**100), ("F32", 2.0**-140), ("F64", 2.0**1000), ("BF16", 1.0)):
        with np.errstate(all="ignore"):
            for base in (one, one * 0, np.where(one > 0.9, np.inf, one), np.full(60, np.nan)):
                for second in (base, base + 0.5, -3 * one, base * 2.0**23, base / 2.0**127):
                    for is_delta in (False, True):
                        how = {} if count == 1 else {**BY_ENERGY, "density": 0.3}
                        recipe = scored_recipe(
                            (3, 20), drop, base=dtype, experts=(dtype,) * count, out=dtype,
                            is_delta=(is_delta,) * count, **how,
                        )  # fmt: skip
                        experts = [to_raw(second * scale * (m + 1), dtype) for m in range(count)]
                        assert_like_reference(backend, recipe, to_raw(base * scale, dtype), experts)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_weights_by_energy(backend: Backend, count: int, ties: bool) -> None:
    for density in (1e-6, 0.1, 0.5, 0.999, 1.0):
        for shape in ((6, 71), (70, 1100), (), (2, 0)):
            recipe = scored_recipe(
                shape, "variance", base="BF16", experts=("BF16", "F32", "F16", "BF16")[:count],
                out="F32", density=density, lambda_=0.7, **BY_ENERGY,
            )  # fmt: skip
            raw = family(recipe, seed=4, ties=ties)
            expected = assert_like_reference(backend, recipe, *raw)
            assert assert_like_reference(
                backend, recipe, *raw, block_elements=1, shuffle=2
            ) == expected  # fmt: skip


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("overlap", OVERLAPS, ids=str)
def test_overlaps(backend: Backend, overlap: Overlap, count: int, ties: bool) -> None:
    for least in (0.0, 0.002, 1.0):
        for shape in ((6, 71), (70, 1100), (), (2, 0)):
            recipe = scored_recipe(
                shape, "threshold", base="BF16", experts=("BF16", "F32", "F16", "BF16")[:count],
                out="F32", least=least, overlap=overlap, lambda_=0.7,
            )  # fmt: skip
            raw = family(recipe, seed=4, ties=ties)
            expected = assert_like_reference(backend, recipe, *raw)
            assert assert_like_reference(
                backend, recipe, *raw, block_elements=1, shuffle=2
            ) == expected  # fmt: skip


@pytest.mark.parametrize("base", [None, "BF16", "F64"])
def test_limits(backend: Backend, base: str | None) -> None:
    for limit in (2.0**-149, 1e-4, 0.003, 7.0, 3e38):
        recipe = recipe_of(
            (6, 71), base=base, experts=("BF16", "F32"), weights=(1.0, -0.4), drop="none",
            rescale="none", elect=False, normalize=False, limit=limit,
        )  # fmt: skip
        assert_like_reference(backend, recipe, *family(recipe, seed=2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("drop", DROPS)
def test_experts_that_are_deltas(backend: Backend, drop: str, dtype: str) -> None:
    """A delta that is given is merged as the same one made by subtraction."""
    kind, number = ("F64", np.float64) if dtype == "F64" else ("F32", np.float32)
    recipe = recipe_of((50, 71), base=dtype, experts=(kind,) * 3, drop=drop)
    base, experts = family(recipe, seed=6)
    assert base is not None
    start = from_raw(base, dtype).astype(number)
    deltas = [to_raw(from_raw(e, kind).astype(number) - start, kind) for e in experts]
    out, blocks = stream(backend, recipe, base, experts)
    mixed = replace(recipe, is_delta=(False, True, True))
    stats = assert_like_reference(backend, mixed, base, [experts[0], *deltas[1:]])
    assert stats == combine_stats(recipe, blocks)
    assert np.array_equal(stream(backend, mixed, base, [experts[0], *deltas[1:]])[0], out)


def test_small_deltas_are_not_lost(backend: Backend) -> None:
    base, delta = np.full(64, 1.0), np.full(64, 2.0**-20)
    recipe = recipe_of((8, 8), base="BF16", experts=("BF16",), density=1, is_delta=(True,))
    stats = assert_like_reference(backend, recipe, to_raw(base, "BF16"), [to_raw(delta, "BF16")])
    assert stats.experts[0].num_kept == 64
    out, _ = stream(backend, recipe, to_raw(base, "BF16"), [to_raw(delta, "BF16")])
    assert from_raw(out, "F32").tolist() == [1 + 2.0**-20] * 64


@pytest.mark.parametrize("is_delta", [False, True])
def test_no_delta_is_finite_where_the_base_is_not(backend: Backend, is_delta: bool) -> None:
    recipe = recipe_of((1, 3), base="F32", experts=("F32",), density=1, is_delta=(is_delta,))
    base, expert = to_raw([np.inf, np.nan, 1], "F32"), to_raw([1, 1, 2], "F32")
    assert_like_reference(backend, recipe, base, [expert])
    _, (block,) = stream(backend, recipe, base, [expert])
    assert block.num_nonfinite.tolist() == [2]


@pytest.mark.parametrize("out", DTYPES)
@pytest.mark.parametrize("base", [None, *DTYPES])
def test_every_mixture_of_dtypes(backend: Backend, base: str | None, out: str) -> None:
    for experts in itertools.product(DTYPES, DTYPES):
        recipe = recipe_of((3, 45), base=base, experts=experts, out=out, weights=(0.6, 0.5))
        raw_base, raw_experts = family(recipe, seed=1)
        assert_like_reference(
            backend,
            recipe,
            None if raw_base is None else awkward(raw_base),
            [awkward(e) for e in raw_experts],
        )


@pytest.mark.parametrize("drop", ["magnitude", "outliers", "random", "magprune"])
@pytest.mark.parametrize("dtype", ["BF16", "F32", "F64"])
def test_densities(backend: Backend, dtype: str, drop: str) -> None:
    for density in (0.01, 0.1, 0.25, 0.5, 0.9, 0.999, 1.0):
        for rescale in ("inverse", "l1"):
            recipe = recipe_of(
                (4, 130),
                base=dtype,
                experts=(dtype,),
                out=dtype,
                density=density,
                drop=drop,
                rescale=rescale,
            )
            assert_like_reference(backend, recipe, *family(recipe, seed=2))


@pytest.mark.parametrize("num_experts", [1, 2, 3, 8])
def test_numbers_of_experts(backend: Backend, num_experts: int) -> None:
    recipe = recipe_of(
        (5, 67),
        base="BF16",
        experts=("BF16", "F32", "F16", "BF16", "F32", "BF16", "F16", "BF16")[:num_experts],
        out="F32",
        density=tuple(np.linspace(0.2, 1.0, num_experts).tolist()),
        weights=tuple(np.linspace(-1.0, 1.7, num_experts).tolist()),
        lambda_=-1.3,
    )
    assert_like_reference(backend, recipe, *family(recipe, seed=3, ties=True))


def test_epsilon_of_one_expert_only(backend: Backend) -> None:
    """Experts with and without a window share the ranked view of the tensor."""
    recipe = recipe_of(
        (9, 33),
        experts=("F32",) * 3,
        density=(0.5, 0.5, 1.0),
        epsilon=(0.0, 0.2, 0.0),
    )
    assert row_view(recipe).ranked
    assert_like_reference(backend, recipe, *family(recipe, seed=4))


def test_a_random_number_equal_to_the_probability_drops(backend: Backend) -> None:
    """Keep iff u < p, strictly: a density that is one of the random numbers shows it."""
    name = "w"
    u = uniforms(42, name, 0, 97)
    for i in (0, 6, 41):
        recipe = recipe_of((97,), base=None, drop="random", density=float(u[i]), name=name)
        raw = np.ones(97, "<f4").view(np.uint8)
        assert_like_reference(backend, recipe, None, [raw])
        kept = stream(backend, recipe, None, [raw])[0].view("<f4") != 0
        assert kept.tolist() == [float(x) < float(u[i]) for x in u]


def test_the_order_of_the_probability_arithmetic(backend: Backend) -> None:
    """A window for which another order of the float64 operations gives another float32."""
    density, epsilon, rank = 0.31355322897434235, 0.31257666647434235, 7
    p = np.float32((density - epsilon) + (2.0 * epsilon) * (rank / 10))
    assert p != np.float32((density - epsilon) + (2.0 * epsilon * rank) / 10)
    assert p != np.float32((density - epsilon) + (2.0 * epsilon / 10) * rank)
    recipe = recipe_of(
        (64, 11), base=None, density=density, epsilon=epsilon, elect=False, normalize=False
    )
    raw = np.tile(np.arange(1, 12, dtype="<f4"), 64).view(np.uint8)
    assert_like_reference(backend, recipe, None, [raw])
    pruned = stream(backend, recipe, None, [raw])[0].view("<f4").reshape(64, 11)[:, rank]
    assert np.unique(pruned).tolist() == [0, float(np.float32(rank + 1) / p)]


def test_weights_that_cancel(backend: Backend) -> None:
    """Weights that add up to nothing divide by nothing, guarded or nearly so."""
    for last in (-1.0, -1.0 + 2**-21, -1.0 + 2**-18, 0.0):
        for weights in ((1.0, last), (0.0, 0.0), (-0.0, last)):
            recipe = recipe_of(
                (4, 40), experts=("F32", "F32"), drop="none", elect=False, weights=weights
            )
            assert_like_reference(backend, recipe, *family(recipe, seed=6))


@pytest.mark.parametrize(
    ("shape", "changes"),
    [
        ((300, 777), {}),
        ((300, 777), {"drop": "magnitude", "rescale": "none"}),
        ((300, 777), {"drop": "outliers", "rescale": "l1", "gammas": (0.01, 0.3)}),
        ((3, 70_001), {"rescale": "l1"}),
        ((200_003,), {"granularity": "tensor"}),
        ((200_003,), {"drop": "random", "rescale": "l1"}),
        ((150_000, 1), {}),
    ],
    ids=str,
)
def test_blocks_do_not_show(
    backend: Backend, shape: tuple[int, ...], changes: dict[str, Any]
) -> None:
    """Blocks of any size, in any order, give the same bytes and the very same statistics."""
    recipe = recipe_of(
        shape, base="BF16", experts=("BF16", "F32"), out="BF16", density=0.37, **changes
    )
    base, experts = family(recipe, seed=7)
    expected = assert_like_reference(backend, recipe, base, experts)
    whole, _ = merge_reference(recipe, base, experts)
    unit = row_view(recipe).unit
    seen = set()
    for shuffle, block_elements in enumerate((1, 2 * unit, 3 * unit)):
        out, blocks = stream(
            backend, recipe, base, experts, block_elements=block_elements, shuffle=shuffle
        )
        seen.add(len(blocks))
        assert np.array_equal(out, whole)
        assert combine_stats(recipe, blocks) == expected
    assert len(seen) > 1 or recipe.settings.granularity == "tensor" or shape[-1] > 65_536


@pytest.mark.parametrize("dtype", ["BF16", "F32", "F64"])
@pytest.mark.parametrize(
    ("shape", "drop"),
    [
        *(((cols, rows), "magprune") for cols, rows in ((300, 777), (2, 70_001), (20_000, 7))),
        *(((n,), drop) for n in (1, 15, 17, 1023, 1025, 65_537, 140_001) for drop in DROPS),
    ],
    ids=str,
)
def test_norms_are_added_up_alike(
    backend: Backend, shape: tuple[int, ...], drop: str, dtype: str
) -> None:
    """Squares of all sizes, so that any other order of the additions would show."""
    rng = np.random.default_rng(8)
    recipe = recipe_of(shape, base=dtype, experts=(dtype,) * 2, out=dtype, drop=drop)
    n = int(np.prod(shape))
    base = np.zeros(n)
    experts = [to_raw(rng.normal(0, 1, n) * 2.0 ** rng.integers(-20, 9, n), dtype) for _ in "ab"]
    stats = assert_like_reference(backend, recipe, to_raw(base, dtype), experts)
    for raw, expert in zip(experts, stats.experts, strict=True):
        exact = math.sqrt(math.fsum(x * x for x in from_raw(raw, dtype).tolist()))
        assert expert.delta_l2 == pytest.approx(exact, rel=1e-12, abs=0)


def bits_of(dtype: str) -> st.SearchStrategy[int]:
    """Any bit pattern, and often a special one."""
    width = DTYPE_BITS[dtype]
    mantissa = {"F16": 10, "BF16": 7, "F32": 23, "F64": 52}[dtype]
    infinity = ((1 << (width - 1 - mantissa)) - 1) << mantissa
    one = (infinity >> 1) & ~((1 << mantissa) - 1)
    sign = 1 << (width - 1)
    positive = (
        *(0, 1, 2, (1 << mantissa) - 1, 1 << mantissa, one, one + 1, one + (1 << mantissa)),
        *(infinity - 1, infinity, infinity + 1, infinity | (1 << (mantissa - 1)), sign - 1),
    )
    special = st.sampled_from([b | s for b in positive for s in (0, sign)])
    near_one = st.integers(one - 40, one + 40)
    return special | near_one | st.integers(0, (1 << width) - 1)


@st.composite
def merges(draw: st.DrawFn) -> tuple[TensorRecipe, bytes | None, list[bytes]]:
    """A small merge of arbitrary bits."""
    cols, rows = draw(st.integers(1, 9)), draw(st.integers(1, 3))
    m = draw(st.integers(1, 3))
    base = draw(st.sampled_from([None, *DTYPES]))
    experts = draw(st.tuples(*[st.sampled_from(DTYPES)] * m))
    number = st.sampled_from([1.0, 0.5, -0.5, 0.1, -1.0, 2.0, 0.0, 1e-30, 3e38])
    recipe = recipe_of(
        (rows, cols),
        base=base,
        experts=experts,
        out=draw(st.sampled_from(DTYPES)),
        density=draw(st.tuples(*[st.sampled_from([0.2, 0.5, 0.7, 1.0])] * m)),
        weights=draw(st.tuples(*[number] * m)),
        gammas=draw(st.tuples(*[st.sampled_from([0.0, 0.1, 0.4, 0.99])] * m)),
        drop=draw(st.sampled_from(DROPS)),
        elect=draw(st.booleans()),
        rescale=draw(st.sampled_from(RESCALES)),
        normalize=draw(st.booleans()),
        lambda_=draw(number),
        granularity=draw(st.sampled_from(["row", "tensor"])),
        seed=draw(st.integers(0, 2**64 - 1)),
        stage=draw(st.sampled_from([0, 1, 2, 2**32 - 1])),
        is_delta=draw(st.tuples(*[st.booleans()] * m)),
    )

    return recipe, *draw(data_for(recipe))


@st.composite
def data_for(draw: st.DrawFn, recipe: TensorRecipe) -> tuple[bytes | None, list[bytes]]:
    """Arbitrary bits for a recipe."""
    n = math.prod(recipe.shape)

    def data(dtype: str) -> bytes:
        patterns = draw(st.lists(bits_of(dtype), min_size=n, max_size=n))
        return b"".join(p.to_bytes(DTYPE_BITS[dtype] // 8, "little") for p in patterns)

    base = recipe.base_dtype
    return None if base is None else data(base), [data(d) for d in recipe.expert_dtypes]


@st.composite
def merges_with_angles(draw: st.DrawFn) -> tuple[TensorRecipe, bytes | None, list[bytes]]:
    """A small merge of arbitrary bits, whose weights follow from angles."""
    rule, by_row = draw(st.sampled_from(RULES))
    # Directions of three may cancel, which `multislerp` refuses.
    m = 2 if rule in (*TWO, "multislerp") else draw(st.integers(2, 4))
    recipe = angles_recipe(
        (draw(st.integers(1, 3)), draw(st.integers(1, 9))),
        rule,
        by_row=by_row,
        base=draw(st.sampled_from([None, *DTYPES])),
        experts=draw(st.tuples(*[st.sampled_from(DTYPES)] * m)),
        out=draw(st.sampled_from(DTYPES)),
        weights=draw(st.tuples(*[st.sampled_from([0.7, 0.5, -0.1, 1.0, 0.0])] * m)),
    )
    return recipe, *draw(data_for(recipe))


@st.composite
def merges_by_scores(draw: st.DrawFn) -> tuple[TensorRecipe, bytes | None, list[bytes]]:
    """A small merge of arbitrary bits, where scores tell what is kept, or deltas are cut."""
    drop, m = draw(st.sampled_from((*SCORED, ("none", 2), ("threshold", 3))))
    m = m if m < 2 else draw(st.integers(1, 3))
    how: dict[str, Any] = {}
    if drop == "variance":
        how = {**BY_ENERGY, "density": draw(st.sampled_from([0.1, 0.5, 1.0]))}
    if drop == "threshold":
        least = draw(st.sampled_from([0.0, 1e-60, 1e-5, 1.0, 3e38]))
        how = {"least": least, "overlap": draw(st.sampled_from(OVERLAPS))}
    limit = draw(st.sampled_from([2.0**-149, 1e-9, 0.5, 3.0, 3e38]))
    recipe = scored_recipe(
        (draw(st.integers(1, 3)), draw(st.integers(1, 9))),
        drop,
        base=draw(st.sampled_from([None, *DTYPES])),
        experts=draw(st.tuples(*[st.sampled_from(DTYPES)] * m)),
        out=draw(st.sampled_from(DTYPES)),
        is_delta=draw(st.tuples(*[st.booleans()] * m)),
        limit=limit if drop == "none" else None,
        **how,
    )
    return recipe, *draw(data_for(recipe))


@settings(
    max_examples=250,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(merge=st.one_of(merges(), merges_with_angles(), merges_by_scores()))
def test_any_bits(backend: Backend, merge: tuple[TensorRecipe, bytes | None, list[bytes]]) -> None:
    """-0.0, subnormals, the largest numbers, infinities and NaNs: the same bytes."""
    recipe, base, experts = merge
    assert_like_reference(
        backend,
        recipe,
        None if base is None else np.frombuffer(base, np.uint8),
        [np.frombuffer(e, np.uint8) for e in experts],
    )
