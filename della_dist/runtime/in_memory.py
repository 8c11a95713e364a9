"""Merge tensors in this process, without an output."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from della_dist.planning.build import MergePlan
from della_dist.planning.layout import OutputTensor
from della_dist.runtime.budget import budget, connections, with_remote
from della_dist.runtime.options import RunOptions
from della_dist.runtime.task.backend import choose_backend, with_backend
from della_dist.runtime.task.blas import one_blas_thread
from della_dist.runtime.task.blocks import TaskBlocks
from della_dist.runtime.task.context import MergeContext
from della_dist.runtime.task.in_order import in_order
from della_dist.runtime.task.inputs import InputStores, any_remote
from della_dist.runtime.task.meter import Meter
from della_dist.storage.libc import free_large_buffers_at_once
from della_dist.storage.store import U8Array


@contextlib.contextmanager
def merging(plan: MergePlan, options: RunOptions = RunOptions()) -> Iterator[MergeContext]:
    """Give what one worker needs to merge tensors of `plan`."""
    if any_remote(plan):
        free_large_buffers_at_once()
    memory = with_remote(budget(options), plan, None)
    backend = choose_backend(options.device, memory, options.gpu_memory)
    with one_blas_thread(plan), ThreadPoolExecutor(memory.threads) as compute:
        yield MergeContext(
            plan,
            backend,
            with_backend(memory, backend),
            compute,
            Meter(),
            threading.Event(),
            InputStores(connections(memory)),
        )


def merged_tensors(context: MergeContext) -> Iterator[tuple[OutputTensor, U8Array]]:
    """Yield every tensor of the merge with its bytes, shard by shard.

    Raises
    ------
    TensorDataError
        If values cannot be merged.
    InputChangedError
        If an input is no longer what was planned with.
    """
    for shard in context.plan.shards:
        with context.readers() as readers:
            task = TaskBlocks(context, readers)
            task.read_ahead(shard.tensors)
            for tensor in shard.tensors:
                data = np.empty(tensor.size_bytes, np.uint8)
                first = 0
                blocks, _ = task.blocks(tensor)
                with contextlib.closing(blocks):
                    for block in in_order(blocks, context.budget.blocks_in_flight):
                        data[first : first + block.size] = block
                        first += block.size
                yield tensor, data
            readers.refuse_changed()
