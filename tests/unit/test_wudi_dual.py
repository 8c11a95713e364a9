"""Forms of WUDI that are less than the primal: against float64, the same bytes however cut."""

from __future__ import annotations

import hashlib
import tracemalloc
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from della_dist.ops import exact_products
from della_dist.ops.cpu.triangle import triangle
from della_dist.ops.exact_products import HostProducts, Products
from della_dist.ops.gpu.backend import TorchBackend
from della_dist.ops.grids import F64Array
from della_dist.ops.wudi_dual import WudiDual
from della_dist.ops.wudi_low_rank import Term, low_rank_product
from della_dist.specs.balancing import Balancing, Form, balancing
from della_dist.specs.checkpoint import TensorEntry
from della_dist.specs.ranks import parts_of
from della_dist.specs.recipe import Balance, MergeSettings, TensorRecipe
from della_dist.specs.sources import Adapted, Balanced, LowRank, Merged, Stored
from tests.unit.test_wudi import F32Array, deltas, plainly, solve, whole_numbers


def how(form: Form, shape: tuple[int, int], num_experts: int, stacked: int) -> Balancing:
    return Balancing("wudi", 1, *shape, False, num_experts, 4, form, stacked)


def settings(weights: Sequence[float], ridge: float = 0.05) -> MergeSettings:
    return MergeSettings(weights=tuple(weights), balance=Balance("wudi", ridge), elect=False)


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(3) as pool:
        yield pool


def dual(
    given: Sequence[F32Array],
    weights: Sequence[float],
    pool: ThreadPoolExecutor,
    ridge: float = 0.05,
    step: int = 1 << 20,
    *,
    is_turned: bool = False,
    products: Products | None = None,
) -> F64Array | None:
    """Return what the dual form makes of deltas; `is_turned`: as if they were stored turned."""
    rows, cols = given[0].shape
    largest = [float(np.abs(one).max(initial=0.0)) for one in given]
    made = how("dual", (rows, cols), len(given), len(given) * rows)
    if is_turned:
        made = replace(made, rows=cols, cols=rows, is_turned=True)
        given = [np.ascontiguousarray(one.T) for one in given]
    rule = WudiDual(settings(weights, ridge), made, largest, products or HostProducts())
    starts = range(0, made.rows, step)
    for start in reversed(starts):  # in any order
        rule.hold(start, [one[start : start + step] for one in given])
    product = rule.solve(pool)
    if product is None:
        return None
    parts = [product.rows(start, min(start + step, made.rows)) for start in starts]
    whole = np.concatenate(parts)
    return whole.T if is_turned else whole


@pytest.mark.parametrize(("rows", "cols"), [(1, 4), (3, 17), (30, 200), (48, 160)])
@pytest.mark.parametrize("weights", [(1.0,), (1.0, 1.0, 1.0), (0.5, 2.0, 0.0)])
def test_against_float64_and_the_primal_form(
    rows: int, cols: int, weights: tuple[float, ...], pool: ThreadPoolExecutor
) -> None:
    given = deltas(rows, cols, len(weights))
    for ridge in (0.02, 0.3):
        made, expected = dual(given, weights, pool, ridge), plainly(given, weights, ridge)
        primal = solve(given, weights, ridge)
        assert made is not None
        assert primal is not None
        assert np.linalg.norm(made - expected) <= 1e-4 * np.linalg.norm(expected)
        # The inverse of the primal form has fewer bits.
        assert np.linalg.norm(made - primal) <= 3e-3 * np.linalg.norm(expected)


