"""The blocks of a task's tensors: which ranges they read, and what is computed of them.

Blocks are merged on a pool of compute threads, and come out in order.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future

import numpy as np

from della_dist.errors import TensorDataError
from della_dist.ops.blocks import Block, BlockStats, combine_stats
from della_dist.ops.prepare import Measurement, Pending, Ready, absorb, merge_measurements, prepare
from della_dist.planning.layout import OutputTensor
from della_dist.planning.memory import copy_block
from della_dist.runtime.task.columns import open_columns
from della_dist.runtime.task.context import Cancelled, MergeContext
from della_dist.runtime.task.in_order import in_order
from della_dist.runtime.task.inputs import InputReaders, any_remote
from della_dist.specs.dtypes import itemsize, num_elements
from della_dist.specs.reading import passes, piece_bytes
from della_dist.specs.sources import Column, Merged, Rows, Same, Stored, columns
from della_dist.specs.statistics import TensorStats
from della_dist.storage.readahead import Want
from della_dist.storage.store import U8Array


class TaskBlocks:
    """Submits the blocks of one task's tensors to the compute threads."""

    def __init__(self, context: MergeContext, readers: InputReaders) -> None:
        self._context = context
        self._readers = readers
        self.differing: set[str] = set()
        """Copied tensors that turned out not to be equal everywhere, where that is allowed."""

    def blocks(
        self, tensor: OutputTensor
    ) -> tuple[Iterator[Future[U8Array]], Callable[[], TensorStats | None]]:
        """Return a tensor's output block by block, and its statistics for when all are written."""
        match self._context.plan.source(tensor):
            case Merged() as source:
                merge = _TensorMerge(self._context, self._readers, tensor.name, source)
                return merge.blocks(), merge.stats()
            case Same() | Stored() | Rows() as source:
                return self._copied(tensor, source), lambda: None

    def read_ahead(self, tensors: Sequence[OutputTensor]) -> None:
        """Say which tensors are merged, in order, so that remote inputs are read ahead of them."""
        if any_remote(self._context.plan):
            self._readers.ahead.follow(self.wants(tensors))

    def wants(self, tensors: Sequence[OutputTensor]) -> Iterator[list[Want]]:
        """Yield what each block of `tensors` asks of remote stores, in order."""
        for tensor in tensors:
            source = self._context.plan.source(tensor)
            opened = open_columns(self._readers, source)
            match source:
                case Merged():
                    size = self._context.block_size(source).elements
                case Same() | Stored() | Rows():
                    size = self._copy_elements(tensor, source)
            for _ in range(passes(source)[0]):
                for start, stop in _ranges(num_elements(tensor.shape), size):
                    yield opened.wants(start, stop)

    def _copy_elements(self, tensor: OutputTensor, source: Same | Stored | Rows) -> int:
        num_sources, pieces = len(columns(source)), piece_bytes(source)
        size = copy_block(num_sources, tensor.size_bytes, self._context.budget, pieces)
        return size.elements // itemsize(tensor.dtype)

    def _copied(
        self, tensor: OutputTensor, source: Same | Stored | Rows
    ) -> Iterator[Future[U8Array]]:
        opened = open_columns(self._readers, source)
        parts = columns(source)

        def copy(start: int, stop: int) -> U8Array:
            first, *others = opened.views(start, stop)
            data = np.array(first)
            for part, other in zip(parts[1:], others, strict=True):
                num_different = int(np.count_nonzero(other != data))
                if num_different:
                    self._differs(tensor, part, num_different, stop)
            opened.release(start, stop)
            return data

        size = self._copy_elements(tensor, source)
        for start, stop in _ranges(num_elements(tensor.shape), size):
            opened.prefetch(start, stop)
            yield self._context.compute.submit(copy, start, stop)

    def _differs(self, tensor: OutputTensor, part: Column, num_bytes: int, stop: int) -> None:
        plan = self._context.plan
        if plan.config.on_different_integers == "base":
            self.differing.add(tensor.name)
            return
        raise TensorDataError(
            f"{tensor.dtype} tensor {tensor.name} of {plan.inputs[part.checkpoint].location} "
            f"differs from the one in {plan.reference.location} ({num_bytes} bytes of the first "
            f"{stop * itemsize(tensor.dtype)} or so). Integer and boolean tensors cannot "
            "be merged, only copied where all agree. If they hold quantised weights, convert the "
            "checkpoints to BF16 first; if they are counters, as of batches, set "
            "`on_different_integers: base`."
        )


