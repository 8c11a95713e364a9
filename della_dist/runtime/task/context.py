"""What every task of a run shares."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from typing import TypeAlias

from della_dist.ops.blocks import Backend
from della_dist.planning.build import MergePlan
from della_dist.planning.memory import BlockSize, MemoryBudget, block_size
from della_dist.runtime.task.inputs import InputReaders, InputStores
from della_dist.runtime.task.meter import Meter
from della_dist.runtime.task.room import Room
from della_dist.specs.reading import gathered, piece_bytes
from della_dist.specs.rows import row_view
from della_dist.specs.sources import Merged
from della_dist.storage.store import U8Array

#: The output of a tensor, block after block, as they are made. Who stops before the end closes it.
Blocks: TypeAlias = Generator[Future[U8Array], None, None]


class Cancelled(Exception):
    """Another part of the run failed; this one stopped because of it."""


@dataclass(frozen=True, slots=True)
class MergeContext:
    """What every task of a run shares."""

    plan: MergePlan
    backend: Backend
    budget: MemoryBudget
    compute: Executor
    meter: Meter
    cancelled: threading.Event
    stores: InputStores
    matrices: Room = field(default_factory=Room)
    """For those that are merged as a whole, by all workers of this process."""

    def block_size(self, source: Merged) -> BlockSize:
        """Return how a tensor is cut into blocks."""
        recipe = source.recipe
        unit, scratch_bytes = row_view(recipe).unit, self.backend.scratch_bytes
        beside = gathered(source), piece_bytes(source)
        return block_size(recipe, unit, scratch_bytes, self.budget, *beside)

    def readers(self, count: Callable[[int], None] | None = None) -> InputReaders:
        """Return readers for one task.

        Parameters
        ----------
        count
            Told the bytes that are read; None: the run's meter is.
        """
        return InputReaders(
            self.plan.inputs,
            self.stores,
            self.meter.read if count is None else count,
            self.budget.read_ahead_mem // self.budget.workers,
        )
