"""Matrices that are merged as a whole (`della_dist.ops.whole`).

Compute threads form the deltas step by step and multiply them, with one thread of BLAS each.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from functools import partial
from typing import Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from della_dist.errors import TensorDataError
from della_dist.ops.blocks import Block, BlockStats
from della_dist.ops.exact_products import HostProducts, Products
from della_dist.ops.prepare import Ready, prepare
from della_dist.ops.whole import Whole, whole
from della_dist.ops.wudi_dual import Product, WudiDual
from della_dist.ops.wudi_low_rank import low_rank_product
from della_dist.planning.balance_memory import balance_size
from della_dist.runtime.task.columns import open_columns
from della_dist.runtime.task.context import Blocks, Cancelled, MergeContext
from della_dist.runtime.task.in_order import in_order
from della_dist.runtime.task.inputs import InputReaders
from della_dist.runtime.task.tensor_merge import FloatArray, Look, TensorMerge, ranges
from della_dist.specs.dtypes import itemsize
from della_dist.specs.recipe import joining
from della_dist.specs.sources import Balanced
from della_dist.specs.statistics import TensorStats
from della_dist.storage.readahead import Want
from della_dist.storage.store import U8Array

T = TypeVar("T")
#: Measures elements, from, to, of the experts' deltas.
Count: TypeAlias = Callable[[int, int, list[U8Array]], None]


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
        self._name = name
        self._source = source
        self._size = balance_size(source, context.backend.scratch_bytes, context.budget)
        self._how = self._size.how
        self._merge = TensorMerge(
            context, readers, name, source.of, self._size.block_elements, self._how.num_matrices
        )
        self._largest = Largest(self._how.num_matrices, self._how.num_experts)
        self._joined: list[BlockStats] = []

    def stats(self) -> Callable[[], TensorStats]:
        """Return a function that returns the statistics: of the deltas, element by element."""
        return self._merge.stats(self._joined)

    def blocks(self) -> Blocks:
        """Submit block after block of the output.

        While they are made other workers of this process merge matrices only where there is memory
        for them as well: whoever goes through them closes this.
        """
        own_mem = self._size.own_mem if self._how.leaves_threads else None
        most = self._context.budget.block_mem - self._size.shared_mem
        with self._context.matrices.taken(own_mem, most, self._refuse_cancelled):
            merge = self._merge
            prepared = merge.prepared()
            if self._how.form != "low_rank":  # which counts as it joins
                in_flight = self._context.budget.blocks_in_flight
                measured = merge.each(prepared, lambda data: None, self._measuring(prepared))
                _wait(in_order(measured, in_flight))
            submit = self._submitting(prepared)
            for number in range(self._how.num_matrices):
                running: list[Future[U8Array]] = []
                for block in submit(number):
                    running = [*(one for one in running if not one.done()), block]
                    yield block
                wait(running)  # what they are made of goes before that of the next is there

    def wants(self) -> Iterator[list[Want]]:
        """Yield what each step of every pass asks of remote stores, in order."""
        source, how = self._source, self._how
        opened = open_columns(self._readers, source)
        passes = how.passes
        if how.form != "low_rank":
            passes -= 1
            for start, stop in self._merge.block_ranges():
                yield opened.wants(start, stop)
        for number in range(how.num_matrices):
            for _ in range(passes):
                for start, stop in self._steps(number):
                    yield opened.wants(start, stop)

    def _refuse_cancelled(self) -> None:
        if self._context.cancelled.is_set():
            raise Cancelled

    def _measuring(self, prepared: Ready) -> Look | None:
        """Return what finds the largest deltas of every matrix, where grids hang on them."""
        how, settings = self._how, self._source.of.recipe.settings
        if how.rule != "wudi" or how.form == "low_rank":
            return None

        def look(block: Block, stats: BlockStats) -> None:
            most = stats.max_abs
            if settings.drop != "none":  # what is divided by its probability may be larger
                left = self._merge.apart(prepared, block.start, block.stop, block.experts)
                most = np.array([max(one.max(), -one.min()) for one in left], np.float64)
            self._largest.add(block.start // (how.rows * how.cols), most)

        return look

    def _submitting(self, prepared: Ready) -> Callable[[int], Blocks]:
        """Return what submits a matrix, by its number."""
        how, settings = self._how, self._source.of.recipe.settings
        on_device = self._size.device_mem > 0
        products = self._context.backend.products(self._name) if on_device else HostProducts()
        match how.form:
            case "low_rank":
                return partial(self._low_rank, products=products, prepared=prepared)
            case "dual":
                dual = partial(WudiDual, settings, how, products=products)
                return lambda n: self._dual(n, prepared, dual(self._largest.of(n)))
            case "primal":
                new = partial(whole, how, settings, together=self._size.together, products=products)
                submit = self._turned if how.is_turned else self._straight
                return lambda n: submit(n, prepared, new(self._largest.of(n)))

    def _steps(self, number: int) -> Iterator[tuple[int, int]]:
        """Yield the elements of every so many rows of a matrix, as it is stored."""
        size = self._how.rows * self._how.cols
        for start, stop in ranges(size, self._size.step_rows * self._how.cols):
            yield number * size + start, number * size + stop

    def _straight(self, number: int, prepared: Ready, rule: Whole) -> Blocks:
        """Submit a matrix as it is stored, whose deltas are formed anew for every pass."""
        cols = self._how.cols

        def apart(start: int, stop: int, deltas: list[U8Array]) -> list[FloatArray]:
            left = self._merge.apart(prepared, start, stop, deltas)
            return [delta.reshape(-1, cols) for delta in left]

        def look(start: int, stop: int) -> list[FloatArray]:
            left = apart(start, stop, self._merge.deltas(start, stop)[1])
            self._merge.release(start, stop)
            return rule.look(left)

        for _ in range(self._how.looks):
            for seen in self._each(look, self._steps(number), reads=True):
                rule.take(seen, self._context.compute)
            with self._solving():
                rule.solve(self._context.compute)
        join = self._joining()

        def multiply(start: int, stop: int) -> U8Array:
            base, deltas = self._merge.deltas(start, stop)
            merged = rule.merged(apart(start, stop, deltas)).reshape(-1)
            out = join(start, stop, base, merged, deltas)
            self._merge.release(start, stop)
            return out

        for start, stop in self._steps(number):
            self._merge.prefetch(start, stop)
            yield self._context.compute.submit(multiply, start, stop)

    def _turned(self, number: int, prepared: Ready, rule: Whole) -> Blocks:
        """Submit a matrix merged as its transpose: held, since each of its rows needs all."""
        how = self._how
        first = number * how.rows * how.cols
        held = [np.empty((how.cols, how.rows), self._dtype) for _ in range(how.num_experts)]
        merged_RC = np.zeros((how.rows, how.cols), self._dtype)

        def load(start: int, stop: int) -> None:
            rows = slice((start - first) // how.cols, (stop - first) // how.cols)
            _, deltas = self._merge.deltas(start, stop)
            left = self._merge.apart(prepared, start, stop, deltas)
            for one, delta in zip(held, left, strict=True):
                one[:, rows] = delta.reshape(-1, how.cols).T
            self._merge.release(start, stop)

        def of_columns(start: int, stop: int) -> list[FloatArray]:
            return [one[start:stop] for one in held]

        def look(start: int, stop: int) -> list[FloatArray]:
            return rule.look(of_columns(start, stop))

        def multiply(start: int, stop: int) -> None:
            merged_RC[:, start:stop] = rule.merged(of_columns(start, stop)).T

        _wait(self._each(load, self._steps(number), reads=True))
        steps = tuple(ranges(how.cols, self._size.turned_rows))
        for _ in range(how.looks):
            for seen in self._each(look, steps, reads=False):
                rule.take(seen, self._context.compute)
            with self._solving():
                rule.solve(self._context.compute)
        _wait(self._each(multiply, steps, reads=False))
        yield from self._added(number, lambda start, stop: merged_RC[start:stop])

    def _dual(self, number: int, prepared: Ready, rule: WudiDual) -> Blocks:
        """Submit a matrix of fewer rows, of all experts, than columns: these are held."""
        cols = self._how.cols
        first = number * self._how.rows * cols

        def hold(start: int, stop: int) -> None:
            _, deltas = self._merge.deltas(start, stop)
            left = self._merge.apart(prepared, start, stop, deltas)
            rule.hold((start - first) // cols, [delta.reshape(-1, cols) for delta in left])
            self._merge.release(start, stop)

        _wait(self._each(hold, self._steps(number), reads=True))
        with self._solving():
            product = rule.solve(self._context.compute)
        yield from self._multiplied(number, product)

    def _low_rank(self, number: int, products: Products, prepared: Ready) -> Blocks:
        """Submit a matrix that only adapters change, of which no delta is formed but to count."""
        how = self._how
        experts = self._merge.terms(number, how.rows)
        settings = self._source.of.recipe.settings
        with self._solving():
            product = low_rank_product(experts, settings, how, self._context.compute, products)
        yield from self._multiplied(number, product, partial(self._merge.count, prepared))

    def _multiplied(
        self, number: int, product: Product | None, count: Count | None = None
    ) -> Blocks:
        """Submit what a product makes of the base; None: nothing is added."""
        how = self._how
        if product is None:
            return self._added(
                number, lambda start, stop: np.zeros((stop - start, how.cols)), count
            )
        return self._added(number, product.rows, count)

    def _added(
        self,
        number: int,
        rows_of: Callable[[int, int], FloatArray],
        count: Count | None = None,
    ) -> Blocks:
        """Submit a matrix whose merged delta follows from what is held.

        Parameters
        ----------
        number
            Of the matrix.
        rows_of
            Returns rows of the merged delta, as the matrix is stored.
        count
            Measures the experts' deltas, if that was not done before.
        """
        join, cols = self._joining(), self._how.cols
        first = number * self._how.rows * cols

        def joined(start: int, stop: int) -> U8Array:
            base, deltas = self._merge.deltas(start, stop)
            if count is not None:
                count(start, stop, deltas)
            merged = rows_of((start - first) // cols, (stop - first) // cols)
            out = join(start, stop, base, merged.reshape(-1), deltas)
            self._merge.release(start, stop)
            return out

        for start, stop in self._steps(number):
            self._merge.prefetch(start, stop)
            yield self._context.compute.submit(joined, start, stop)

    @contextlib.contextmanager
    def _solving(self) -> Iterator[None]:
        """Say of which tensor it is that nothing is found."""
        try:
            yield
        except np.linalg.LinAlgError as error:
            what = f"LAPACK finds no singular values of its deltas ({error})"
            advice = "Merge it with another method, or report its numbers."
            if self._how.rule == "wudi":
                what = f"{error}: its `ridge` is too small beside its deltas"
                advice = "Raise it; 0.05 is the default."
            raise TensorDataError(f"tensor {self._name}: {what}. {advice}") from error

    @property
    def _dtype(self) -> type[np.floating[Any]]:
        return np.float64 if self._merge.recipe.out_dtype == "F64" else np.float32

    def _joining(self) -> Callable[[int, int, U8Array, FloatArray, list[U8Array]], U8Array]:
        """Return what adds rows of the merged delta to those of the base.

        It is given those of the experts' deltas as well, which the merged one is compared with.
        """
        recipe = joining(self._source.of.recipe)
        prepared = prepare(recipe)
        assert isinstance(prepared, Ready)

        def join(
            start: int, stop: int, base: U8Array, merged: FloatArray, deltas: list[U8Array]
        ) -> U8Array:
            block = Block(start, stop, base, (merged.astype(self._dtype).view(np.uint8), *deltas))
            out = np.empty((stop - start) * itemsize(recipe.out_dtype), np.uint8)
            stats = self._context.backend.merge(recipe, prepared, block, out)
            self._merge.refuse_overflow(stats.num_overflow, start, stop, recipe.out_dtype)
            self._joined.append(stats)
            return out

        return join

    def _each(
        self,
        function: Callable[[int, int], T],
        steps: Iterable[tuple[int, int]],
        *,
        reads: bool,
    ) -> Iterator[T]:
        """Yield what a function makes of every step, in order; compute threads call it."""

        def submitted() -> Iterator[Future[T]]:
            for start, stop in steps:
                if reads:
                    self._merge.prefetch(start, stop)
                yield self._context.compute.submit(function, start, stop)

        return in_order(submitted(), self._size.steps_in_flight)


class Largest:
    """Which magnitudes the deltas of matrices have at most, as they are after the drop.

    Of every matrix of a stack by itself, so that none has the grid of another.
    """

    def __init__(self, num_matrices: int, num_experts: int) -> None:
        self._most = np.zeros((num_matrices, num_experts))
        self._lock = threading.Lock()

    def add(self, number: int, most: npt.NDArray[np.float64]) -> None:
        """Take the largest of a block of a matrix, (M,)."""
        with self._lock:
            np.maximum(self._most[number], most, out=self._most[number])

    def of(self, number: int) -> list[float]:
        """Return the largest of a matrix, of each expert."""
        return [float(one) for one in self._most[number]]


def _wait(done: Iterable[None]) -> None:
    for _ in done:
        pass
