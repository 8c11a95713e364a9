"""The blocks of a task's tensors: which ranges they read, and what is computed of them.

Blocks are merged on a pool of compute threads, and come out in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from della_dist.errors import TensorDataError
from della_dist.planning.layout import OutputTensor
from della_dist.planning.memory import copy_block
from della_dist.runtime.task.balanced import TensorBalance
from della_dist.runtime.task.columns import open_columns
from della_dist.runtime.task.context import Blocks, MergeContext
from della_dist.runtime.task.factors import TensorFactors
from della_dist.runtime.task.inputs import InputReaders, any_remote
from della_dist.runtime.task.kept_factors import KeptFactors
from della_dist.runtime.task.tensor_merge import TensorMerge, ranges
from della_dist.specs.dtypes import itemsize, num_elements
from della_dist.specs.reading import passes, piece_bytes
from della_dist.specs.sources import Balanced, Column, Factor, Merged, Rows, Same, Stored, columns
from della_dist.specs.statistics import TensorStats
from della_dist.storage.readahead import Want
from della_dist.storage.store import U8Array


class TaskBlocks:
    """Submits the blocks of one task's tensors to the compute threads.

    Parameters
    ----------
    context, readers
        Of the task.
    kept
        Factors that an earlier attempt has made; None: none are kept.
    """

    def __init__(
        self, context: MergeContext, readers: InputReaders, kept: KeptFactors | None = None
    ) -> None:
        self._kept = kept
        self._context = context
        self._readers = readers
        self._factors: TensorFactors | None = None
        self.differing: set[str] = set()
        """Copied tensors that turned out not to be equal everywhere, where that is allowed."""

    def blocks(self, tensor: OutputTensor) -> tuple[Blocks, Callable[[], TensorStats | None]]:
        """Return a tensor's output block by block, and its statistics for when all are written."""
        match self._context.plan.source(tensor):
            case Merged() as source:
                merge = TensorMerge(self._context, self._readers, tensor.name, source)
                return merge.blocks(), merge.stats()
            case Balanced() as source:
                balance = TensorBalance(self._context, self._readers, tensor.name, source)
                return balance.blocks(), balance.stats()
            case Factor() as source:
                factors = self._factors_of(tensor, source)
                return factors.blocks(source), factors.stats()
            case Same() | Stored() | Rows() as source:
                return self._copied(tensor, source), lambda: None

    def read_ahead(self, tensors: Sequence[OutputTensor]) -> None:
        """Say which tensors are merged, in order, so that remote inputs are read ahead of them."""
        if any_remote(self._context.plan):
            self._readers.ahead.follow(self.wants(tensors))

    def wants(self, tensors: Sequence[OutputTensor]) -> Iterator[list[Want]]:
        """Yield what each block of `tensors` asks of remote stores, in order."""
        asked: TensorFactors | None = None
        for tensor in tensors:
            source = self._context.plan.source(tensor)
            if isinstance(source, Factor):
                if not asked or not asked.is_of(source):
                    asked = self._new_factors(tensor, source)
                    yield from asked.wants()
                continue
            if isinstance(source, Balanced):
                balance = TensorBalance(self._context, self._readers, tensor.name, source)
                yield from balance.wants()
                continue
            opened = open_columns(self._readers, source)
            match source:
                case Merged():
                    size = self._context.block_size(source).elements
                case Same() | Stored() | Rows():
                    size = self._copy_elements(tensor, source)
            for _ in range(passes(source)[0]):
                for start, stop in ranges(num_elements(tensor.shape), size):
                    yield opened.wants(start, stop)

    def _factors_of(self, tensor: OutputTensor, source: Factor) -> TensorFactors:
        """Return the factors of a matrix: both are made when the first is asked for."""
        if self._factors is None or not self._factors.is_of(source):
            self._factors = self._new_factors(tensor, source)
        return self._factors

    def _new_factors(self, tensor: OutputTensor, source: Factor) -> TensorFactors:
        return TensorFactors(self._context, self._readers, tensor.name, source, self._kept)

    def _copy_elements(self, tensor: OutputTensor, source: Same | Stored | Rows) -> int:
        num_sources, pieces = len(columns(source)), piece_bytes(source)
        size = copy_block(num_sources, tensor.size_bytes, self._context.budget, pieces)
        return size.elements // itemsize(tensor.dtype)

    def _copied(self, tensor: OutputTensor, source: Same | Stored | Rows) -> Blocks:
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
        for start, stop in ranges(num_elements(tensor.shape), size):
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