@pytest.mark.parametrize("is_turned", [False, True])
def test_the_same_bytes_however_it_is_cut(
    is_turned: bool, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, weights = deltas(130, 500, 3), (1.0, 0.3, 1.7)
    whole = dual(given, weights, pool)
    assert whole is not None
    for step, strip in ((1, 128), (7, 1), (128, 50)):
        monkeypatch.setattr(exact_products, "STRIP_ROWS", strip)
        with ThreadPoolExecutor(step) as other:
            cut = dual(given, weights, other, step=step, is_turned=is_turned)
        assert cut is not None
        assert np.array_equal(cut, whole)


def test_experts_that_change_nothing(pool: ThreadPoolExecutor) -> None:
    one, other = deltas(10, 60, 2)
    zero = np.zeros_like(one)
    assert dual([zero, zero], (1.0, 1.0), pool) is None
    assert dual([one, other], (0.0, 0.0), pool) is None
    for given, weights in (([zero, one], (1.0, 1.0)), ([other, one], (0.0, 1.0))):
        made, alone = dual(given, weights, pool), plainly([one], (1.0,), 0.05)
        assert made is not None
        assert np.linalg.norm(made - alone) <= 1e-4 * np.linalg.norm(alone)


@pytest.mark.parametrize("power", [-126, 100])
def test_any_scale(power: int, pool: ThreadPoolExecutor) -> None:
    given = deltas(10, 60, 2)
    made = dual(given, (1.0, 1.0), pool)
    scaled = dual([np.ldexp(one.astype(np.float64), power) for one in given], (1.0, 1.0), pool)
    assert made is not None
    assert scaled is not None
    assert np.array_equal(scaled, np.ldexp(made, power))


#: BLAKE2b of 8 bytes of T, in float64, of `whole_numbers`: rows, columns, experts, ridge.
DUAL_VECTORS = {
    (1, 2, 1, 0.05): "4ea77b66cc11c770",
    (2, 9, 2, 0.05): "75f1650f1d2f90be",
    (40, 130, 3, 0.3): "c69e6ebbaef2f9fe",
}
#: The same of products of rank 2, whose factors are those of `factors`.
LOW_RANK_VECTORS = {(5, 7, 1, 0.05): "c38c7a9b5a86182e", (70, 90, 3, 0.3): "c470f7348527e07a"}


def digest(made: F64Array) -> str:
    return hashlib.blake2b(made.astype("<f8").tobytes(), digest_size=8).hexdigest()


@pytest.mark.parametrize("case", DUAL_VECTORS)
def test_vectors(case: tuple[int, int, int, float], pool: ThreadPoolExecutor) -> None:
    """What any other implementation of the definition must come to."""
    rows, cols, num_experts, ridge = case
    weights = [1 - 0.25 * m for m in range(num_experts)]
    made = dual(whole_numbers(rows, cols, num_experts), weights, pool, ridge)
    assert made is not None
    assert digest(made) == DUAL_VECTORS[case]


@pytest.mark.parametrize("case", LOW_RANK_VECTORS)
def test_vectors_of_low_rank(case: tuple[int, int, int, float], pool: ThreadPoolExecutor) -> None:
    rows, cols, num_experts, ridge = case
    experts = [
        [Term(0, left, right, 0.5)]
        for left, right in zip(
            whole_numbers(rows, 2, num_experts), whole_numbers(2, cols, num_experts), strict=True
        )
    ]
    weights = [1 - 0.25 * m for m in range(num_experts)]
    made = low_rank(experts, (rows, cols), weights, pool, ridge)
    assert made is not None
    assert digest(made) == LOW_RANK_VECTORS[case]


def low_rank(
    experts: Sequence[Sequence[Term]],
    shape: tuple[int, int],
    weights: Sequence[float],
    pool: ThreadPoolExecutor,
    ridge: float = 0.05,
    *,
    is_turned: bool = False,
    products: Products | None = None,
) -> F64Array | None:
    """Return what the form of low rank makes of adapters, as it is stored."""
    rank = sum(len(term.right_kC) for terms in experts for term in terms)
    made = replace(how("low_rank", shape, len(experts), rank), is_turned=is_turned)
    on = products or HostProducts()
    product = low_rank_product(experts, settings(weights, ridge), made, pool, on)
    return None if product is None else product.rows(0, shape[0])


def term(rows: int, cols: int, rank: int, seed: int, first: int = 0, scale: float = 0.1) -> Term:
    random = np.random.default_rng([rows, cols, seed])
    left = random.standard_normal((rows, rank)) * scale
    left *= 2.0 ** -np.arange(rank)  # some directions count much more than others
    right = random.standard_normal((rank, cols))
    return Term(first, left.astype(np.float32), right.astype(np.float32), 1.5)


def formed(terms: Sequence[Term], shape: tuple[int, int]) -> F64Array:
    delta = np.zeros(shape)
    for one in terms:
        product = one.left_rk.astype(np.float64) @ one.right_kC
        delta[one.first : one.first + len(one.left_rk)] += one.scaling * product
    return delta


SHAPE = (150, 120)
EXPERTS = {
    "one": [[term(*SHAPE, 4, 1)]],
    "three": [[term(*SHAPE, k, k)] for k in (8, 1, 3)],
    "several adapters": [
        [term(*SHAPE, 3, 1), term(*SHAPE, 2, 2, scale=1e-4)],
        [term(40, 120, 2, 3, first=10), term(100, 120, 2, 4, first=50)],
        [],
    ],
    "more ranks than rows": [[term(3, 120, 5, 1, first=7)], [term(*SHAPE, 4, 2)]],
}


@pytest.mark.parametrize("case", EXPERTS)
@pytest.mark.parametrize("is_turned", [False, True])
def test_low_rank_against_float64(case: str, is_turned: bool, pool: ThreadPoolExecutor) -> None:
    experts = EXPERTS[case]
    weights = [1.0, 0.5, 2.0][: len(experts)]
    made = low_rank(experts, SHAPE, weights, pool, is_turned=is_turned)
    pairs = [(formed(terms, SHAPE), w) for terms, w in zip(experts, weights, strict=True) if terms]
    given = [delta.T if is_turned else delta for delta, _ in pairs]
    expected = plainly(given, [w for _, w in pairs], 0.05)  # type: ignore[arg-type]
    expected = expected.T if is_turned else expected
    assert made is not None
    assert np.linalg.norm(made - expected) <= 1e-6 * np.linalg.norm(expected)
    with ThreadPoolExecutor(1) as other:
        alone = low_rank(experts, SHAPE, weights, other, is_turned=is_turned)
    assert alone is not None
    assert np.array_equal(alone, made)


def test_low_rank_of_what_cancels_or_is_nothing(pool: ThreadPoolExecutor) -> None:
    """An expert whose adapters cancel counts nothing, and nor does one of zeros."""
    one, other = term(*SHAPE, 4, 1), term(*SHAPE, 3, 2)
    cancelled = [other, replace(other, scaling=-other.scaling)]
    zeros = [Term(0, np.zeros((150, 2), np.float32), one.right_kC[:2], 1.0)]
    alone = plainly([formed([one], SHAPE)], (1.0,), 0.05)  # type: ignore[list-item]
    for nothing in (cancelled, zeros, []):
        assert low_rank([nothing, nothing], SHAPE, (1.0, 1.0), pool) is None
        made = low_rank([nothing, [one]], SHAPE, (1.0, 1.0), pool)
        assert made is not None
        assert np.linalg.norm(made - alone) <= 1e-6 * np.linalg.norm(alone)
    assert low_rank([[one], [other]], SHAPE, (0.0, 0.0), pool) is None


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (40, 7), (7, 12)])
def test_triangle(rows: int, cols: int) -> None:
    given = np.random.default_rng(rows).standard_normal((rows, cols)) * 2.0 ** -np.arange(cols)
    given[:, 2:4] = 0.0
    made = triangle(given.copy())
    assert np.array_equal(made, np.triu(made))
    norms = np.linalg.norm(given, axis=0)
    assert (np.abs(made.T @ made - given.T @ given) <= 1e-14 * np.outer(norms, norms)).all()


