"""Products of matrices of integers in float64: exact, and so the same bytes wherever they are made.

Whoever asks sees to it that no sum goes beyond 2**53. C columns, r rows of a step, N rows that are
held, K terms of a sum.
"""

from __future__ import annotations

import threading
from concurrent.futures import Executor
from typing import Any, Protocol, TypeAlias

import numpy as np

from della_dist.ops.grids import F64Array
from della_dist.specs.balancing import STRIP_ROWS

#: A matrix where it is multiplied: on the host an array, on a device what is there of it.
Held: TypeAlias = Any


class Products(Protocol):
    """Where the products of one matrix are computed; any number of threads may ask at once."""

    def zeros(self, num_cols: int) -> Held:
        """Return a (C, C) sum that is zero."""

    def add_square(self, total: Held, grid_rC: F64Array) -> None:
        """Add ``q' q`` to a sum of `zeros`."""

    def fetch(self, total: Held) -> F64Array:
        """Return a sum, which is no more added to."""

    def gram(self, rows_NC: F64Array, pool: Executor) -> F64Array:
        """Return the products of all rows with one another, (N, N)."""

    def hold(self, matrix_KC: F64Array) -> Held:
        """Return a matrix as a factor for `multiply`."""

    def multiply(self, grid_rK: F64Array, factor: Held, out_rC: F64Array) -> None:
        """Write ``q`` times a factor of `hold`, to what is contiguous; no zero is negative."""


class HostProducts:
    """On the host, by BLAS."""

    def __init__(self) -> None:
        self._parts = PerThread()
        self._locks: dict[int, threading.Lock] = {}

    def zeros(self, num_cols: int) -> F64Array:
        """Return a (C, C) sum that is zero."""
        total_CC = np.zeros((num_cols, num_cols))
        self._locks[id(total_CC)] = threading.Lock()
        return total_CC

    def add_square(self, total: F64Array, grid_rC: F64Array) -> None:
        """Add ``q' q`` to a sum of `zeros`."""
        part_CC = self._parts.array(total.shape)
        np.matmul(grid_rC.T, grid_rC, out=part_CC)
        with self._locks[id(total)]:
            np.add(total, part_CC, out=total)

    def fetch(self, total: F64Array) -> F64Array:
        """Return the sum."""
        del self._locks[id(total)]
        self._parts = PerThread()  # what follows takes their room
        return total

    def gram(self, rows_NC: F64Array, pool: Executor) -> F64Array:
        """Return the products of all rows with one another: each is found once."""
        gram_NN = np.empty((len(rows_NC), len(rows_NC)))

        def multiply(start: int) -> None:
            strip = slice(start, start + STRIP_ROWS)
            part = np.matmul(rows_NC[strip], rows_NC[start:].T)
            gram_NN[strip, start:] = part
            gram_NN[start:, strip] = part.T

        list(pool.map(multiply, range(0, len(rows_NC), STRIP_ROWS)))
        return gram_NN

    def hold(self, matrix_KC: F64Array) -> F64Array:
        """Return the matrix."""
        return matrix_KC

    def multiply(self, grid_rK: F64Array, factor: F64Array, out_rC: F64Array) -> None:
        """Write ``q`` times a factor."""
        np.matmul(grid_rK, factor, out=out_rC)
        np.add(out_rC, 0.0, out=out_rC)  # of one term -0 may come, or 0: libraries differ


class PerThread(threading.local):
    """An array of each thread that asks, for all its steps: new memory costs as much as sums."""

    _array: F64Array | None = None

    def array(self, shape: tuple[int, ...]) -> F64Array:
        """Return the one of the thread that asks; its numbers are those of the last step."""
        if self._array is None or self._array.shape != shape:
            self._array = np.empty(shape)
        return self._array
