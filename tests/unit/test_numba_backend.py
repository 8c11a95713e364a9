"""The Numba backend: every way it ranks, bytes at odd addresses, threads.

What it shares with the other backends is in ``tests/property/test_backends_equal.py``.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from della_dist.ops.blocks import Block, U8Array
from della_dist.ops.cpu.arguments import Scratch
from della_dist.ops.cpu.backend import NumbaBackend
from della_dist.ops.cpu.rank import SMALL_COLS, TABLE_COLS
from della_dist.ops.cpu.scratch import scratch_layout
from della_dist.ops.cpu.slots import NUM_SLOTS
from della_dist.ops.prepare import Ready, prepare
from della_dist.ops.reference import merge_whole
from della_dist.specs.dtypes import DTYPE_BITS
from della_dist.specs.recipe import TensorRecipe
from della_dist.specs.rows import row_view
from tests.tensors import DTYPES, assert_like_reference, awkward, recipe_of, to_raw

BACKEND = NumbaBackend()


def check(
    recipe: TensorRecipe, base: npt.ArrayLike, *deltas: npt.ArrayLike, **options: Any
) -> None:
    """Compare with the reference: numbers of the base, and what each expert adds."""
    base = np.asarray(base, np.float64)
    assert recipe.base_dtype is not None
    experts = [
        to_raw(base + np.asarray(delta), dtype)
        for delta, dtype in zip(deltas, recipe.expert_dtypes, strict=True)
    ]
    assert_like_reference(BACKEND, recipe, to_raw(base, recipe.base_dtype), experts, **options)


def fine_tuned(shape: tuple[int, ...], seed: int = 0) -> tuple[npt.NDArray[Any], ...]:
    """Return a base and three deltas like those of fine-tuned models."""
    rng = np.random.default_rng(seed)
    base = rng.normal(0, 0.02, shape)
    return base, *(rng.standard_t(4, shape) * scale for scale in (2e-4, 5e-4, 1e-3))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "cols", [2, 15, SMALL_COLS, SMALL_COLS + 1, 64, 100, 777, 1024, 4096, 5003]
)
def test_row_lengths(cols: int, dtype: str) -> None:
    recipe = recipe_of((3 + 300 // cols, cols), base=dtype, experts=(dtype,) * 3, out=dtype)
    check(recipe, *fine_tuned(recipe.shape), block_elements=1)


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
@pytest.mark.parametrize("cols", [TABLE_COLS, TABLE_COLS + 1, 65_535, 65_536, 131_071])
def test_long_rows(cols: int, dtype: str) -> None:
    """Beyond the tables of probabilities, and beyond 16-bit counters."""
    recipe = recipe_of((2, cols), base=dtype, experts=(dtype,) * 3, out=dtype)
    check(recipe, *fine_tuned(recipe.shape), block_elements=1)


def rows_of_magnitudes() -> list[npt.NDArray[np.float32]]:
    """Return rows, each of which ranking sees differently."""
    rng = np.random.default_rng(1)
    n = 1000
    bits = np.zeros((12, n), np.uint32)
    bits[1] = 0x3F800000  # all equal
    bits[2, 17] = 1  # one subnormal among zeros
    bits[3] = np.arange(n) + 1  # as many values as elements, all subnormal
    bits[4] = rng.choice([1, 0x7F7FFFFF], n)  # the whole range of float32
    bits[5] = rng.integers(0, 0x7F800000, n)  # random bits: a radix sort
    # Slots with lower bits: 4 % of the elements, several to a slot, with ties.
    bits[6] = rng.integers(0x3000, 0x4000, n) << 16
    bits[6, ::25] |= rng.choice([1, 0x8000, 0x8001, 0xFFFF], n // 25).astype(np.uint32)
    bits[6, 1::25] = 0
    bits[7] = 0x38000000 + rng.integers(0, 3, n) * 0x100000
    bits[7, ::9] += rng.integers(0, 5, n // 9 + 1).astype(np.uint32)  # half a slot's worth
    # Exactly as many values as there are slots, and one more.
    slots = np.uint32(8192 - 16)
    bits[8] = 0x30000000 + rng.integers(0, slots, n)
    bits[8, :2] = 0x30000000, 0x30000000 + slots - 1
    bits[9] = bits[8]
    bits[9, 1] += 1
    bits[10] = rng.integers(1, 4, n) << 23  # powers of two next to the subnormals
    bits[11, :7] = 0x3F800000  # mostly zeros
    assert slots + 16 <= NUM_SLOTS
    sign = np.where(rng.random(bits.shape) < 0.5, np.uint32(0x80000000), np.uint32(0))
    return list((bits | sign).view(np.float32))


@pytest.mark.parametrize("row", range(12))
def test_magnitudes(row: int) -> None:
    """A base of zeros, so that the expert is the delta."""
    delta = rows_of_magnitudes()[row]
    recipe = recipe_of((1, delta.size), experts=("F32",), density=0.6, epsilon=0.35)
    assert_like_reference(
        BACKEND, recipe, to_raw(np.zeros(delta.size), "F32"), [delta.view(np.uint8)]
    )


def magnitudes_in_groups(
    dtype: str, n: int, groups: int, lower_bits: int, order: str, seed: int
) -> npt.NDArray[Any]:
    """Return deltas whose magnitudes agree in all but some lower bits with those of their group."""
    rng = np.random.default_rng(seed)
    number, key, mantissa = {
        "F32": (np.float32, np.uint32, 23),
        "F64": (np.float64, np.uint64, 52),
    }[dtype]
    upper = rng.integers(0, groups, n).astype(key) << key(mantissa - 3)
    bits = upper + rng.integers(0, 1 << lower_bits, n).astype(key)  # zeros and subnormals, too
    if order == "ascending":
        bits.sort()
    elif order == "descending":
        bits[::-1].sort()
    values: npt.NDArray[Any] = bits.view(number)
    return np.where(rng.random(n) < 0.5, -values, values)


def check_row(dtype: str, delta: npt.NDArray[Any]) -> None:
    recipe = recipe_of((1, delta.size), base=dtype, experts=(dtype,), density=0.6, epsilon=0.35)
    zeros = to_raw(np.zeros(delta.size), dtype)
    assert_like_reference(BACKEND, recipe, zeros, [delta.view(np.uint8)])


@pytest.mark.parametrize("dtype", ["F32", "F64"])
@given(
    n=st.integers(1, 3000),
    groups=st.integers(1, 800),
    lower_bits=st.integers(0, 20),
    order=st.sampled_from(["random", "ascending", "descending"]),
    seed=st.integers(0, 99),
)
@settings(deadline=None)
def test_any_row(dtype: str, n: int, groups: int, lower_bits: int, order: str, seed: int) -> None:
    """From rows that two digits sort to rows in which they tell nothing apart."""
    check_row(dtype, magnitudes_in_groups(dtype, n, groups, lower_bits, order, seed))


@pytest.mark.parametrize("dtype", ["F32", "F64"])
@pytest.mark.parametrize("n", [SMALL_COLS + 1, 300, 5000, 20_000, 65_536, 65_537])
@pytest.mark.parametrize("of_group", [0, 1, 2, 40])
def test_rows_in_part_of_one_group(n: int, of_group: int, dtype: str) -> None:
    """Sorted by their upper bits, if few are in the group; by all of them, if many are."""
    delta = np.random.default_rng(n).normal(0, 1e-3, n).astype(f"f{DTYPE_BITS[dtype] // 8}")
    step = np.finfo(delta.dtype).eps
    count = n * of_group // 100
    delta[:count] = 1 + np.arange(count)[::-1] // 2 * step
    check_row(dtype, delta)


def test_counters_are_left_clean() -> None:
    """Rows of every kind after one another, in the same scratch."""
    delta = np.concatenate([*rows_of_magnitudes(), *rows_of_magnitudes()[::-1]])
    recipe = recipe_of((24, 1000), experts=("F32",), density=0.6, epsilon=0.35)
    assert_like_reference(
        BACKEND, recipe, to_raw(np.zeros(delta.size), "F32"), [delta.view(np.uint8)]
    )


def arrays_of(scratch: Scratch) -> dict[str, npt.NDArray[Any]]:
    ranks = scratch.ranks
    return {**scratch.work._asdict(), **ranks.slots._asdict(), **ranks.sort._asdict()}


def ready(recipe: TensorRecipe) -> Ready:
    prepared = prepare(recipe)
    assert isinstance(prepared, Ready)
    return prepared


def test_scratch_may_be_dirty() -> None:
    """All but the counters, which are zero at the start and are left so."""
    recipe = recipe_of((3, 1000), base="BF16", experts=("BF16",) * 3, out="BF16")
    layout = scratch_layout(recipe, row_view(recipe))
    backend = NumbaBackend()
    scratch = arrays_of(backend._scratch(layout))
    for name, array in scratch.items():
        if not name.startswith("counts"):
            array.view(np.uint8)[...] = 0xFF
    base, *deltas = fine_tuned(recipe.shape)
    experts = [to_raw(base + delta * 4, "BF16") for delta in deltas]
    assert_like_reference(backend, recipe, to_raw(base, "BF16"), experts)
    assert not scratch["counts16"].any()
    assert not scratch["counts32"].any()


@pytest.mark.parametrize("cols", [65_535, 65_536])
def test_a_row_of_equals_fills_one_counter(cols: int) -> None:
    recipe = recipe_of((1, cols), experts=("F32",), density=0.6, epsilon=0.35)
    check(recipe, np.zeros(cols), np.full(cols, 0.25))


def test_mixed_epsilons() -> None:
    recipe = recipe_of(
        (5, 300),
        base="BF16",
        experts=("BF16",) * 3,
        out="BF16",
        density=(0.4, 1.0, 0.7),
        epsilon=(0.1, 0.0, 0.0),
        weights=(1.0, 0.5, -0.25),
    )
    check(recipe, *fine_tuned(recipe.shape))


@pytest.mark.parametrize("out", DTYPES)
def test_odd_addresses(out: str) -> None:
    recipe = recipe_of((3, 1500), base="F64", experts=("F32", "F16", "BF16"), out=out)
    base, *deltas = fine_tuned(recipe.shape)
    experts = [
        awkward(to_raw(base + delta, dtype))
        for delta, dtype in zip(deltas, recipe.expert_dtypes, strict=True)
    ]
    raw_base = awkward(to_raw(base, "F64"))
    expected, _stats = merge_whole(recipe, raw_base, experts)
    buffer = np.full(expected.size + 3, 0xA5, np.uint8)
    target = buffer[1:-2]
    BACKEND.merge(recipe, ready(recipe), Block(0, base.size, raw_base, tuple(experts)), target)
    assert np.array_equal(target, expected)
    assert buffer[0] == buffer[-2] == buffer[-1] == 0xA5


def test_sums_of_squares_do_not_depend_on_the_blocks() -> None:
    recipe = recipe_of((700, 300), base="BF16", experts=("BF16",) * 3, out="BF16")
    base, *deltas = fine_tuned(recipe.shape)
    raw = [to_raw(base, "BF16"), *(to_raw(base + d, "BF16") for d in deltas)]
    unit = row_view(recipe).unit

    def sums(block_elements: int) -> list[list[float]]:
        rows: list[list[float]] = []
        for start in range(0, base.size, block_elements):
            stop = min(start + block_elements, base.size)
            pieces = [r[2 * start : 2 * stop] for r in raw]
            block = Block(start, stop, pieces[0], tuple(pieces[1:]))
            out = np.empty_like(pieces[0])
            rows += BACKEND.merge(recipe, ready(recipe), block, out).sum_sq.tolist()
        return rows

    assert sums(unit) == sums(2 * unit) == sums(100 * unit)


def test_threads_share_a_backend() -> None:
    """Different tensors at once, in scratch of different shapes."""
    backend = NumbaBackend()
    jobs: list[tuple[TensorRecipe, U8Array, list[U8Array], U8Array]] = []
    for i, (shape, dtype) in enumerate(
        [((64, 1024), "BF16"), ((9, 4000), "F16"), ((70_001,), "BF16"), ((40, 700), "F32")]
    ):
        recipe = recipe_of(shape, base=dtype, experts=(dtype,) * 3, out=dtype, name=f"t{i}")
        base, *deltas = fine_tuned(shape, seed=i)
        raw, experts = to_raw(base, dtype), [to_raw(base + d, dtype) for d in deltas]
        jobs.append((recipe, raw, experts, merge_whole(recipe, raw, experts)[0]))
    wrong: list[str] = []

    def work(offset: int) -> None:
        for turn in range(8):
            recipe, base, experts, expected = jobs[(turn + offset) % len(jobs)]
            out = np.empty_like(expected)
            n = out.size * 8 // DTYPE_BITS[recipe.out_dtype]
            backend.merge(recipe, ready(recipe), Block(0, n, base, tuple(experts)), out)
            if not np.array_equal(out, expected):
                wrong.append(recipe.name)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_scratch_is_what_was_said() -> None:
    for shape in ((64, 1024), (2, 100_000), (7,), (), (300, 4)):
        for wide in ("BF16", "F64"):
            recipe = recipe_of(shape, base=wide, experts=("BF16",) * 5)
            layout = scratch_layout(recipe, row_view(recipe))
            arrays = arrays_of(layout.carve(np.zeros(layout.num_bytes(), np.uint8))).values()
            assert sum(a.nbytes for a in arrays) <= BACKEND.scratch_bytes(recipe, 65_536)
            assert all(a.ctypes.data % a.itemsize == 0 for a in arrays)
