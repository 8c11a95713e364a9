"""Matrices that are merged as a whole (`della_dist.ops.wudi`).

Compute threads form the deltas step by step and multiply them, with one thread of BLAS each; since
the sums are exact, it does not matter in which order they are added up.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np

from della_dist.ops.blocks import Block
from della_dist.ops.prepare import Ready, prepare
from della_dist.ops.wudi import exponent_of, gram_of, merged, solution
from della_dist.planning.balance_memory import balance_size
from della_dist.runtime.task.columns import open_columns
from della_dist.runtime.task.context import Cancelled, MergeContext
from della_dist.runtime.task.in_order import in_order
from della_dist.runtime.task.inputs import InputReaders
from della_dist.runtime.task.tensor_merge import FloatArray, TensorMerge, ranges
from della_dist.specs.dtypes import itemsize, num_elements
from della_dist.specs.recipe import joining
from della_dist.specs.sources import Balanced, Same
from della_dist.specs.statistics import TensorStats
from della_dist.storage.readahead import Want
from della_dist.storage.store import U8Array

#: How often a worker that waits for its turn looks whether the run goes on.
_LOOK_S = 0.2


@dataclass(frozen=True, slots=True)
class _Matrix:
    """One of a stack, seen with the inputs of its layer as columns."""

    steps: tuple[tuple[int, int], ...]
    """Its pieces, each of whole rows."""
    deltas: Callable[[int, int], list[FloatArray]]
    """Returns (r, C) of a piece, for every expert."""
    put: Callable[[int, int, FloatArray], None]
    """Takes the merged delta of a piece."""


class TensorBalance:
    """One matrix, or a stack of them.

    Parameters
    ----------
    context, readers
        Of the task.
    name
        Of the tensor.
    source
        What it is made of.
    """

    def __init__(
        self, context: MergeContext, readers: InputReaders, name: str, source: Balanced
    ) -> None:
        self._context = context
        self._readers = readers
        self._source = source
        size = balance_size(source, context.backend.scratch_bytes, context.budget)
        self._how, self._size = size.how, size
        self._block_elements = size.block_elements
        self._merge = TensorMerge(context, readers, name, source.of, deltas_by=self._block_elements)

    def stats(self) -> Callable[[], TensorStats]:
        """Return a function that returns the statistics: of the deltas, element by element."""
        return self._merge.stats()

    def blocks(self) -> Iterator[Future[U8Array]]:
        """Submit block after block of the output, once the delta is merged."""
        with self._turn():
            delta = self._merged()
        source = self._source
        recipe = joining(source.of.recipe)
        prepared = prepare(recipe)
        assert isinstance(prepared, Ready)
        assert source.of.base is not None
        columns = open_columns(self._readers, Same((source.of.base,)))

        def join(start: int, stop: int) -> U8Array:
            (of_base,) = columns.views(start, stop)
            block = Block(start, stop, of_base, (delta[start:stop].view(np.uint8),))
            out = np.empty((stop - start) * itemsize(recipe.out_dtype), np.uint8)
            stats = self._context.backend.merge(recipe, prepared, block, out)
            columns.release(start, stop)
            self._merge.refuse_overflow(stats.num_overflow, start, stop, recipe.out_dtype)
            return out

        for start, stop in ranges(delta.size, self._block_elements):
            columns.prefetch(start, stop)
            yield self._context.compute.submit(join, start, stop)

    def wants(self) -> Iterator[list[Want]]:
        """Yield what each step of every pass asks of remote stores, in order."""
        source, how = self._source, self._how
        count = num_elements(source.of.recipe.shape)
        opened = open_columns(self._readers, source)
        assert source.of.base is not None
        base = open_columns(self._readers, Same((source.of.base,)))
        for start, stop in ranges(count, self._block_elements):
            yield opened.wants(start, stop)
        for number in range(how.num_matrices):
            for _ in range(1 if how.is_turned else 2):
                for start, stop in self._steps(number):
                    yield opened.wants(start, stop)
        for start, stop in ranges(count, self._block_elements):
            yield base.wants(start, stop)

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """Wait until no other worker of this process merges a matrix."""
        while not self._context.matrices.acquire(timeout=_LOOK_S):
            if self._context.cancelled.is_set():
                raise Cancelled
        try:
            yield
        finally:
            self._context.matrices.release()

    def _merged(self) -> FloatArray:
        """Return the merged delta of the whole tensor, flat."""
        merge = self._merge
        prepared = merge.prepared()
        in_flight = self._context.budget.blocks_in_flight
        _wait(in_order(merge.each(prepared, lambda data: None), in_flight))
        exponents = self._exponents()
        dtype = np.float64 if merge.recipe.out_dtype == "F64" else np.float32
        delta = np.zeros(num_elements(merge.recipe.shape), dtype)
        for number in range(self._how.num_matrices):
            if self._how.is_turned:
                self._solve(self._turned(number, prepared, delta), exponents)
            else:
                self._solve(self._straight(number, prepared, delta), exponents)
        return delta

    def _exponents(self) -> list[int]:
        """Return the exponents of the grids of the deltas, as they are after the drop."""
        settings = self._source.of.recipe.settings
        is_divided = settings.drop in ("magprune", "random") and settings.rescale == "inverse"
        exponents = []
        for m, expert in enumerate(self._merge.stats()().experts):
            least = settings.densities[m] - settings.epsilons[m] if is_divided else 1.0
            exponents.append(exponent_of(expert.delta_max_abs / least))
        return exponents

    def _steps(self, number: int) -> tuple[tuple[int, int], ...]:
        """Return the elements of each step of a matrix."""
        how = self._how
        first, size = number * how.rows * how.cols, self._size.step_rows * how.cols
        return tuple((first + a, first + b) for a, b in ranges(how.rows * how.cols, size))

    def _straight(self, number: int, prepared: Ready, delta: FloatArray) -> _Matrix:
        """Return a matrix whose rows are outputs: formed anew whenever it is asked for."""

        def put(start: int, stop: int, rows_rC: FloatArray) -> None:
            delta[start:stop] = rows_rC.reshape(-1)

        def deltas(start: int, stop: int) -> list[FloatArray]:
            found = self._merge.alone(prepared, start, stop)
            return [one.reshape(-1, self._how.cols) for one in found]

        return _Matrix(self._steps(number), deltas, put)

    def _turned(self, number: int, prepared: Ready, delta: FloatArray) -> _Matrix:
        """Return a matrix whose rows are inputs: it is held, since each step needs all of them."""
        how = self._how
        first = number * how.rows * how.cols
        held = [np.empty((how.cols, how.rows), delta.dtype) for _ in range(how.num_experts)]
        merged_RC = delta[first : first + how.rows * how.cols].reshape(how.rows, how.cols)

        def load(start: int, stop: int) -> None:
            rows = slice((start - first) // how.cols, (stop - first) // how.cols)
            for one, part in zip(held, self._merge.alone(prepared, start, stop), strict=True):
                one[:, rows] = part.reshape(-1, how.cols).T

        def put(start: int, stop: int, rows_rC: FloatArray) -> None:
            merged_RC[:, start:stop] = rows_rC.T

        self._run(load, self._steps(number), reads=True)
        steps = ranges(how.cols, max(1, self._size.step_rows * how.cols // how.rows))
        return _Matrix(tuple(steps), lambda start, stop: [one[start:stop] for one in held], put)

    def _solve(self, matrix: _Matrix, exponents: list[int]) -> None:
        """Merge a matrix: look at what every expert uses, then multiply."""
        settings = self._source.of.recipe.settings
        assert settings.balance is not None
        inputs = self._how.inputs
        grams = [np.zeros((inputs, inputs)) for _ in exponents]
        locks = [threading.Lock() for _ in exponents]
        reads = not self._how.is_turned

        def add(start: int, stop: int) -> None:
            for m, delta_rC in enumerate(matrix.deltas(start, stop)):
                part_CC = gram_of(delta_rC, exponents[m])
                with locks[m]:
                    np.add(grams[m], part_CC, out=grams[m])

        self._run(add, matrix.steps, reads=reads)
        ridge, weights = settings.balance.ridge, settings.weights
        found = solution(grams, exponents, weights, ridge, self._context.compute)
        if found is None:
            return

        def multiply(start: int, stop: int) -> None:
            matrix.put(start, stop, merged(found, matrix.deltas(start, stop), exponents))

        self._run(multiply, matrix.steps, reads=reads)

    def _run(
        self,
        function: Callable[[int, int], None],
        steps: Iterable[tuple[int, int]],
        *,
        reads: bool,
    ) -> None:
        """Call a function for every step, on the compute threads."""

        def submitted() -> Iterator[Future[None]]:
            for start, stop in steps:
                if reads:
                    self._merge.prefetch(start, stop)
                yield self._context.compute.submit(function, start, stop)

        _wait(in_order(submitted(), self._size.steps_in_flight))


def _wait(done: Iterable[None]) -> None:
    for _ in done:
        pass
