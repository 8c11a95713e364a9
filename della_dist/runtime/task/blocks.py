"""The blocks of a task's tensors: which ranges they read, and what is computed of them.

Blocks are merged on a pool of compute threads, and come out in order.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future

import numpy as np

from della_dist.errors import TensorDataError
from della_dist.ops.blocks import Block, BlockStats, combine_stats
from della_dist.ops.prepare import Measurement, Prepared, absorb, merge_measurements, prepare
from della_dist.planning.layout import OutputTensor
from della_dist.planning.memory import copy_block
from della_dist.runtime.task.context import Cancelled, MergeContext
from della_dist.runtime.task.inputs import InputReaders, TensorSource, any_remote
from della_dist.specs.checkpoint import CheckpointIndex
from della_dist.specs.dtypes import DTYPE_BITS, num_elements
from della_dist.specs.rows import expected_passes
from della_dist.specs.statistics import TensorStats
from della_dist.storage.remote.readahead import Want
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
        if self._context.plan.action(tensor.name) != "merge":
            return self._copied(tensor), lambda: None
        merge = _TensorMerge(self._context, self._readers, tensor)
        return merge.blocks(), merge.stats()

    def read_ahead(self, tensors: Sequence[OutputTensor]) -> None:
        """Say which tensors are merged, in order, so that remote inputs are read ahead of them."""
        if any_remote(self._context.plan):
            self._readers.ahead.follow(self.wants(tensors))

    def wants(self, tensors: Sequence[OutputTensor]) -> Iterator[list[Want]]:
        """Yield what each block of `tensors` asks of remote stores, in order."""
        for tensor in tensors:
            if self._context.plan.action(tensor.name) != "merge":
                _, sources = self._copy_sources(tensor)
                ranges = self._copy_ranges(tensor, len(sources))
                yield from _wants(sources, ranges)
                continue
            merge = _TensorMerge(self._context, self._readers, tensor)
            for _ in range(expected_passes(merge.recipe)):
                yield from _wants(merge.sources, merge.ranges())

    def _copy_sources(
        self, tensor: OutputTensor
    ) -> tuple[Sequence[CheckpointIndex], list[TensorSource]]:
        plan = self._context.plan
        itemsize = DTYPE_BITS[tensor.dtype] // 8
        checkpoints = plan.sources(tensor.name)
        return checkpoints, [self._readers.source(c, tensor.name, itemsize) for c in checkpoints]

    def _copy_ranges(self, tensor: OutputTensor, num_sources: int) -> Iterator[tuple[int, int]]:
        size = copy_block(num_sources, tensor.size_bytes, self._context.budget)
        itemsize = DTYPE_BITS[tensor.dtype] // 8
        return _ranges(num_elements(tensor.shape), size.elements // itemsize)

    def _copied(self, tensor: OutputTensor) -> Iterator[Future[U8Array]]:
        itemsize = DTYPE_BITS[tensor.dtype] // 8
        checkpoints, sources = self._copy_sources(tensor)

        def copy(start: int, stop: int) -> U8Array:
            data = np.array(sources[0].view(start, stop))
            for checkpoint, source in zip(checkpoints[1:], sources[1:], strict=True):
                num_different = int(np.count_nonzero(source.view(start, stop) != data))
                if num_different and self._context.plan.config.on_different_integers == "base":
                    self.differing.add(tensor.name)
                elif num_different:
                    raise TensorDataError(
                        f"{tensor.dtype} tensor {tensor.name} of {checkpoint.location} differs "
                        f"from the one in {checkpoints[0].location} ({num_different} bytes of the "
                        f"first {stop * itemsize} or so). Integer and boolean tensors cannot be "
                        "merged, only copied where all agree. If they hold quantised weights, "
                        "convert the checkpoints to BF16 first; if they are counters, as of "
                        "batches, set `on_different_integers: base`."
                    )
            for source in sources:
                source.release(start, stop)
            return data

        for start, stop in self._copy_ranges(tensor, len(sources)):
            for source in sources:
                source.prefetch(start, stop)
            yield self._context.compute.submit(copy, start, stop)


class _TensorMerge:
    """One tensor: its passes, its blocks, its statistics."""

    def __init__(self, context: MergeContext, readers: InputReaders, tensor: OutputTensor) -> None:
        plan = context.plan
        self._context = context
        self._name = tensor.name  # the recipe has the name that random words come from
        self.recipe = recipe = plan.recipe(tensor)
        self._block_elements = context.block_size(recipe).elements
        self._base: TensorSource | None = None
        if plan.base is not None and recipe.base_dtype is not None:
            itemsize = DTYPE_BITS[recipe.base_dtype] // 8
            self._base = readers.source(plan.base, tensor.name, itemsize)
        self._experts = [
            readers.source(checkpoint, tensor.name, DTYPE_BITS[dtype] // 8)
            for checkpoint, dtype in zip(plan.experts, recipe.expert_dtypes, strict=True)
        ]
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
        while prepared.stage != "ready":
            prepared = absorb(self.recipe, prepared, self._measure(prepared))
        for i, (start, stop) in enumerate(self.ranges()):
            self._stats.append(None)
            self._prefetch(start, stop)
            yield self._context.compute.submit(self._merge, prepared, i, start, stop)

    def ranges(self) -> Iterator[tuple[int, int]]:
        """Return the blocks, as ranges of elements."""
        return _ranges(num_elements(self.recipe.shape), self._block_elements)

    @property
    def sources(self) -> list[TensorSource]:
        """The base, if any, and the experts."""
        return self._experts if self._base is None else [self._base, *self._experts]

    def _prefetch(self, start: int, stop: int) -> None:
        for source in self.sources:
            source.prefetch(start, stop)

    def _release(self, start: int, stop: int) -> None:
        for source in self.sources:
            source.release(start, stop)

    def _block(self, start: int, stop: int) -> Block:
        if self._context.cancelled.is_set():
            raise Cancelled
        return Block(
            start=start,
            stop=stop,
            base=None if self._base is None else self._base.view(start, stop),
            experts=tuple(e.view(start, stop) for e in self._experts),
        )

    def _measure(self, prepared: Prepared) -> Measurement:
        total: list[Measurement] = []
        lock = threading.Lock()

        def measure(start: int, stop: int) -> None:
            measured = self._context.backend.measure(
                self.recipe, prepared, self._block(start, stop)
            )
            self._release(start, stop)
            self._refuse_nonfinite(measured.num_nonfinite, start, stop)
            with lock:  # added up at once: a measurement is larger than its block may be
                total[:] = [merge_measurements(total[0], measured) if total else measured]

        pending: deque[Future[None]] = deque()
        for start, stop in self.ranges():
            self._prefetch(start, stop)
            pending.append(self._context.compute.submit(measure, start, stop))
            if len(pending) >= self._context.budget.blocks_in_flight:
                pending.popleft().result()
        while pending:
            pending.popleft().result()
        return total[0]

    def _merge(self, prepared: Prepared, index: int, start: int, stop: int) -> U8Array:
        recipe = self.recipe
        block = self._block(start, stop)
        out = np.empty((stop - start) * (DTYPE_BITS[recipe.out_dtype] // 8), np.uint8)
        stats = self._context.backend.merge(recipe, prepared, block, out)
        self._release(start, stop)
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
        m = int(np.flatnonzero(counts)[0])
        raise TensorDataError(
            f"tensor {self._name} of {self._context.plan.experts[m].location}: {counts[m]} "
            f"of the deltas of elements {start} to {stop - 1} are NaN or infinite. The expert (or "
            "its base) is damaged; replace it, or set `on_nonfinite: zero` in the configuration "
            "to let the base stand at these elements."
        )


def _wants(
    sources: Sequence[TensorSource], ranges: Iterator[tuple[int, int]]
) -> Iterator[list[Want]]:
    """Yield what every block asks of remote stores."""
    for start, stop in ranges:
        wants = (source.want(start, stop) for source in sources)
        yield [want for want in wants if want is not None]


def _ranges(count: int, step: int) -> Iterator[tuple[int, int]]:
    for start in range(0, count, step):
        yield start, min(start + step, count)
