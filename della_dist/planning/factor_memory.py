"""Peak memory of factoring the delta of a matrix, as a number known before the run.

An adapter is one file, and so one task: whatever the number of workers, one matrix is factored at a
time. Its steps are in flight like blocks, as many of them as the memory allows::

    what is held of the matrix + what is read once
        + steps in flight * (the inputs, the deltas, the delta, and what is made of it)
        + threads * scratch
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from della_dist.planning.memory import MemoryBudget, element_bytes
from della_dist.specs.dtypes import num_elements
from della_dist.specs.factoring import factoring
from della_dist.specs.passes import gathered_bytes
from della_dist.specs.reading import gathered, piece_bytes
from della_dist.specs.recipe import TensorRecipe, of_deltas
from della_dist.specs.sources import Factor

#: Bytes of a factor that are given to the writer at once.
WRITTEN_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class FactorSize:
    """How many steps of a matrix are in flight, and what factoring it needs."""

    steps_in_flight: int
    projected_mem: int


def factor_size(
    factor: Factor, scratch_bytes: Callable[[TensorRecipe, int], int], budget: MemoryBudget
) -> FactorSize:
    """Return how a matrix is factored within a budget; never less than one step at a time.

    Parameters
    ----------
    factor
        One of the two factors.
    scratch_bytes
        Bytes that a kernel needs for a block of so many elements.
    budget
        What the run may use.
    """
    recipe = factor.of.recipe
    an_element, once = gathered(factor)
    written = budget.blocks_in_flight * WRITTEN_BYTES
    if factor.is_sum:
        factors = 4 * factor.rank * sum(recipe.shape)
        return FactorSize(1, once + 3 * factors + written)
    how, deltas = factoring(recipe, factor.rank), of_deltas(recipe)
    elements = min(how.step_elements, num_elements(recipe.shape))
    an_element += element_bytes(recipe) + element_bytes(deltas)
    step = elements * an_element + how.step_bytes
    scratch = scratch_bytes(deltas, elements) + piece_bytes(factor)
    held = how.held_bytes + once + gathered_bytes(recipe) + written

    def projected(steps: int) -> int:
        return held + steps * step + min(steps, budget.threads) * scratch

    steps = budget.blocks_in_flight
    while steps > 1 and projected(steps) > budget.block_mem:
        steps -= 1
    return FactorSize(steps, projected(steps))