class _TensorMerge:
    """One tensor: its passes, its blocks, its statistics."""

    def __init__(
        self, context: MergeContext, readers: InputReaders, name: str, source: Merged
    ) -> None:
        self._context = context
        self._experts_at = [expert.checkpoint for expert in source.experts]
        self._name = name  # the recipe has the name that random words come from
        self.recipe = source.recipe
        self._block_elements = context.block_size(source).elements
        self._has_base = source.base is not None
        self._columns = open_columns(readers, source)
        self._stats: list[BlockStats | None] = []

    def stats(self) -> Callable[[], TensorStats]:
        """Return a function that returns the statistics, once all blocks are merged.

        It outlives the blocks, and so holds on to no reader.
        """
        recipe, stats = self.recipe, self._stats
        return lambda: combine_stats(recipe, [s for s in stats if s is not None])

    def blocks(self) -> Iterator[Future[U8Array]]:
        """Submit block after block to be merged; measures the tensor first where it must."""
        prepared = prepare(self.recipe)
        while not isinstance(prepared, Ready):
            prepared = absorb(self.recipe, prepared, self._measure(prepared))
        for i, (start, stop) in enumerate(self._ranges()):
            self._stats.append(None)
            self._columns.prefetch(start, stop)
            yield self._context.compute.submit(self._merge, prepared, i, start, stop)

    def _ranges(self) -> Iterator[tuple[int, int]]:
        """Return the blocks, as ranges of elements."""
        return _ranges(num_elements(self.recipe.shape), self._block_elements)

    def _block(self, start: int, stop: int) -> Block:
        if self._context.cancelled.is_set():
            raise Cancelled
        views = self._columns.views(start, stop)
        base = views.pop(0) if self._has_base else None
        return Block(start=start, stop=stop, base=base, experts=tuple(views))

    def _measure(self, prepared: Pending) -> Measurement:
        total: list[Measurement] = []
        lock = threading.Lock()

        def measure(start: int, stop: int) -> None:
            measured = self._context.backend.measure(
                self.recipe, prepared, self._block(start, stop)
            )
            self._columns.release(start, stop)
            self._refuse_nonfinite(measured.num_nonfinite, start, stop)
            with lock:  # added up at once: a measurement is larger than its block may be
                total[:] = [merge_measurements(total[0], measured) if total else measured]

        def submitted() -> Iterator[Future[None]]:
            for start, stop in self._ranges():
                self._columns.prefetch(start, stop)
                yield self._context.compute.submit(measure, start, stop)

        for _ in in_order(submitted(), self._context.budget.blocks_in_flight):
            pass
        return total[0]

    def _merge(self, prepared: Ready, index: int, start: int, stop: int) -> U8Array:
        recipe = self.recipe
        block = self._block(start, stop)
        out = np.empty((stop - start) * itemsize(recipe.out_dtype), np.uint8)
        stats = self._context.backend.merge(recipe, prepared, block, out)
        self._columns.release(start, stop)
        self._refuse_nonfinite(stats.num_nonfinite, start, stop)
        if stats.num_overflow:
            raise TensorDataError(
                f"tensor {self._name}: {stats.num_overflow} merged values of elements {start} to "
                f"{stop - 1} are too large for {recipe.out_dtype}. Set `out_dtype: bfloat16` or "
                "float32, or smaller weights."
            )
        self._stats[index] = stats
        return out

    def _refuse_nonfinite(self, counts: np.typing.NDArray[np.int64], start: int, stop: int) -> None:
        if self.recipe.settings.on_nonfinite == "zero" or not counts.any():
            return
        plan, m = self._context.plan, int(np.flatnonzero(counts)[0])
        raise TensorDataError(
            f"tensor {self._name} of {plan.inputs[self._experts_at[m]].location}: {counts[m]} of "
            f"the deltas of elements {start} to {stop - 1} are NaN or infinite. The expert (or "
            "its base) is damaged; replace it, or set `on_nonfinite: zero` in the configuration "
            "to let the base stand at these elements."
        )


def _ranges(count: int, step: int) -> Iterator[tuple[int, int]]:
    for start in range(0, count, step):
        yield start, min(start + step, count)
