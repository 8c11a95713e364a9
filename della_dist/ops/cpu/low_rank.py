"""Products of two matrices of low rank in Numba: the same bits wherever they are cut.

A library's product may add up in another order for another number of rows; these rows do not know
of each other. Every operation is rounded by itself, in the order that is written.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from della_dist.ops.cpu.intrinsics import wide_vectors
from della_dist.ops.cpu.support import Array, Number, Pack, entry, inner, source_digest

#: Columns and rows at a time, whose sums stay in the nearest cache. Rows share what is read of the
#: right matrix, which does not fit there.
TILE_COLS = 1024
TILE_ROWS = 4


@cache
def kernels() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return `add_product` and `add_dora`, compiled when they are first called."""
    digest = source_digest()

    @entry
    def add_product(left: Array, right: Array, scaling: Number, sums: Array, out: Array) -> None:
        """Add ``scaling * left @ right`` to `out`.

        Parameters
        ----------
        left, right
            (n, R) and (R, C) float32.
        scaling
            float32.
        sums
            (TILE_ROWS * TILE_COLS,) float32: scratch.
        out
            (n, C) float32 or float64, added to.
        """
        _ = digest
        num_rows, num_cols = out.shape
        for first in range(0, num_cols, TILE_COLS):
            last = min(first + TILE_COLS, num_cols)
            for top in range(0, num_rows, TILE_ROWS):
                _product_tile(left, right, top, first, last, sums)
                for i in range(top, min(top + TILE_ROWS, num_rows)):
                    start = (i - top) * TILE_COLS
                    total = sums[start : start + last - first]
                    _add_scaled(total, scaling, out[i, first:last])

    @entry
    def add_dora(delta: Array, weight: Array, magnitude: Array, out: Array) -> None:
        """Add to `out` what giving each row its length makes of ``weight + delta``.

        Parameters
        ----------
        delta, weight
            (n, C) float32; `delta` is overwritten.
        magnitude
            (n,) float32.
        out
            (n, C) float32 or float64, added to.
        """
        _ = digest
        for i in range(delta.shape[0]):
            _lengthened_row(delta[i], weight[i], magnitude[i], out[i])

    return add_product, add_dora


@inner
def _product_tile(
    left: Array, right: Array, top: Number, first: Number, last: Number, sums: Array
) -> None:
    """Write columns `first` to `last` of the product's rows from `top` on.

    Where there are too few rows, the last one takes the place of those that lack.
    """
    sums[:] = np.float32(0)
    final = left.shape[0] - 1
    a, b = left[top], left[min(top + 1, final)]
    c, d = left[min(top + 2, final)], left[min(top + 3, final)]
    rank = left.shape[1]
    k = 0
    while k + 4 <= rank:  # fewer times to memory and back; the order is the same
        rows = (
            right[k, first:last],
            right[k + 1, first:last],
            right[k + 2, first:last],
            right[k + 3, first:last],
        )
        _add_four(a[k : k + 4], b[k : k + 4], c[k : k + 4], d[k : k + 4], rows, sums)
        k += 4
    while k < rank:
        _add_one(a[k], b[k], c[k], d[k], right[k, first:last], sums)
        k += 1


@inner
def _add_four(a: Array, b: Array, c: Array, d: Array, rows: Pack, sums: Array) -> None:
    """Add to each row of sums four rows, times the four numbers of `a`, `b`, `c` or `d`."""
    wide_vectors()
    w, x, y, z = rows
    a0, a1, a2, a3 = a[0], a[1], a[2], a[3]
    b0, b1, b2, b3 = b[0], b[1], b[2], b[3]
    c0, c1, c2, c3 = c[0], c[1], c[2], c[3]
    d0, d1, d2, d3 = d[0], d[1], d[2], d[3]
    # One array of sums: with four, LLVM has too much to check that could overlap for vectors.
    in_b, in_c, in_d = TILE_COLS, 2 * TILE_COLS, 3 * TILE_COLS
    for j in range(w.size):
        p, q, r, s = w[j], x[j], y[j], z[j]
        sums[j] = (((sums[j] + a0 * p) + a1 * q) + a2 * r) + a3 * s
        at = in_b + j
        sums[at] = (((sums[at] + b0 * p) + b1 * q) + b2 * r) + b3 * s
        at = in_c + j
        sums[at] = (((sums[at] + c0 * p) + c1 * q) + c2 * r) + c3 * s
        at = in_d + j
        sums[at] = (((sums[at] + d0 * p) + d1 * q) + d2 * r) + d3 * s


@inner
def _add_one(a: Number, b: Number, c: Number, d: Number, row: Array, sums: Array) -> None:
    for i in range(TILE_ROWS):
        factor = (a, b, c, d)[i]
        _add_scaled(row, factor, sums[i * TILE_COLS : i * TILE_COLS + row.size])


@inner
def _add_scaled(row: Array, factor: Number, out: Array) -> None:
    wide_vectors()
    for j in range(out.size):
        out[j] += row[j] * factor


@inner
def _lengthened_row(delta: Array, weight: Array, magnitude: Number, out: Array) -> None:
    squares = np.float64(0)
    for j in range(delta.size):
        delta[j] += weight[j]
        squares += np.float64(delta[j]) * np.float64(delta[j])
    factor = magnitude / np.float32(np.sqrt(squares))
    for j in range(delta.size):
        out[j] += factor * delta[j] - weight[j]
