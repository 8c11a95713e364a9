"""Peak memory of merging a matrix as a whole, as a number known before the run.

One worker at a time does it, its steps in flight like blocks; every worker may hold a merged delta
that it adds to the base, block by block::

    what is held of the matrix + what is read once + workers * the merged delta
        + steps in flight * (the inputs, the deltas, what is made of them) + threads * scratch
        + the blocks of the base and of the output
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from della_dist.planning.memory import BlockSize, MemoryBudget, block_size, element_bytes
from della_dist.specs.balancing import Balancing, balancing
from della_dist.specs.dtypes import num_elements
from della_dist.specs.reading import gathered, piece_bytes
from della_dist.specs.recipe import TensorRecipe, of_deltas
from della_dist.specs.rows import row_view
from della_dist.specs.sources import Balanced


@dataclass(frozen=True, slots=True)
class BalanceSize:
    """How a tensor that is merged as a whole is cut, and what that needs."""

    how: Balancing
    blocks: BlockSize
    """Of the passes that look at elements alone."""
    steps_in_flight: int
    projected_mem: int


def balance_size(
    source: Balanced, scratch_bytes: Callable[[TensorRecipe, int], int], budget: MemoryBudget
) -> BalanceSize:
    """Return how a tensor is merged as a whole; never less than one step at a time.

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
    blocks = block_size(deltas, unit, scratch_bytes, budget, (an_element, once), pieces)
    elements = min(how.step_rows * how.cols, num_elements(recipe.shape))
    step = elements * an_element + how.step_bytes
    scratch = scratch_bytes(deltas, elements) + pieces
    held = how.held_bytes(budget.threads) + once + budget.workers * how.delta_bytes

    def projected(steps: int) -> int:
        return held + steps * step + min(steps, budget.threads) * scratch

    steps = budget.blocks_in_flight
    while steps > 1 and projected(steps) > budget.block_mem:
        steps -= 1
    # While one worker merges a matrix, others look at elements.
    return BalanceSize(how, blocks, steps, projected(steps) + blocks.projected_mem)
