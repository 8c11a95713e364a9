"""Peak memory of merging a matrix as a whole, as a number known before the run.

One worker at a time does it, in steps of rows, while others look at elements::

    what is held of the matrix + what is read once
        + steps in flight * (the inputs, the deltas, what is made of them) + threads * scratch
        + the blocks of all workers
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from della_dist.planning.memory import MemoryBudget, element_bytes
from della_dist.specs.balancing import Balancing, balancing
from della_dist.specs.dtypes import num_elements
from della_dist.specs.passes import gathered_bytes
from della_dist.specs.reading import gathered, piece_bytes
from della_dist.specs.recipe import TensorRecipe, of_deltas
from della_dist.specs.rows import row_view
from della_dist.specs.sources import Balanced

#: Elements of a block, about.
BLOCK_ELEMENTS = 1 << 18
#: Elements of a step, at most: so many rows that their product takes longer than adding it up.
MAX_STEP_ELEMENTS = 1 << 22
#: What BLAS copies pieces of matrices to, measured, of a thread.
BLAS_BYTES = 3 << 20
#: Rows of a step, at least.
MIN_STEP_ROWS = 16


@dataclass(frozen=True, slots=True)
class BalanceSize:
    """How a tensor that is merged as a whole is cut, and what that needs."""

    how: Balancing
    block_elements: int
    """Of the passes that look at elements alone."""
    step_rows: int
    out_rows: int
    """Of a block of the output."""
    steps_in_flight: int
    projected_mem: int


def balance_size(
    source: Balanced, scratch_bytes: Callable[[TensorRecipe, int], int], budget: MemoryBudget
) -> BalanceSize:
    """Return how a tensor is merged as a whole; never less than one small step at a time.

    Parameters
    ----------
    source
        The tensor.
    scratch_bytes
        Bytes that a kernel needs for a block of so many elements.
    budget
        What the run may use.
    """
    recipe = source.of.recipe
    deltas = of_deltas(recipe)
    how = balancing(recipe, is_turned=source.is_turned)
    an_element, once = gathered(source)
    an_element += element_bytes(recipe) + element_bytes(deltas)
    pieces = piece_bytes(source)
    unit = row_view(recipe).unit
    block = min(unit * max(1, BLOCK_ELEMENTS // unit), num_elements(recipe.shape))
    blocks = budget.workers * budget.blocks_in_flight * block * an_element
    blocks += budget.threads * (scratch_bytes(deltas, block) + pieces)
    held = how.held_bytes(budget.threads) + once + blocks + budget.threads * BLAS_BYTES
    held += budget.workers * gathered_bytes(recipe)

    def projected(rows: int, steps: int) -> int:
        elements = rows * how.cols
        step = elements * (an_element + how.step_element_bytes)
        return held + steps * (step + scratch_bytes(deltas, elements) + pieces)

    steps = budget.threads + 1
    rows = max(1, min(how.rows, MAX_STEP_ELEMENTS // how.cols))
    while rows > MIN_STEP_ROWS and projected(rows, steps) > budget.block_mem:
        rows = rows * 3 // 4
    while steps > 1 and projected(rows, steps) > budget.block_mem:
        steps -= 1
    # As many blocks of the output may be in flight as of any tensor.
    out_rows = max(1, rows * steps // budget.blocks_in_flight)
    return BalanceSize(how, block, rows, out_rows, steps, projected(rows, steps))
