"""How large the chunks of a recipe are, and what they take on the device.

Half of the device memory that is allowed is for chunks, the other half for matrices. Each lane
(`della_dist.ops.gpu.staging`) has an equal share of its half, for its two slots and for what
computing one chunk takes, of which a quarter is left to what torch's allocator rounds up and cannot
give out. A chunk is as large as slots and share allow, but never less than one unit of the tensor
(`della_dist.specs.rows`): one that takes more than a share is computed while no other such is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from della_dist.ops.angles import row_weights_bytes
from della_dist.ops.blocks import SQUARES_SUMS
from della_dist.ops.gpu.staging import ALIGNMENT, NUM_SLOTS
from della_dist.specs.dtypes import itemsize
from della_dist.specs.passes import gathered_bytes, multiplies, searches, selects
from della_dist.specs.recipe import TensorRecipe, is_wide
from della_dist.specs.rows import RowView, row_view

#: Lanes of a device: one computes, others copy.
NUM_LANES = 4
#: Bytes of a slot at most: launching kernels costs little beside so many elements.
MAX_SLOT_BYTES = 128 << 20
MIN_SLOT_BYTES = 64 << 10

#: Bytes an element of what is found of one expert: ranks (int64 and float64) and random words;
#: or keys and the buckets that they are counted in; or what is counted anyway.
_RANK_BYTES = 96
_SELECT_BYTES = 64
_TALLY_BYTES = 24


@dataclass(frozen=True, slots=True)
class Shares:
    """What a backend may take, in bytes: fixed when it is made."""

    device_memory: int
    """All of it on the device."""
    slot_bytes: int

    @property
    def of_chunks(self) -> int:
        """Bytes on the device for all lanes together."""
        return self.device_memory // 2

    @property
    def of_lane(self) -> int:
        """Bytes on the device for what one lane computes, beside its slots."""
        return (self.of_chunks // NUM_LANES - NUM_SLOTS * self.slot_bytes) * 3 // 4


@dataclass(frozen=True, slots=True)
class ChunkSize:
    """A chunk of a recipe's tensor."""

    elements: int
    slot_need: int
    """Bytes of its inputs and its output."""
    computing: int
    """Bytes on the device beside the slots."""


def shares(device_memory: int, host_memory: int) -> Shares:
    """Return how what is allowed on the device and on the host is shared.

    Slots are powers of two, as which pinned memory is given out. They take half of the host's part
    at most, and an eighth of what a lane has on the device each.
    """
    most = min(host_memory // (NUM_LANES * NUM_SLOTS), device_memory // 2 // NUM_LANES // 8)
    most = max(MIN_SLOT_BYTES, min(MAX_SLOT_BYTES, most))
    return Shares(device_memory, 1 << (most.bit_length() - 1))


def chunk_size(recipe: TensorRecipe, block_elements: int, has: Shares) -> ChunkSize:
    """Return how blocks of so many elements are cut into chunks of whole units."""
    view = row_view(recipe)
    raw, an_element = _raw_bytes(recipe), _element_bytes(recipe, view)
    tables = tables_bytes(recipe, block_elements)
    parts = ALIGNMENT * (len(recipe.expert_dtypes) + 2)
    fits = min((has.slot_bytes - parts) // raw, (has.of_lane - tables) // an_element)
    elements = view.unit * max(1, min(fits, block_elements) // view.unit)
    elements = min(elements, max(block_elements, 1), max(view.num_elements, 1))
    return ChunkSize(elements, elements * raw + parts, elements * an_element + tables)


def is_large(size: ChunkSize, has: Shares) -> bool:
    """Return whether a chunk takes more than the share of a lane."""
    return size.slot_need > has.slot_bytes or size.computing > has.of_lane


def device_bytes(recipe: TensorRecipe, block_elements: int, has: Shares) -> int:
    """Return the bytes of device memory that all lanes together take at most, merging a tensor."""
    size = chunk_size(recipe, block_elements, has)
    slots = NUM_LANES * NUM_SLOTS * has.slot_bytes
    if not is_large(size, has):
        return slots + NUM_LANES * size.computing * 4 // 3
    beside = (NUM_LANES - 1) * max(has.of_lane, 0)  # which compute other tensors
    return slots + (beside + large_slots(size, has) + size.computing) * 4 // 3


def large_slots(size: ChunkSize, has: Shares) -> int:
    """Return the bytes of the slots that a chunk takes which does not fit into those there are."""
    return NUM_SLOTS * size.slot_need if size.slot_need > has.slot_bytes else 0


def _raw_bytes(recipe: TensorRecipe) -> int:
    """Return the bytes of an element of all inputs and the output."""
    dtypes = (recipe.base_dtype or "", *recipe.expert_dtypes, recipe.out_dtype)
    return sum(itemsize(dtype) for dtype in dtypes if dtype)


def _element_bytes(recipe: TensorRecipe, view: RowView) -> int:
    """Return the bytes that computing takes of an element, beside inputs and output."""
    settings, num_experts = recipe.settings, len(recipe.expert_dtypes)
    compute = 8 if is_wide(recipe) else 4
    # In rows of at least 16, as float64.
    cols = max(1, view.num_cols)
    widened = -(-cols // SQUARES_SUMS) * SQUARES_SUMS / cols
    # Deltas and contributions of every expert, base, sums, and what one expert's drop step holds;
    # then, as float64, the squares of all deltas and the merged one, and their products.
    total = compute * (2 * num_experts + 6) + 8 * (2 * num_experts + 1)
    if settings.drop in ("magprune", "random"):
        total += _RANK_BYTES
    elif selects(recipe) or settings.rescale == "l1":
        total += _SELECT_BYTES
    else:
        total += _TALLY_BYTES
    if settings.angles is not None:
        # Every expert's deltas as float64, and products.
        total += math.ceil(8 * widened * (2 * num_experts + 2))
    if settings.drop == "variance" or settings.overlap is not None or settings.by_energy:
        # Every expert's deltas once more, and a mean and sums as float64.
        total += compute * num_experts + 8 * 4
    if settings.drop == "importance":
        # Both rows, their exponentials, and a sum, as float64.
        total += math.ceil(8 * (12 + widened)) + compute * num_experts
    return total


def tables_bytes(recipe: TensorRecipe, block_elements: int) -> int:
    """Return the bytes of what does not grow with a chunk."""
    tables, num_experts = 1 << 16, len(recipe.expert_dtypes)
    if selects(recipe) or recipe.settings.rescale == "l1":
        tables += 65_537 * 8 * 8 * max(num_experts, len(searches(recipe)))
    tables += gathered_bytes(recipe) * multiplies(recipe)
    return tables + row_weights_bytes(recipe, block_elements)
