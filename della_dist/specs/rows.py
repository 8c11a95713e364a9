"""How a tensor is seen as rows and cut into units.

A tensor is a sequence of *elements* in row-major order, in rows of `num_cols`. Blocks are whole
*units*, and a unit is whole rows, about 65,536 elements or more of them: what belongs to a row is
never cut in two. It depends on the recipe alone, so that whatever is summed a unit at a time is the
same for every block size. Rows that are not ranked, have no weights of their own, and are longer
than `MAX_WHOLE_COLS`, are cut. Where matrices are merged as a whole, every row is a unit.
"""

from __future__ import annotations

from dataclasses import dataclass

from della_dist.specs.dtypes import num_elements
from della_dist.specs.recipe import TensorRecipe

#: Elements that can be ranked together: ranks and places in a row are 32-bit integers.
MAX_RANKED_ELEMENTS = (1 << 32) - 1

#: Elements of a unit, at least, and of one that is a piece of a row.
UNIT_ELEMENTS = 65_536

#: Rows up to this length are whole even where the method treats every element alone.
MAX_WHOLE_COLS = 1 << 18


@dataclass(frozen=True, slots=True)
class RowView:
    """A tensor as the kernels see it."""

    num_elements: int
    num_cols: int
    """Elements of a row."""
    unit: int
    """Blocks start at multiples of this many elements and stop at one, or at the end."""
    ranked: bool
    """Whether elements are ranked within their row."""


def row_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return (R, C) of a tensor viewed as rows.

    0-D and 1-D: one row. 2-D and 3-D: the last axis is the row. 4-D and up: ``(shape[0], -1)``.
    """
    n = num_elements(shape)
    if len(shape) <= 1:
        return 1, n
    if n == 0:
        return 0, 0
    cols = shape[-1] if len(shape) <= 3 else n // shape[0]
    return n // cols, cols


def row_view(recipe: TensorRecipe) -> RowView:
    """Return the rows and units of `recipe`'s tensor.

    Rows with something of their own, angles or importance, are always the last axis.
    """
    settings = recipe.settings
    n, cols = num_elements(recipe.shape), row_shape(recipe.shape)[1]
    by_row = settings.drop == "importance" or (
        settings.angles is not None and settings.angles.by_row
    )
    if by_row and len(recipe.shape) > 1:
        cols = recipe.shape[-1] if n else 0
    ranked = settings.drop == "magprune" and any(settings.epsilons) and n > 0
    if ranked and settings.granularity == "tensor":
        cols = n
    if settings.balance is not None and n > 0:  # a stack is cut where its matrices end
        return RowView(n, cols, cols, ranked)
    whole = n > 0 and (ranked or by_row or cols <= MAX_WHOLE_COLS)
    unit = cols * -(-UNIT_ELEMENTS // cols) if whole else UNIT_ELEMENTS
    return RowView(n, cols, unit, ranked)
