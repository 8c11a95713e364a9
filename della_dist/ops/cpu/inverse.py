"""The inverse of a symmetric positive definite matrix in Numba: the same bits on every machine.

A library's inverse hangs on its version, the processor and the number of threads. Here every number
is a sum in one order, of products that are rounded by themselves: with ``A = U' U`` (Cholesky) and
``W = U'^-1``, the inverse is ``W' W``. Which rows or columns are computed together, and on which
thread, cannot show. All in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from della_dist.ops.cpu.intrinsics import wide_vectors
from della_dist.ops.cpu.support import Array, Number, entry, inner, source_digest

F64Array = npt.NDArray[np.float64]

#: Rows that are factored one after another before the rest hears of them.
PANEL_ROWS = 64
#: Rows or columns that one thread takes at once.
STRIP = 128
#: Columns at a time, so that eight rows of them stay in the nearest cache.
TILE_COLS = 256


def inverse(matrix: F64Array, pool: Executor | None = None) -> F64Array:
    """Return the inverse of a symmetric positive definite matrix.

    Parameters
    ----------
    matrix
        (n, n) float64, contiguous. Overwritten; its lower half is not read.
    pool
        Threads to compute on; None: this one alone. The result is the same.

    Raises
    ------
    ValueError
        If it is not positive definite.
    """
    n = len(matrix)
    add_products, factor_panel, solve_rows = kernels()
    submit: Callable[..., Iterable[Any]] = map if pool is None else pool.map
    for start in range(0, n, PANEL_ROWS):
        stop = min(start + PANEL_ROWS, n)
        if not factor_panel(matrix[start:stop], start):
            raise ValueError("the matrix is not positive definite")
        panel = matrix[start:stop]

        def update(rows: slice, panel: F64Array = panel) -> None:
            first = rows.start
            add_products(panel[:, rows], panel[:, first:], -1.0, matrix[rows, first:])

        _all(submit(update, _strips(stop, n)))
    inverted = np.zeros((n, n))

    def solve(cols: slice) -> None:
        for start in range(cols.start, n, PANEL_ROWS):
            stop = min(start + PANEL_ROWS, n)
            block = inverted[start:stop, cols]
            known = slice(cols.start, start)
            add_products(matrix[known, start:stop], inverted[known, cols], -1.0, block)
            solve_rows(matrix[start:stop, start:stop], start - cols.start, block)

    _all(submit(solve, _strips(0, n)))
    result = matrix  # its factors are no longer needed
    result[:] = 0.0

    def square(rows: slice) -> None:
        known = inverted[rows.start :]
        add_products(known[:, rows], known[:, : rows.stop], 1.0, result[rows, : rows.stop])

    _all(submit(square, _strips(0, n)))
    for rows in _strips(0, n):
        result[: rows.stop, rows] = np.where(
            np.arange(rows.stop)[:, None] <= np.arange(rows.start, rows.stop),
            result[rows, : rows.stop].T,
            result[: rows.stop, rows],
        )
    return result


def _strips(start: int, stop: int) -> Iterator[slice]:
    for first in range(start, stop, STRIP):
        yield slice(first, min(first + STRIP, stop))


def _all(done: Iterable[Any]) -> None:
    for _ in done:
        pass


@cache
def kernels() -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """Return `add_products`, `factor_panel` and `solve_rows`, compiled when first called."""
    digest = source_digest()

    @entry
    def add_products(left: Array, right: Array, sign: Number, out: Array) -> None:
        """Add ``sign * left.T @ right`` to `out`, products in the order of the rows.

        Parameters
        ----------
        left, right
            (K, n) and (K, C) float64.
        sign
            1.0 or -1.0.
        out
            (n, C) float64, added to.
        """
        _ = digest
        for first in range(0, out.shape[1], TILE_COLS):
            last = min(first + TILE_COLS, out.shape[1])
            k = 0
            while k + 8 <= left.shape[0]:
                for i in range(out.shape[0]):
                    rows = right[k : k + 8, first:last]
                    _add_eight(left[k : k + 8, i], rows, sign, out[i, first:last])
                k += 8
            while k < left.shape[0]:
                for i in range(out.shape[0]):
                    _add_scaled(right[k, first:last], sign * left[k, i], out[i, first:last])
                k += 1

    @entry
    def factor_panel(panel: Array, start: Number) -> bool:
        """Turn rows of a matrix into those of its factor; `start` is the first one's number."""
        _ = digest
        for i in range(panel.shape[0]):
            pivot = panel[i, start + i]
            if not pivot > 0.0:
                return False
            root = np.sqrt(pivot)
            for j in range(start + i, panel.shape[1]):
                panel[i, j] /= root
            for other in range(i + 1, panel.shape[0]):
                first = start + other
                _add_scaled(panel[i, first:], -panel[i, first], panel[other, first:])
        return True

    @entry
    def solve_rows(factor: Array, first: Number, rows: Array) -> None:
        """Finish rows of the inverse factor, from which all rows before them are subtracted.

        Parameters
        ----------
        factor
            (n, n) float64: the upper triangle at these rows.
        first
            Which column is that of the first row's diagonal, of those that are here.
        rows
            (n, C) float64, overwritten.
        """
        _ = digest
        for i in range(rows.shape[0]):
            if first + i < rows.shape[1]:
                rows[i, first + i] += 1.0
            for other in range(i):
                _add_scaled(rows[other], -factor[other, i], rows[i])
            for j in range(rows.shape[1]):
                rows[i, j] /= factor[i, i]

    return add_products, factor_panel, solve_rows


@inner
def _add_eight(left: Array, right: Array, sign: Number, out: Array) -> None:
    wide_vectors()
    a, b, c, d = sign * left[0], sign * left[1], sign * left[2], sign * left[3]
    e, f, g, h = sign * left[4], sign * left[5], sign * left[6], sign * left[7]
    for j in range(out.size):
        s = (((out[j] + a * right[0, j]) + b * right[1, j]) + c * right[2, j]) + d * right[3, j]
        out[j] = (((s + e * right[4, j]) + f * right[5, j]) + g * right[6, j]) + h * right[7, j]


@inner
def _add_scaled(row: Array, factor: Number, out: Array) -> None:
    wide_vectors()
    for j in range(out.size):
        out[j] += row[j] * factor
