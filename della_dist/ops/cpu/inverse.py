"""The inverse of a symmetric positive definite matrix in Numba: the same bits on every machine.

A library's inverse hangs on its version, the processor and the number of threads. Here every number
is a sum in one order, of products that are rounded by themselves: with ``A = U' U`` (Cholesky) and
``W = U'^-1``, the inverse is ``W' W``. Which rows or columns are computed together, and on which
thread, cannot show. All in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from functools import cache
from typing import Any

import numpy as np

from della_dist.ops.cpu.intrinsics import wide_vectors
from della_dist.ops.cpu.products import F64Array, Part, add_products, done, strips
from della_dist.ops.cpu.support import Array, Number, entry, inner, source_digest

#: Rows that are factored one after another before the rest hears of them.
PANEL_ROWS = 64


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
    numpy.linalg.LinAlgError
        If it is not positive definite.
    """
    n = len(matrix)
    factor_block, finish_rows, solve_rows = kernels()
    submit: Callable[..., Iterable[Any]] = map if pool is None else pool.map
    roots = np.zeros(PANEL_ROWS)
    for start in range(0, n, PANEL_ROWS):
        panel = slice(start, min(start + PANEL_ROWS, n))
        if not factor_block(matrix, panel.start, panel.stop, roots):
            raise np.linalg.LinAlgError("the matrix is not positive definite")

        def finish(cols: slice, panel: slice = panel) -> None:
            finish_rows(matrix, panel.start, panel.stop, cols.start, cols.stop, roots)

        def update(rows: slice, panel: slice = panel) -> None:
            cols = slice(rows.start, n)
            left, right = Part(matrix, panel, rows), Part(matrix, panel, cols)
            add_products(left, right, -1.0, Part(matrix, rows, cols))

        done(submit(finish, strips(panel.stop, n)))
        done(submit(update, strips(panel.stop, n)))
    inverted = np.zeros((n, n))

    def solve(cols: slice) -> None:
        for start in range(cols.start, n, PANEL_ROWS):
            rows, known = slice(start, min(start + PANEL_ROWS, n)), slice(cols.start, start)
            left, right = Part(matrix, known, rows), Part(inverted, known, cols)
            add_products(left, right, -1.0, Part(inverted, rows, cols))
            solve_rows(matrix[rows, rows], start - cols.start, inverted[rows, cols])

    done(submit(solve, strips(0, n)))
    result = matrix  # its factors are no longer needed
    result[:] = 0.0

    def square(rows: slice) -> None:
        known, cols = slice(rows.start, n), slice(0, rows.stop)
        left, right = Part(inverted, known, rows), Part(inverted, known, cols)
        add_products(left, right, 1.0, Part(result, rows, cols))

    def reflect(rows: slice) -> None:
        result[: rows.stop, rows] = np.where(
            np.arange(rows.stop)[:, None] <= np.arange(rows.start, rows.stop),
            result[rows, : rows.stop].T,
            result[: rows.stop, rows],
        )

    done(submit(square, strips(0, n)))
    done(submit(reflect, strips(0, n)))
    return result


@cache
def kernels() -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """Return `factor_block`, `finish_rows` and `solve_rows`, compiled when first called."""
    digest = source_digest()

    @entry
    def factor_block(matrix: Array, start: Number, stop: Number, roots: Array) -> bool:
        """Turn rows of a matrix into those of its factor, up to column `stop`; keep the roots."""
        _ = digest
        for i in range(start, stop):
            pivot = matrix[i, i]
            if not pivot > 0.0:
                return False
            roots[i - start] = np.sqrt(pivot)
            for j in range(i, stop):
                matrix[i, j] /= roots[i - start]
            for other in range(i + 1, stop):
                _add_scaled(matrix[i, other:stop], -matrix[i, other], matrix[other, other:stop])
        return True

    @entry
    def finish_rows(
        matrix: Array, start: Number, stop: Number, first: Number, last: Number, roots: Array
    ) -> None:
        """Turn columns of the same rows into those of the factor."""
        _ = digest
        for i in range(start, stop):
            row = matrix[i, first:last]
            for j in range(row.size):
                row[j] /= roots[i - start]
            for other in range(i + 1, stop):
                _add_scaled(row, -matrix[i, other], matrix[other, first:last])

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

    return factor_block, finish_rows, solve_rows


@inner
def _add_scaled(row: Array, factor: Number, out: Array) -> None:
    wide_vectors()
    for j in range(out.size):
        out[j] += row[j] * factor
