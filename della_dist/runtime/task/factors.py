"""Factors of the delta of a matrix, of which an adapter consists.

The delta is formed step by step, as often as `della_dist.specs.factoring` says. Compute threads
work on steps, and the task's own thread adds up what they make, in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import TypeVar

import numpy as np

from della_dist.errors import TensorDataError
from della_dist.ops.factoring import (
    Delta,
    F64Array,
    Factors,
    factors_along,
    factors_of,
    first_basis,
    fused_weight,
    joined,
    orthonormal,
    seen,
    turned,
)
from della_dist.planning.factor_memory import WRITTEN_BYTES, factor_size
from della_dist.runtime.task.columns import GatheredColumns, open_columns
from della_dist.runtime.task.context import Blocks, MergeContext
from della_dist.runtime.task.in_order import in_order
from della_dist.runtime.task.inputs import InputReaders
from della_dist.runtime.task.kept_factors import KeptFactors
from della_dist.runtime.task.tensor_merge import TensorMerge, ranges
from della_dist.specs.dtypes import num_elements
from della_dist.specs.factoring import TURNS, Factoring, factoring
from della_dist.specs.reading import passes
from della_dist.specs.sources import Adapted, Factor, LowRank
from della_dist.specs.statistics import TensorStats
from della_dist.storage.readahead import Want
from della_dist.storage.store import U8Array

T = TypeVar("T")


class TensorFactors:
    """The two factors of one matrix, made when the first of them is asked for.

    Parameters
    ----------
    context, readers
        Of the task.
    name
        Of the tensor that is asked for first, for messages.
    source
        What that is.
    kept
        Those that an earlier attempt has made; None: none are kept.
    """

    def __init__(
        self,
        context: MergeContext,
        readers: InputReaders,
        name: str,
        source: Factor,
        kept: KeptFactors | None = None,
    ) -> None:
        self._kept = kept
        self._context = context
        self._readers = readers
        self._name = name
        self._source = source
        self._factors: Factors | None = None
        self._stats: list[TensorStats] = []

    def is_of(self, source: Factor) -> bool:
        """Return whether these are the factors of the same matrix."""
        return source.of == self._source.of

    def blocks(self, source: Factor) -> Blocks:
        """Submit what is written of a factor, piece after piece."""
        if self._factors is None:
            self._factors = self._joined() if source.is_sum else self._factored()
        matrix = self._factors.left_RK if source.side == "left" else self._factors.right_KC
        written = np.ascontiguousarray(matrix.T if source.is_turned else matrix)
        data = written.reshape(-1).view(np.uint8)
        for start, stop in ranges(data.size, WRITTEN_BYTES):
            yield self._context.compute.submit(np.array, data[start:stop])

    def stats(self) -> Callable[[], TensorStats]:
        """Return a function that returns what was measured, once the factors are made.

        It outlives them, and so holds on to nothing else.
        """
        stats = self._stats
        return lambda: stats[0]

    def wants(self) -> Iterator[list[Want]]:
        """Yield what each step of every pass asks of remote stores, in order."""
        opened = open_columns(self._readers, self._source)
        if self._source.is_sum:
            yield opened.wants(0, 0)
            return
        recipe = self._source.of.recipe
        if self._kept is not None and self._kept.has(recipe.name):
            return
        step = factoring(recipe, self._source.rank).step_elements
        for _ in range(passes(self._source)[0]):
            for start, stop in ranges(num_elements(recipe.shape), step):
                yield opened.wants(start, stop)

    def _joined(self) -> Factors:
        """Return the factors of adapters, one behind the other, times what each counts."""
        recipe = self._source.of.recipe
        settings = recipe.settings
        share = settings.lambda_ / (fused_weight(settings.weights) if settings.normalize else 1.0)
        opened = open_columns(self._readers, self._source)
        assert isinstance(opened, GatheredColumns)
        products = []
        for expert, weight in zip(self._source.of.experts, settings.weights, strict=True):
            assert isinstance(expert, Adapted)
            for term in expert.terms if weight else ():
                assert isinstance(term, LowRank)
                left_GRK, right_GKC = opened.factors_of(term)
                if not (np.isfinite(left_GRK).all() and np.isfinite(right_GKC).all()):
                    where = self._context.plan.inputs[expert.checkpoint].location
                    raise TensorDataError(
                        f"tensor {self._name}: the matrices of {where} have numbers that are NaN "
                        "or infinite. The adapter is damaged; replace it."
                    )
                products.append((left_GRK[0], right_GKC[0], share * weight * term.scaling))
        rows, cols = recipe.shape
        factors = joined(products, (rows, cols))
        self._stats.append(
            TensorStats(num_elements(recipe.shape), 0, energy=1.0, norm=factors.norm)
        )
        return factors

    def _factored(self) -> Factors:
        """Return the best factors of the merged delta."""
        recipe = self._source.of.recipe
        name, how = recipe.name, factoring(recipe, self._source.rank)
        found = None if self._kept is None else self._kept.load(name, how)
        if found is None:
            found = self._made(how)
            if self._kept is not None:
                self._kept.save(name, how, *found)
        factors, stats = found
        self._stats.append(stats)
        return factors

    def _made(self, how: Factoring) -> tuple[Factors, TensorStats]:
        source = self._source
        size = factor_size(source, self._context.backend.scratch_bytes, self._context.budget)
        deltas = _Deltas(
            TensorMerge(
                self._context, self._readers, self._name, source.of, deltas_by=how.step_elements
            ),
            how,
            size.steps_in_flight,
        )
        if how.is_whole:
            delta_RC = np.empty((how.rows, how.cols))
            _fill(delta_RC, deltas.each(partial(np.asarray, dtype=np.float64)))
            factors = factors_of(delta_RC, how.rank)
        else:
            basis_CL = first_basis(source.of.recipe, how.cols, how.columns)
            for _ in range(TURNS):
                total_CL = np.zeros_like(basis_CL)
                for part_CL in deltas.each(partial(turned, basis_CL=basis_CL)):
                    total_CL += part_CL
                basis_CL = orthonormal(total_CL)
            seen_RL = np.empty((how.rows, how.columns))
            squares: list[float] = []
            _fill(seen_RL, _first(deltas.each(partial(seen, basis_CL=basis_CL)), squares))
            factors = factors_along(seen_RL, basis_CL, how.rank, squares)
        return factors, replace(deltas.stats(), energy=factors.energy, norm=factors.norm)


class _Deltas:
    """The merged delta of a matrix, in steps of whole rows, as often as it is asked for."""

    def __init__(self, merge: TensorMerge, how: Factoring, in_flight: int) -> None:
        self._merge = merge
        self._prepared = merge.prepared()
        self._dtype = np.float64 if merge.recipe.out_dtype == "F64" else np.float32
        self._how = how
        self._in_flight = in_flight

    def each(self, use: Callable[[Delta], T]) -> Iterator[T]:
        """Yield what `use` makes of every step, (rows, C), in order; compute threads call it."""

        def used(raw: U8Array) -> T:
            return use(raw.view(self._dtype).reshape(-1, self._how.cols))

        return in_order(self._merge.each(self._prepared, used), self._in_flight)

    def stats(self) -> TensorStats:
        """Return the statistics of the merge, once all steps were taken."""
        return self._merge.stats()()


def _fill(into: F64Array, parts: Iterable[F64Array]) -> None:
    done = 0
    for part in parts:
        into[done : done + len(part)] = part
        done += len(part)


def _first(pairs: Iterable[tuple[F64Array, float]], seconds: list[float]) -> Iterator[F64Array]:
    """Yield the first of each pair, and keep the second."""
    for first, second in pairs:
        seconds.append(second)
        yield first
