"""Peak memory is a number known before the run."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from della_dist.planning.memory import (
    MAX_BLOCK_ELEMENTS,
    BlockSize,
    MemoryBudget,
    block_size,
    copy_block,
    element_bytes,
)
from della_dist.specs.dtypes import FLOAT_DTYPES
from della_dist.specs.recipe import MergeSettings, TensorRecipe

MIB = 1 << 20


def recipe(
    shape: tuple[int, ...],
    base: str | None = "BF16",
    experts: tuple[str, ...] = ("BF16",),
    out: str = "BF16",
) -> TensorRecipe:
    settings = MergeSettings(
        weights=(1.0,) * len(experts),
        densities=(0.5,) * len(experts),
        epsilons=(0.1,) * len(experts),
    )
    return TensorRecipe("x", shape, base, experts, out, settings)


def no_scratch(recipe: TensorRecipe, elements: int) -> int:
    return 0


def test_bytes_an_element() -> None:
    assert element_bytes(recipe((1,))) == 6
    assert element_bytes(recipe((1,), base=None)) == 4
    assert element_bytes(recipe((1,), "F32", ("BF16", "F64"), "F16")) == 4 + 2 + 8 + 2


def test_blocks_in_flight() -> None:
    assert MemoryBudget(MIB, workers=3, threads=5).blocks_in_flight == 7


def test_formula() -> None:
    def scratch(recipe: TensorRecipe, elements: int) -> int:
        return 10 * elements + 7

    budget = MemoryBudget(1 << 40, workers=2, threads=3)
    size = block_size(recipe((50, 100)), 1000, scratch, budget)
    assert size == BlockSize(5000, 2 * (3 + 2) * 5000 * 6 + 3 * (10 * 5000 + 7))


def test_one_block_where_the_tensor_is_small() -> None:
    budget = MemoryBudget(1 << 40, 1, 1)
    # The last unit is not full, which the projection knows.
    assert block_size(recipe((10,)), 4, no_scratch, budget) == BlockSize(12, 3 * 10 * 6)


def test_blocks_are_not_larger_than_useful() -> None:
    budget = MemoryBudget(1 << 50, 1, 1)
    size = block_size(recipe((1 << 30,)), 65_536, no_scratch, budget)
    assert size.elements == MAX_BLOCK_ELEMENTS


def test_one_unit_may_exceed_the_budget() -> None:
    budget = MemoryBudget(MIB, 1, 1)
    size = block_size(recipe((4 * MIB,)), 4 * MIB, no_scratch, budget)
    assert size == BlockSize(4 * MIB, 3 * 4 * MIB * 6)
    assert size.projected_mem > budget.allowed_mem


def test_empty_tensor() -> None:
    size = block_size(recipe((0, 5)), 65_536, no_scratch, MemoryBudget(MIB, 1, 1))
    assert size == BlockSize(65_536, 0)


@pytest.mark.parametrize("allowed", [32 * MIB, 256 * MIB, 1024 * MIB])
def test_memory_does_not_grow_with_the_model(allowed: int) -> None:
    budget = MemoryBudget(allowed, 2, 8)
    sizes = {
        block_size(recipe((rows, 8192), experts=("BF16",) * 8), 65_536, no_scratch, budget)
        for rows in (10**5, 10**6, 10**9)
    }
    assert len(sizes) == 1
    assert sizes.pop().projected_mem <= allowed


DTYPES = st.sampled_from(sorted(FLOAT_DTYPES))


@st.composite
def problems(draw: st.DrawFn) -> tuple[TensorRecipe, int, MemoryBudget, int, int]:
    shape = tuple(draw(st.lists(st.integers(0, 3000), max_size=3)))
    experts = tuple(draw(st.lists(DTYPES, min_size=1, max_size=9)))
    of = recipe(shape, draw(st.none() | DTYPES), experts, draw(DTYPES))
    unit = draw(st.integers(1, 1 << 22))
    budget = MemoryBudget(
        draw(st.integers(1, 1 << 32)), draw(st.integers(1, 8)), draw(st.integers(1, 64))
    )
    return of, unit, budget, draw(st.integers(0, 100)), draw(st.integers(0, MIB))


@given(problems())
def test_block_size(problem: tuple[TensorRecipe, int, MemoryBudget, int, int]) -> None:
    of, unit, budget, per_element, constant = problem

    def scratch(recipe: TensorRecipe, elements: int) -> int:
        assert recipe is of
        return per_element * elements + constant

    def projected(units: int) -> int:
        elements = min(units * unit, math.prod(of.shape))
        blocks = budget.workers * (budget.threads + 2) * elements * element_bytes(of)
        return blocks + budget.threads * scratch(of, elements)

    size = block_size(of, unit, scratch, budget)
    units, rest = divmod(size.elements, unit)
    assert rest == 0
    assert units >= 1
    assert units == 1 or size.elements <= MAX_BLOCK_ELEMENTS
    assert units == 1 or (units - 1) * unit < math.prod(of.shape)
    assert size.projected_mem == projected(units)
    assert units == 1 or size.projected_mem <= budget.allowed_mem
    # And no smaller than it must be: what is a third larger is too large, or useless.
    more = units * 4 // 3 + 1
    assert (
        projected(more) > budget.allowed_mem
        or more * unit > MAX_BLOCK_ELEMENTS
        or more * unit >= math.prod(of.shape)
    )


@given(st.integers(1, 9), st.integers(0, 1 << 40), st.integers(1, 16), st.integers(1, 64))
def test_copy_block(sources: int, size_bytes: int, workers: int, threads: int) -> None:
    budget = MemoryBudget(32 * MIB, workers, threads)
    size = copy_block(sources, size_bytes, budget)
    assert size.elements % 65_536 == 0
    assert 65_536 <= size.elements <= 4 * MIB
    held = workers * (threads + 2) * (sources + 1)
    assert size.projected_mem == held * min(size.elements, size_bytes)
    assert size.elements == 65_536 or size.projected_mem <= budget.allowed_mem
