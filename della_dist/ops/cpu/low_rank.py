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
from della_dist.ops.cpu.support import Array, Number, entry, inner, source_digest

#: Columns at a time, whose sums stay in the nearest cache.
TILE_COLS = 1024


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
            (TILE_COLS,) float32: scratch.
        out
            (n, C) float32 or float64, added to.
        """
        _ = digest
        num_cols = right.shape[1]
        for first in range(0, num_cols, TILE_COLS):
            last = min(first + TILE_COLS, num_cols)
            total = sums[: last - first]
            for i in range(left.shape[0]):
                _product_row(left[i], right, first, total)
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
def _product_row(left: Array, right: Array, first: Number, total: Array) -> None:
    total[:] = np.float32(0)
    rank, last = left.size, first + total.size
    k = 0
    while k + 4 <= rank:  # fewer times to memory and back; the order is the same
        _add_four(
            left[k : k + 4],
            right[k, first:last],
            right[k + 1, first:last],
            right[k + 2, first:last],
            right[k + 3, first:last],
            total,
        )
        k += 4
    while k < rank:
        _add_scaled(right[k, first:last], left[k], total)
        k += 1


@inner
def _add_four(
    left: Array, first: Array, second: Array, third: Array, fourth: Array, total: Array
) -> None:
    wide_vectors()
    a, b, c, d = left[0], left[1], left[2], left[3]
    for j in range(total.size):
        total[j] = (((total[j] + a * first[j]) + b * second[j]) + c * third[j]) + d * fourth[j]


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
