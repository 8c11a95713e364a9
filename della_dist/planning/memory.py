"""Peak memory as a number known before the run.

A worker has a bounded number of blocks in flight: being read, merged, or waiting to be written in
order. What they hold, plus the scratch of the kernels that run at once, is the projected memory::

    workers * BLOCKS_IN_FLIGHT(threads) * block * (bytes of all inputs and the output an element)
        + threads * scratch
        + workers * what is gathered of a tensor before it is merged

Remote storage needs buffers of its own, which are taken off the budget first: what is read ahead,
and the parts of an upload. What is known of every tensor (`records_mem`) comes on top, and the
interpreter with its libraries, which do not depend on the model.

Where a GPU merges, buffers between host and device are taken off as well (`staging_mem`), and what
its own memory is used for has a budget of its own (`device_mem`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from della_dist.specs.dtypes import itemsize, num_elements
from della_dist.specs.passes import gathered_bytes
from della_dist.specs.recipe import TensorRecipe

#: Larger blocks gain nothing: at this size the fixed cost of a block is below a percent of it.
MAX_BLOCK_ELEMENTS = 1 << 20

#: Bounds of a block of a tensor that is copied.
MIN_COPY_BLOCK_BYTES = 64 << 10
MAX_COPY_BLOCK_BYTES = 4 << 20

#: The smallest budget that is accepted.
MIN_ALLOWED_MEM = 32 << 20

#: The smallest budget of a GPU's memory that is accepted.
MIN_GPU_MEM = 64 << 20

#: The budget where the user gives none.
DEFAULT_ALLOWED_MEM = 1 << 30


#: What a process holds of every tensor, measured: in the plan, more for each input, and again
#: while the shard that it is in is recorded, more for each expert.
PLANNED_TENSOR_BYTES = 1600
PLANNED_INPUT_BYTES = 256
RECORDED_TENSOR_BYTES = 1792
RECORDED_EXPERT_BYTES = 768


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """What a run may use: buffers of `allowed_mem` bytes for all workers together."""

    allowed_mem: int
    workers: int
    threads: int
    """Compute threads of all workers together."""
    read_ahead_mem: int = 0
    """Of `allowed_mem`, for what is read ahead from remote inputs."""
    upload_mem: int = 0
    """Of `allowed_mem`, for the parts of a remote output that are on their way."""
    staging_mem: int = 0
    """Of `allowed_mem`, for what a backend holds of the host all the time."""
    device_mem: int = 0
    """Bytes that may be used of a device with memory of its own; 0 where there is none."""
    max_block_elements: int = MAX_BLOCK_ELEMENTS

    @property
    def block_mem(self) -> int:
        """What is left for blocks and kernels."""
        return self.allowed_mem - self.read_ahead_mem - self.upload_mem - self.staging_mem

    @property
    def blocks_in_flight(self) -> int:
        """Blocks that one worker has in flight at most: one a thread, one read ahead, one written.

        Fewer would leave a thread idle while the worker writes; more would only cost memory.
        """
        return self.threads + 2


@dataclass(frozen=True, slots=True)
class BlockSize:
    """How one tensor is cut into blocks, and what that needs."""

    elements: int
    projected_mem: int


def element_bytes(recipe: TensorRecipe) -> int:
    """Return the bytes that one element takes in all inputs and the output together."""
    dtypes = [recipe.out_dtype, *recipe.expert_dtypes]
    if recipe.base_dtype is not None:
        dtypes.append(recipe.base_dtype)
    return sum(map(itemsize, dtypes))


def block_size(
    recipe: TensorRecipe,
    unit: int,
    scratch_bytes: Callable[[TensorRecipe, int], int],
    budget: MemoryBudget,
    gathered: tuple[int, int] = (0, 0),
    piece_bytes: int = 0,
) -> BlockSize:
    """Return the largest useful block of whole units that the budget allows.

    Never less than one unit: where a method ranks a whole row or tensor, `projected_mem` may
    therefore exceed the budget, which the plan says.

    Parameters
    ----------
    recipe
        The tensor.
    unit
        Elements that must stay together (`della_dist.specs.rows.RowView.unit`).
    scratch_bytes
        Bytes that a kernel needs for a block of so many elements.
    budget
        What all workers may use together.
    gathered
        Bytes held beside the inputs and the output where rows are gathered: an element, and in all
        (`della_dist.specs.sources.gathered`).
    piece_bytes
        Bytes that each thread holds while it gathers views
        (`della_dist.specs.sources.piece_bytes`).
    """

    def projected(units: int) -> int:
        elements = min(units * unit, total)
        held = budget.workers * budget.blocks_in_flight * elements * an_element
        return held + budget.threads * (scratch_bytes(recipe, elements) + piece_bytes) + once

    an_element = element_bytes(recipe) + gathered[0]
    once = budget.workers * (gathered_bytes(recipe) + gathered[1])
    total = num_elements(recipe.shape)
    units = max(1, min(-(-total // unit), budget.max_block_elements // unit))
    while units > 1 and projected(units) > budget.block_mem:
        units = units * 3 // 4
    return BlockSize(elements=units * unit, projected_mem=projected(units))


def records_mem(num_tensors: int, most_in_shards: int, num_inputs: int) -> int:
    """Return the bytes that the plan and the records of all tensors take at most.

    Parameters
    ----------
    num_tensors
        Of the output.
    most_in_shards
        Of them, in the shards that are merged at once.
    num_inputs
        Checkpoints, the base included.
    """
    planned = num_tensors * (PLANNED_TENSOR_BYTES + num_inputs * PLANNED_INPUT_BYTES)
    recorded = most_in_shards * (RECORDED_TENSOR_BYTES + num_inputs * RECORDED_EXPERT_BYTES)
    return planned + recorded


def copy_block(
    num_sources: int, size_bytes: int, budget: MemoryBudget, piece_bytes: int = 0
) -> BlockSize:
    """Return how a tensor that is copied, not merged, is cut: its elements are bytes.

    Parameters
    ----------
    num_sources
        Checkpoints it is read from, to be compared.
    size_bytes
        Of the tensor.
    budget
        What all workers may use together.
    piece_bytes
        As for `block_size`.
    """
    held = budget.workers * budget.blocks_in_flight * (num_sources + 1)
    pieces = budget.threads * piece_bytes
    most = min(MAX_COPY_BLOCK_BYTES, (budget.block_mem - pieces) // held)
    # Whole elements of every dtype.
    size = max(MIN_COPY_BLOCK_BYTES, most - most % MIN_COPY_BLOCK_BYTES)
    return BlockSize(size, held * min(size, size_bytes) + pieces)
