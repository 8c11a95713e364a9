"""Peak memory of merging a matrix as a whole, as a number known before the run.

A worker does it in steps of rows, while others look at elements::

    what is held of the matrix + what is read once
        + steps in flight * (the inputs and the output)
        + threads * (the deltas, what is made of them)
    and, whatever else is merged,
        the blocks of all workers + threads * scratch

Of several workers another one merges a matrix at the same time only if the first part of both fits,
and if one thread alone decomposes it while the others would wait.

A device multiplies where its matrices fit into half of what may be used of its memory, the half
that is not for chunks of tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from della_dist.planning.memory import MemoryBudget, element_bytes
from della_dist.specs.balancing import Balancing, balancing
from della_dist.specs.dtypes import num_elements
from della_dist.specs.passes import gathered_bytes
from della_dist.specs.reading import gathered, piece_bytes
from della_dist.specs.recipe import TensorRecipe, joining, of_deltas
from della_dist.specs.rows import row_view
from della_dist.specs.sources import Balanced

#: Elements of a block, about.
BLOCK_ELEMENTS = 1 << 16
#: Elements of a step, at most: so many rows that their product takes longer than adding it up.
MAX_STEP_ELEMENTS = 1 << 22
#: What BLAS copies pieces of matrices to, of a thread: so many bytes, and rows of its width.
BLAS_BYTES = 2 << 20
BLAS_ROWS = 512
#: What cuBLAS takes of a device's memory, of all its queues together.
DEVICE_BLAS_BYTES = 128 << 20
#: Rows of a step, at least.
MIN_STEP_ROWS = 64


@dataclass(frozen=True, slots=True)
class BalanceSize:
    """How a tensor that is merged as a whole is cut, and what that needs."""

    how: Balancing
    block_elements: int
    """Of the passes that look at elements alone."""
    step_rows: int
    turned_rows: int
    """Of a step of a turned matrix, once it is held."""
    together: int
    """Matrices that are decomposed at once, where there are several."""
    steps_in_flight: int
    projected_mem: int
    device_mem: int
    """Bytes that its matrices take on the device; 0 where the host multiplies."""
    own_mem: int
    """Of it, what another one that is merged at the same time takes as well."""

    @property
    def shared_mem(self) -> int:
        """What all of them take together, beside that."""
        return self.projected_mem - self.own_mem


def balance_size(
    source: Balanced, scratch_bytes: Callable[[TensorRecipe, int], int], budget: MemoryBudget
) -> BalanceSize:
    """Return how a tensor is merged as a whole; in steps that are never less than some rows.

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
    how = balancing(source)
    an_element, once = gathered(source)
    an_element += element_bytes(recipe)
    pieces = piece_bytes(source)
    unit = row_view(recipe).unit
    block = min(unit * max(1, BLOCK_ELEMENTS // unit), num_elements(recipe.shape))
    blas_rows = BLAS_ROWS if how.form == "primal" else min(BLAS_ROWS, how.num_stacked)
    blas = BLAS_BYTES + 8 * blas_rows * how.width
    # What is left of the deltas of a block, one expert after another, when they are looked at.
    left = block * how.itemsize if how.rule == "wudi" else 0
    shared = budget.threads * (blas + pieces + left)
    shared += budget.workers * (
        gathered_bytes(recipe)
        + budget.blocks_in_flight * block * (an_element + element_bytes(deltas))
    )

    def own(rows: int, steps: int, together: int) -> int:
        elements = rows * how.cols
        made = elements * (element_bytes(deltas) + how.step_element_bytes)
        # Of a stack, steps of one matrix may follow those of another.
        there = steps if how.num_matrices > 1 else min(steps, -(-how.rows // rows))
        waiting = there * elements * (an_element + how.seen_element_bytes)
        whole = once + how.held_bytes(budget.threads, together)
        return whole + waiting + min(there, budget.threads) * made + blas

    def projected(rows: int, steps: int, together: int) -> int:
        largest = max(block, rows * how.cols)
        scratch = max(scratch_bytes(one, largest) for one in (deltas, joining(recipe)))
        return shared + own(rows, steps, together) + budget.threads * scratch

    def cut(rows: int) -> int:
        return max(how.step_unit, rows - rows % how.step_unit)

    steps = budget.blocks_in_flight  # as many as of any tensor, of which each is written then
    # Where it is turned, steps of the stored one need no more elements than those that follow.
    least = -(-MIN_STEP_ROWS * how.rows // how.cols) if how.is_turned else MIN_STEP_ROWS
    together = min(how.most_together, budget.threads)
    while together > 1 and projected(min(least, how.rows), steps, together) > budget.block_mem:
        together -= 1
    rows = MAX_STEP_ELEMENTS // how.cols
    while rows > least and projected(min(rows, how.rows), steps, together) > budget.block_mem:
        rows = rows * 3 // 4
    rows = max(least, rows)
    rows = min(how.rows, rows if how.is_turned else cut(rows))
    turned_rows = min(how.cols, cut(rows * how.cols // how.rows))
    needs, own_mem = projected(rows, steps, together), own(rows, steps, together)
    there = DEVICE_BLAS_BYTES + how.device_bytes if how.device_bytes else 0
    if there > budget.device_mem // 2:
        there = 0
    return BalanceSize(how, block, rows, turned_rows, together, steps, needs, there, own_mem)
