"""Products of matrices of integers in float64: exact, and so the same bytes wherever they are made.

Whoever asks sees to it that no sum reaches 2**53. C columns, r rows of a step.
"""

from __future__ import annotations

import threading
from typing import Any, Protocol, TypeAlias

import numpy as np

from della_dist.ops.grids import F64Array

#: A square matrix where it is multiplied: on the host an array, on a device what is there of it.
Held: TypeAlias = Any


class Products(Protocol):
    """Where the products of one matrix are computed; any number of threads may ask at once."""

    def zeros(self, num_cols: int) -> Held:
        """Return a (C, C) sum that is zero."""

    def add_square(self, total: Held, grid_rC: F64Array) -> None:
        """Add ``q' q`` to a sum of `zeros`."""

    def fetch(self, total: Held) -> F64Array:
        """Return a sum, which is no more added to."""

    def hold(self, matrix_CC: F64Array) -> Held:
        """Return a matrix as a factor for `multiply`."""

    def multiply(self, grid_rC: F64Array, factor: Held, out_rC: F64Array) -> None:
        """Write ``q`` times a factor of `hold`; all three are contiguous."""


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

    def hold(self, matrix_CC: F64Array) -> F64Array:
        """Return the matrix."""
        return matrix_CC

    def multiply(self, grid_rC: F64Array, factor: F64Array, out_rC: F64Array) -> None:
        """Write ``q`` times a factor."""
        np.matmul(grid_rC, factor, out=out_rC)


class PerThread(threading.local):
    """An array of each thread that asks, for all its steps: new memory costs as much as sums."""

    _array: F64Array | None = None

    def array(self, shape: tuple[int, ...]) -> F64Array:
        """Return the one of the thread that asks; its numbers are those of the last step."""
        if self._array is None or self._array.shape != shape:
            self._array = np.empty(shape)
        return self._array
