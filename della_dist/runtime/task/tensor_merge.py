"""One tensor that is merged: its passes over the inputs, its blocks, its statistics."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from della_dist.errors import TensorDataError
from della_dist.ops.blocks import Block, BlockStats, combine_stats
from della_dist.ops.forming import converted, difference
from della_dist.ops.measurements import Measurement, merge_measurements
from della_dist.ops.prepare import Pending, Ready, absorb, prepare
from della_dist.ops.wudi_low_rank import Term
from della_dist.runtime.task.columns import GatheredColumns, open_columns
from della_dist.runtime.task.context import Blocks, Cancelled, MergeContext
from della_dist.runtime.task.in_order import in_order
from della_dist.runtime.task.inputs import InputReaders
from della_dist.specs.dtypes import itemsize, num_elements
from della_dist.specs.ranks import parts_of
from della_dist.specs.recipe import of_deltas, of_one
from della_dist.specs.sources import Adapted, Column, LowRank, Merged
from della_dist.specs.statistics import TensorStats
from della_dist.storage.store import U8Array

T = TypeVar("T")
FloatArray: TypeAlias = npt.NDArray[np.floating[Any]]
Look: TypeAlias = Callable[[Block, BlockStats], None]


class TensorMerge:
    """One tensor: its passes, its blocks, its statistics.

    Parameters
    ----------
    context, readers
        Of the task.
    name
        Of the tensor.
    source
        What it is made of.
    deltas_by
        If more than 0, the delta alone is merged, in blocks of so many elements.
    matrices
        Equal parts of it that no block goes over the end of.
    """

    def __init__(
        self,
        context: MergeContext,
        readers: InputReaders,
        name: str,
        source: Merged,
        deltas_by: int = 0,
        matrices: int = 1,
    ) -> None:
        self._context = context
        self._experts = source.experts
        self._name = name  # the recipe has the name that random words come from
        self._stored = source.recipe
        self._is_delta = deltas_by > 0
        self.recipe = of_deltas(source.recipe) if self._is_delta else source.recipe
        self._block_elements = deltas_by or context.block_size(source).elements
        self._matrices = matrices
        self._has_base = source.base is not None
        self._columns = open_columns(readers, source)
        self._stats: list[BlockStats | None] = []

    def stats(self, joined: Sequence[BlockStats] | None = None) -> Callable[[], TensorStats]:
        """Return a function that returns the statistics, once all blocks are merged.

        It outlives the blocks, and so holds on to no reader. `joined` as in `combine_stats`.
        """
        recipe, stats = self.recipe, self._stats
        return lambda: combine_stats(recipe, [s for s in stats if s is not None], joined)

    def blocks(self) -> Blocks:
        """Submit block after block to be merged; measures the tensor first where it must."""
        yield from self.each(self.prepared(), lambda data: data)

    def prepared(self) -> Ready:
        """Return what the whole tensor decides about its blocks; reads it as often as it takes."""
        prepared = prepare(self.recipe)
        while not isinstance(prepared, Ready):
            prepared = absorb(self.recipe, prepared, self._measure(prepared))
        return prepared

    def each(
        self, prepared: Ready, use: Callable[[U8Array], T], look: Look | None = None
    ) -> Iterator[Future[T]]:
        """Submit block after block to be merged and then used; may be asked for again.

        Parameters
        ----------
        prepared
            Of this merge.
        use
            Takes what was merged.
        look
            Is shown what it was merged of, too.
        """
        self._stats[:] = []

        def merged(index: int, start: int, stop: int) -> T:
            return use(self._merge(prepared, index, start, stop, look))

        for i, (start, stop) in enumerate(self.block_ranges()):
            self._stats.append(None)
            self._columns.prefetch(start, stop)
            yield self._context.compute.submit(merged, i, start, stop)

    def deltas(self, start: int, stop: int) -> tuple[U8Array, list[U8Array]]:
        """Return elements of the base and of each expert's delta, of a merge of deltas to a base.

        Whoever has no more use for them calls `release`.
        """
        if self._context.cancelled.is_set():
            raise Cancelled
        base, *views = self._columns.views(start, stop)
        return base, self._deltas(views, base)

    def count(self, prepared: Ready, start: int, stop: int, deltas: Sequence[U8Array]) -> None:
        """Measure elements of each expert's delta alone, of a merge that has not been made."""
        block = Block(start=start, stop=stop, base=None, experts=tuple(deltas))
        self._stats.append(self._merged(prepared, block)[1])

    def apart(
        self, prepared: Ready, start: int, stop: int, deltas: Sequence[U8Array]
    ) -> Iterator[FloatArray]:
        """Yield what is left of each expert's delta after the drop.

        Parameters
        ----------
        prepared
            Of this merge.
        start, stop, deltas
            Elements: whole rows.
        """
        dtype = np.float64 if self.recipe.out_dtype == "F64" else np.float32
        for m, delta in enumerate(deltas):
            made = np.empty(stop - start, dtype)
            own = replace(
                prepared,
                keys=prepared.keys[m : m + 1],
                threshold=prepared.threshold[m : m + 1],
                ceiling=prepared.ceiling[m : m + 1],
                ratio=prepared.ratio[m : m + 1],
                weights=(1.0,),
            )
            alone = Block(start=start, stop=stop, base=None, experts=(delta,))
            self._context.backend.merge(of_one(self._stored, m), own, alone, made.view(np.uint8))
            yield made

    def terms(self, number: int, rows: int) -> list[list[Term]]:
        """Return what adapters add to a matrix of a stack, of each expert.

        Parameters
        ----------
        number, rows
            Of the matrix.
        """
        return [list(self._terms_of(expert, number, rows)) for expert in self._experts]

    def _terms_of(self, expert: Column, number: int, num_rows: int) -> Iterator[Term]:
        assert isinstance(expert, Adapted)
        for term in expert.terms:
            assert isinstance(term, LowRank)
            assert isinstance(self._columns, GatheredColumns)
            left, right = self._columns.factors_of(term)
            for matrix, first, group, rows in parts_of(term, num_rows):
                if matrix == number:
                    self._refuse_damaged(expert, left, right)
                    yield Term(first, left[group, rows], right[group], term.scaling)

    def release(self, start: int, stop: int) -> None:
        """Give the memory of elements back."""
        self._columns.release(start, stop)

    def prefetch(self, start: int, stop: int) -> None:
        """Ask for elements to be read in the background."""
        self._columns.prefetch(start, stop)

    def block_ranges(self) -> Iterator[tuple[int, int]]:
        """Yield the blocks, as ranges of elements."""
        size = num_elements(self.recipe.shape) // self._matrices
        for number in range(self._matrices):
            for start, stop in ranges(size, self._block_elements):
                yield number * size + start, number * size + stop

    def _block(self, start: int, stop: int) -> Block:
        if self._context.cancelled.is_set():
            raise Cancelled
        views = self._columns.views(start, stop)
        base = views.pop(0) if self._has_base else None
        if self._is_delta:
            views, base = self._deltas(views, base), None
        return Block(start=start, stop=stop, base=base, experts=tuple(views))

    def _deltas(self, experts: list[U8Array], base: U8Array | None) -> list[U8Array]:
        stored, dtype = self._stored, self.recipe.out_dtype
        assert base is not None
        assert stored.base_dtype is not None
        kinds = zip(experts, stored.expert_dtypes, stored.is_delta, strict=True)
        return [
            converted(raw, kind, dtype)
            if is_delta
            else difference(raw, kind, base, stored.base_dtype, dtype)
            for raw, kind, is_delta in kinds
        ]

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
            for start, stop in self.block_ranges():
                self._columns.prefetch(start, stop)
                yield self._context.compute.submit(measure, start, stop)

        for _ in in_order(submitted(), self._context.budget.blocks_in_flight):
            pass
        return total[0]

    def _merge(
        self, prepared: Ready, index: int, start: int, stop: int, look: Look | None
    ) -> U8Array:
        block = self._block(start, stop)
        out, stats = self._merged(prepared, block)
        if look is not None:
            look(block, stats)
        self._columns.release(start, stop)
        self._stats[index] = stats
        return out

    def _merged(self, prepared: Ready, block: Block) -> tuple[U8Array, BlockStats]:
        recipe = self.recipe
        out = np.empty((block.stop - block.start) * itemsize(recipe.out_dtype), np.uint8)
        stats = self._context.backend.merge(recipe, prepared, block, out)
        self._refuse_nonfinite(stats.num_nonfinite, block.start, block.stop)
        self.refuse_overflow(stats.num_overflow, block.start, block.stop, recipe.out_dtype)
        return out, stats

    def _refuse_damaged(self, expert: Column, *factors: FloatArray) -> None:
        """Raise `TensorDataError` if factors of an adapter are not finite."""
        if not all(np.isfinite(factor).all() for factor in factors):
            where = self._context.plan.inputs[expert.checkpoint].location
            raise TensorDataError(
                f"tensor {self._name}: the matrices of {where} have numbers that are NaN or "
                "infinite. The adapter is damaged; replace it."
            )

    def refuse_overflow(self, count: int, start: int, stop: int, dtype: str) -> None:
        """Raise `TensorDataError` if merged values of some elements do not fit into a dtype."""
        if count:
            raise TensorDataError(
                f"tensor {self._name}: {count} merged values of elements {start} to {stop - 1} are "
                f"too large for {dtype}. Set `out_dtype: bfloat16` or float32, or smaller weights."
            )

    def _refuse_nonfinite(self, counts: np.typing.NDArray[np.int64], start: int, stop: int) -> None:
        if self.recipe.settings.on_nonfinite == "zero" or not counts.any():
            return
        plan, m = self._context.plan, int(np.flatnonzero(counts)[0])
        where = plan.inputs[self._experts[m].checkpoint].location
        raise TensorDataError(
            f"tensor {self._name} of {where}: {counts[m]} of the deltas of elements {start} to "
            f"{stop - 1} are NaN or infinite. The expert (or its base) is damaged; replace it, "
            "or set `on_nonfinite: zero` in the configuration to let the base stand at these "
            "elements."
        )


def ranges(count: int, step: int) -> Iterator[tuple[int, int]]:
    """Yield from where to where blocks of `step` go, up to `count`."""
    for start in range(0, count, step):
        yield start, min(start + step, count)
