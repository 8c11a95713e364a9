"""How tensors are cut."""

from __future__ import annotations

import pytest

from della_dist.ops.tensor import block_spans
from della_dist.specs.rows import MAX_WHOLE_COLS, UNIT_ELEMENTS, row_shape, row_view
from tests.tensors import angles_recipe, recipe_of

SHAPES = [(3000, 100), (1000, 5120), (64, 896), (70, 65_537), (1, 99_999), (300_000, 1), (5, 7, 11)]


@pytest.mark.parametrize("drop", ["magprune", "random", "magnitude", "none"])
@pytest.mark.parametrize("shape", [*SHAPES, (4, 3, 200, 200), (200_000,), (9,), ()])
def test_no_row_is_cut(shape: tuple[int, ...], drop: str) -> None:
    recipe = recipe_of(shape, drop=drop)
    view = row_view(recipe)
    assert view.num_cols == row_shape(shape)[1]
    spans = list(block_spans(recipe, 1))
    assert [start for start, _ in spans] == [0, *(stop for _, stop in spans[:-1])]
    for start, stop in spans:
        assert start % view.num_cols == 0 == stop % view.num_cols
        assert stop == view.num_elements or UNIT_ELEMENTS <= stop - start == view.unit


def test_all_rows_are_ranked_whole_and_the_longest_cut_otherwise() -> None:
    shape = (3, MAX_WHOLE_COLS + 1)
    assert row_view(recipe_of(shape, drop="random")).unit == UNIT_ELEMENTS
    assert row_view(recipe_of(shape, drop="magprune")).unit == shape[1]
    whole = recipe_of(shape, drop="magprune", granularity="tensor")
    assert row_view(whole).unit == 3 * shape[1]
    assert row_view(recipe_of((3, MAX_WHOLE_COLS), drop="random")).unit == MAX_WHOLE_COLS


@pytest.mark.parametrize("shape", [*SHAPES, (4, 3, 200, 200), (3, MAX_WHOLE_COLS + 1), (9,), ()])
def test_rows_with_angles_are_the_last_axis_and_never_cut(shape: tuple[int, ...]) -> None:
    view = row_view(angles_recipe(shape, "model_stock", by_row=True))
    assert view.num_cols == (shape[-1] if shape else 1)
    assert view.unit % view.num_cols == 0
    assert not view.ranked


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (2, 0, 3)])
def test_nothing_is_no_block(shape: tuple[int, ...]) -> None:
    assert not list(block_spans(recipe_of(shape), 1))