def test_no_zero_is_negative(pool: ThreadPoolExecutor) -> None:
    """Of sums of one product, where libraries differ: it would be seen beside a base of -0."""
    left, right = -np.ones((5, 1), np.float32), np.array([[1, 0, 2, 0, 3, 0, 4]], np.float32)
    for products in (HostProducts(), TorchBackend().products("w")):
        made = low_rank([[Term(0, left, right, 1.0)]], (5, 7), (1.0,), pool, products=products)
        assert made is not None
        assert np.array_equal(np.signbit(made), np.broadcast_to(right > 0, made.shape))


@pytest.mark.parametrize("on", ["host", "device"])
@pytest.mark.parametrize("form", ["dual", "low_rank"])
@pytest.mark.parametrize(("shape", "num_experts"), [((600, 700), 1), ((64, 3000), 4)])
def test_what_is_held_is_known(
    form: Form, shape: tuple[int, int], num_experts: int, on: str, pool: ThreadPoolExecutor
) -> None:
    """By what numpy allocates: no more than is said, and not much less.

    On a device a square matrix less, which is where torch allocates.
    """
    products = HostProducts() if on == "host" else TorchBackend().products("w")
    rows = shape[0]
    low_rank([[term(*SHAPE, 4, 1)]], SHAPE, [1.0], pool)  # kernels are loaded
    experts = [[term(*shape, 32 * 4 // num_experts, m)] for m in range(num_experts)]
    given = [formed(terms, shape).astype(np.float32) for terms in experts]
    stacked = rows * num_experts if form == "dual" else 32 * 4
    said = how(form, shape, num_experts, stacked)
    weights = [1.0] * num_experts
    tracemalloc.start()
    try:
        if form == "dual":
            rule = WudiDual(settings(weights), said, [1.0] * num_experts, products)
            for first in range(0, rows, 8):
                rule.hold(first, [one[first : first + 8] for one in given])
            product = rule.solve(pool)
        else:
            product = low_rank_product(experts, settings(weights), said, pool, products)
        assert product is not None
        product.rows(0, 8)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    threads = 3
    scratch = threads * 8 * 512 * 132  # of the products in Numba
    assert 0.4 * said.held_bytes(threads) < peak <= said.held_bytes(threads) + scratch


def entry(shape: tuple[int, ...]) -> TensorEntry:
    return TensorEntry(name="w", shard=0, dtype="F32", shape=shape, start=0, stop=4)


def adapted(ranks: Sequence[int], shape: tuple[int, ...]) -> Adapted:
    groups, rows, cols = (1, *shape) if len(shape) == 2 else shape
    stored = Stored(1, entry((1,)))
    terms = [
        LowRank(stored, stored, 1.0, groups, rows, cols, rank, (0, rank, 1), (0, cols, 1))
        for rank in ranks
    ]
    return Adapted(1, shape, "F32", None, tuple(terms))


def form_of(
    shape: tuple[int, ...],
    experts: Sequence[Adapted | None],
    *,
    is_turned: bool = False,
    **keys: object,
) -> tuple[Form, int]:
    stored = Stored(0, entry(shape))
    recipe = TensorRecipe(
        name="w",
        shape=shape,
        base_dtype="F32",
        expert_dtypes=("F32",) * len(experts),
        out_dtype="F32",
        settings=replace(settings([1.0] * len(experts)), **keys),  # type: ignore[arg-type]
    )
    columns = tuple(stored if one is None else one for one in experts)
    found = balancing(Balanced(Merged(recipe, stored, columns), is_turned))
    return found.form, found.num_stacked


def test_which_form_is_taken() -> None:
    """By the shapes, the number of experts, and the ranks alone: the least."""
    models = [None, None]
    assert form_of((10, 21), models) == ("dual", 20)
    assert form_of((10, 20), models)[0] == "primal"
    assert form_of((21, 10), models, is_turned=True) == ("dual", 20)
    assert form_of((21, 10), models)[0] == "primal"
    assert form_of((5, 10, 21), models) == ("dual", 20)
    for rank, form in ((9, "low_rank"), (10, "dual")):
        assert form_of((10, 21), [adapted([rank], (10, 21))] * 2)[0] == form
    wide = [adapted([4, 2], (50, 21))] * 3
    assert form_of((50, 21), wide) == ("low_rank", 18)
    assert form_of((50, 18), [adapted([4, 2], (50, 18))] * 3)[0] == "primal"
    assert form_of((5, 50, 21), [adapted([4], (5, 50, 21)), adapted([], (5, 50, 21))]) == (
        "low_rank",
        4,
    )
    # Where the delta is not the product, or is changed, it is formed.
    assert form_of((50, 21), [*wide[:2], None])[0] == "primal"
    of_another = replace(wide[0], of=Stored(1, entry((50, 21))))
    assert form_of((50, 21), [*wide[:2], of_another])[0] == "primal"
    assert form_of((50, 21), wide, densities=(1.0, 1.0, 0.5))[0] == "primal"
    assert form_of((50, 21), wide, on_nonfinite="zero")[0] == "primal"


def test_parts_of_a_product() -> None:
    """Rows of a stack that are of another cut than its matrices."""
    (product,) = adapted([2], (2, 5, 9)).terms
    assert isinstance(product, LowRank)
    product = replace(product, first_row=3)
    assert list(parts_of(product, 4)) == [
        (0, 3, 0, slice(0, 1)),
        (1, 0, 0, slice(1, 5)),
        (2, 0, 1, slice(0, 4)),
        (3, 0, 1, slice(4, 5)),
    ]
