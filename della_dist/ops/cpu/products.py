"""Products of matrices in Numba: every sum in one order, every product rounded by itself.

A library's products hang on its version, the processor and the number of threads. Here, which rows
or columns are computed together, and on which thread, cannot show. All in float64.
"""

from __future__ import annotations

import itertools
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

#: Rows or columns that one thread takes at once.
STRIP = 128
#: Columns that it takes at once where there are few rows.
WIDE_STRIP = 1024
#: Rows of factors that are multiplied at once: a tile's stay in the nearest cache.
DEPTH = 256


def product(left: F64Array, right: F64Array, pool: Executor | None = None) -> F64Array:
    """Return ``left.T @ right``: every sum in the order of the rows, by itself.

    Parameters
    ----------
    left, right
        (K, n) and (K, C) float64, contiguous.
    pool
        Threads to compute on; None: this one alone. The result is the same.

    Returns
    -------
    array
        (n, C) float64.
    """
    out = np.zeros((left.shape[1], right.shape[1]))
    rows = slice(0, len(left))

    def tile(place: tuple[slice, slice]) -> None:
        row, col = place
        add_products(Part(left, rows, row), Part(right, rows, col), 1.0, Part(out, row, col))

    places = itertools.product(strips(0, len(out)), strips(0, out.shape[1], WIDE_STRIP))
    done((map if pool is None else pool.map)(tile, places))
    return out


def strips(start: int, stop: int, size: int | None = None) -> Iterator[slice]:
    """Yield what of a range one thread takes at once, in order."""
    size = STRIP if size is None else size
    for first in range(start, stop, size):
        yield slice(first, min(first + size, stop))


def done(calls: Iterable[Any]) -> None:
    """Wait for calls, and raise what one of them raised."""
    for _ in calls:
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
