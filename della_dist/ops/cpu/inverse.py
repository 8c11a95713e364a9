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
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from della_dist.ops.cpu.intrinsics import TILE_COLS, TILE_ROWS, add_tile, wide_vectors
from della_dist.ops.cpu.support import (
    Array,
    Number,
    Pack,
    entry,
    inlined,
    inner,
    source_digest,
)

F64Array = npt.NDArray[np.float64]

#: Rows that are factored one after another before the rest hears of them.
PANEL_ROWS = 64
#: Rows or columns that one thread takes at once.
STRIP = 128
#: Rows of factors that are multiplied at once: a tile's stay in the nearest cache.
DEPTH = 256


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
    factor_block, finish_rows, solve_rows = kernels()
    submit: Callable[..., Iterable[Any]] = map if pool is None else pool.map
    roots = np.zeros(PANEL_ROWS)
    for start in range(0, n, PANEL_ROWS):
        panel = slice(start, min(start + PANEL_ROWS, n))
        if not factor_block(matrix, panel.start, panel.stop, roots):
            raise ValueError("the matrix is not positive definite")

        def finish(cols: slice, panel: slice = panel) -> None:
            finish_rows(matrix, panel.start, panel.stop, cols.start, cols.stop, roots)

        def update(rows: slice, panel: slice = panel) -> None:
            cols = slice(rows.start, n)
            left, right = Part(matrix, panel, rows), Part(matrix, panel, cols)
            add_products(left, right, -1.0, Part(matrix, rows, cols))

        _all(submit(finish, _strips(panel.stop, n)))
        _all(submit(update, _strips(panel.stop, n)))
    inverted = np.zeros((n, n))

    def solve(cols: slice) -> None:
        for start in range(cols.start, n, PANEL_ROWS):
            rows, known = slice(start, min(start + PANEL_ROWS, n)), slice(cols.start, start)
            left, right = Part(matrix, known, rows), Part(inverted, known, cols)
            add_products(left, right, -1.0, Part(inverted, rows, cols))
            solve_rows(matrix[rows, rows], start - cols.start, inverted[rows, cols])

    _all(submit(solve, _strips(0, n)))
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

    _all(submit(square, _strips(0, n)))
    _all(submit(reflect, _strips(0, n)))
    return result


def _strips(start: int, stop: int) -> Iterator[slice]:
    for first in range(start, stop, STRIP):
        yield slice(first, min(first + STRIP, stop))


def _all(done: Iterable[Any]) -> None:
    for _ in done:
        pass


class Part(NamedTuple):
    """Rows and columns of a contiguous matrix."""

    matrix: F64Array
    rows: slice
    cols: slice


def add_products(left: Part, right: Part, sign: float, out: Part) -> None:
    """Add ``sign * left.T @ right`` to `out`: every sum in the order of the rows, by itself.

    Parameters
    ----------
    left, right
        (K, n) and (K, C) float64.
    sign
        1.0 or -1.0.
    out
        (n, C) float64, added to.
    """
    num_rows = out.rows.stop - out.rows.start
    packed = np.empty(DEPTH * (num_rows + TILE_ROWS))
    strip, tile = np.empty(DEPTH * TILE_COLS), np.empty(TILE_ROWS * TILE_COLS)
    _add_packed()(
        (left.matrix, left.rows.start, left.cols.start),
        (right.matrix, right.rows.start, right.cols.start),
        (out.matrix, out.rows.start, out.cols.start),
        (left.rows.stop - left.rows.start, num_rows, out.cols.stop - out.cols.start),
        sign,
        (packed, strip, tile),
    )


@cache
def _add_packed() -> Callable[..., None]:
    digest = source_digest()

    @entry
    def add_packed(
        left: Pack, right: Pack, out: Pack, size: Pack, sign: Number, scratch: Pack
    ) -> None:
        """See `add_products`; matrices with their first row and column, and K, n and C."""
        _ = digest
        wide_vectors()
        (lefts, left_row, left_col), (rights, right_row, right_col) = left, right
        outs, out_row, out_col = out
        length, num_rows, num_cols = size
        packed, strip, tile = scratch
        for k in range(0, length, DEPTH):
            depth = min(DEPTH, length - k)
            _pack(lefts, left_row + k, left_col, num_rows, depth, sign, packed)
            for col in range(0, num_cols, TILE_COLS):
                cols = min(TILE_COLS, num_cols - col)
                for q in range(depth):
                    row = rights[right_row + k + q]
                    _copy(row, right_col + col, strip, q * TILE_COLS, cols)
                for first in range(0, num_rows, TILE_ROWS):
                    rows = min(TILE_ROWS, num_rows - first)
                    for i in range(rows):
                        row = outs[out_row + first + i]
                        _copy(row, out_col + col, tile, i * TILE_COLS, cols)
                    at = first * depth
                    add_tile(packed[at : at + TILE_ROWS * depth], strip[: TILE_COLS * depth], tile)
                    for i in range(rows):
                        row = outs[out_row + first + i]
                        _copy(tile, i * TILE_COLS, row, out_col + col, cols)

    return add_packed


@inner
def _pack(
    matrix: Array,
    row: Number,
    col: Number,
    num_cols: Number,
    depth: Number,
    sign: Number,
    packed: Array,
) -> None:
    """Copy columns of some rows, those of one tile after those of another."""
    for q in range(depth):
        values = matrix[row + q]
        for j in range(num_cols):
            tile, i = j // TILE_ROWS, j % TILE_ROWS
            packed[(tile * depth + q) * TILE_ROWS + i] = sign * values[col + j]


@inlined
def _copy(source: Array, first: Number, out: Array, start: Number, n: Number) -> None:
    """Copy numbers of a tile: mostly a whole row of it."""
    if n == TILE_COLS:
        for j in range(TILE_COLS):
            out[start + j] = source[first + j]
    else:
        for j in range(n):
            out[start + j] = source[first + j]


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
