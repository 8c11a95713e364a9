"""One task: read the blocks of a shard's tensors, merge them, write them in order, commit.

Blocks are merged on a pool of compute threads while this worker's own thread hashes and writes the
finished ones in order; the operating system reads ahead of both. A bounded number of blocks is in
flight, which is what bounds the memory.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from blake3 import blake3

from della_dist.errors import RunError, StorageError
from della_dist.planning.layout import OutputTensor, ShardLayout
from della_dist.runtime.task.blocks import TaskBlocks
from della_dist.runtime.task.context import Blocks, Cancelled, MergeContext
from della_dist.runtime.task.in_order import in_order
from della_dist.runtime.task.kept_factors import KeptFactors
from della_dist.runtime.task.meter import TaskMeter
from della_dist.specs.history import Spent, TaskRun
from della_dist.specs.statistics import TensorStats
from della_dist.storage.manifest import FileRecord, TensorRecord
from della_dist.storage.shard_writer import ShardWriter
from della_dist.storage.store import OutputStore, U8Array


@dataclass(frozen=True, slots=True)
class TaskRecord:
    """A committed task."""

    index: int
    shard: FileRecord
    tensors: tuple[TensorRecord, ...]
    sample: str
    """Digest of a few blocks of the shard (`della_dist.storage.samples`)."""
    version: str
    """Of the shard as it was committed (`ObjectStat.version`)."""
    spent: Spent | None = None
    run: TaskRun | None = None
    """When and by whom; this and what was spent: None if it is not known."""


def shard_entries(
    layout: ShardLayout,
) -> tuple[list[tuple[str, str, tuple[int, ...]]], dict[str, str]]:
    """Return what the header of a shard is built from: its tensors and its metadata."""
    return [(t.name, t.dtype, t.shape) for t in layout.tensors], {"format": "pt"}


def merge_task(
    context: MergeContext, index: int, store: OutputStore, lease_token: str
) -> TaskRecord:
    """Merge and commit the shard with this index.

    Parameters
    ----------
    context
        What all tasks share.
    index
        Of the shard.
    store
        Of the output.
    lease_token
        Of the run that this task belongs to. Once another run has the output, nothing of this one
        appears in it any more.

    Raises
    ------
    TensorDataError
        If values cannot be merged. Nothing of the shard is left behind, as for every error.
    RunError
        If another run has taken the output over.
    """
    began_s = time.perf_counter()
    writing_s = 0.0
    counted = TaskMeter(context.meter)
    layout = context.plan.shards[index]
    writer = ShardWriter(store, layout.name, *shard_entries(layout))
    _check_lease(store, lease_token)  # whoever slept through the end of the run begins nothing
    tensors = {t.name: t for t in layout.tensors}
    stats: dict[str, TensorStats | None] = {}
    unfinished: deque[tuple[str, Callable[[], TensorStats | None]]] = deque()
    names: deque[str] = deque()

    def submitted(task: TaskBlocks) -> Blocks:
        for entry in writer.tensors:
            blocks, measured = task.blocks(tensors[entry.name])
            unfinished.append((entry.name, measured))
            with contextlib.closing(blocks):
                for future in blocks:
                    names.append(entry.name)
                    yield future

    try:
        with context.readers(counted.read) as readers, contextlib.ExitStack() as cleaning:
            is_adapter = context.plan.adapter is not None
            kept = KeptFactors(store, readers.refuse_changed) if is_adapter else None
            task = TaskBlocks(context, readers, kept)
            entries = writer.begin()
            task.read_ahead([tensors[entry.name] for entry in entries])
            blocks = cleaning.enter_context(contextlib.closing(submitted(task)))
            for data in in_order(blocks, context.budget.blocks_in_flight):
                name = names.popleft()
                while unfinished[0][0] != name:  # all blocks of what was before are written
                    written, measured = unfinished.popleft()
                    stats[written] = measured()
                since_s = time.perf_counter()
                _write(context, writer, data)
                writing_s += time.perf_counter() - since_s
            stats.update((name, measured()) for name, measured in unfinished)
        _check_lease(store, lease_token)
        written_s = time.perf_counter()
        shard = writer.finish()
    except BaseException as error:
        writer.abort()
        if isinstance(error, StorageError):
            # Of an upload that another run aborted, stores say many things.
            with contextlib.suppress(StorageError):
                _check_lease(store, lease_token)
        raise
    return TaskRecord(
        index=index,
        shard=FileRecord(layout.name, shard.size_bytes, shard.sha256),
        tensors=tuple(
            TensorRecord(
                name=entry.name,
                dtype=entry.dtype,
                shape=entry.shape,
                shard=layout.name,
                start=entry.start,
                stop=entry.stop,
                blake3=shard.tensors[entry.name],
                action="base" if entry.name in task.differing else context.plan.action(entry.name),
                stats=stats[entry.name],
            )
            for entry in writer.tensors
        ),
        sample=shard.sample,
        version=shard.version,
        spent=Spent(
            bytes_read=counted.bytes_read,
            merging_s=written_s - began_s - writing_s,
            writing_s=writing_s,
            committing_s=time.perf_counter() - written_s,
        ),
    )


def _check_lease(store: OutputStore, token: str) -> None:
    if not store.is_held(token):
        raise RunError(
            f"{store.location} was taken over by another run. What this one committed is kept; "
            "let the other one finish."
        )


def _write(context: MergeContext, writer: ShardWriter, data: U8Array) -> None:
    if context.cancelled.is_set():
        raise Cancelled
    writer.write(data)
    context.meter.wrote(data.nbytes)


def digest_tensor(context: MergeContext, tensor: OutputTensor) -> str:
    """Merge one tensor again and return the BLAKE3 of its data; writes nothing."""
    digest = blake3()
    with context.readers() as readers:
        task = TaskBlocks(context, readers)
        task.read_ahead([tensor])
        blocks, _ = task.blocks(tensor)
        for data in in_order(blocks, context.budget.blocks_in_flight):
            digest.update(data.data)
    return digest.hexdigest()
