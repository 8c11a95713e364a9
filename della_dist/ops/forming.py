"""Tensors that no file holds, formed of rows that files hold: bytes in, bytes out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from della_dist.ops.blocks import U8Array
from della_dist.ops.cpu.low_rank import TILE_COLS, TILE_ROWS, kernels
from della_dist.ops.rounding import narrow, widen
from della_dist.specs.dtypes import itemsize

#: Numbers that are widened at once, so that they stay in cache.
_CHUNK_ELEMENTS = 16 << 10


def converted(raw: U8Array, dtype: str, to: str) -> U8Array:
    """Return the bytes of `raw`, numbers of `dtype`, as the same numbers of `to`.

    Parameters
    ----------
    raw
        (n * itemsize,) uint8.
    dtype, to
        F16, BF16, F32 or F64; `to` holds every number of `dtype`, or is it.
    """
    if dtype == to:
        return raw
    return widen(raw, dtype).astype(np.float64 if to == "F64" else np.float32).view(np.uint8)


def difference(raw: U8Array, dtype: str, base: U8Array, base_dtype: str, to: str) -> U8Array:
    """Return the bytes of `raw` less `base`, number by number: of `to`, float32 or float64.

    Both are exact in it; their difference is rounded once, as kernels do that subtract.
    """
    compute = np.float64 if to == "F64" else np.float32
    size, base_size = itemsize(dtype), itemsize(base_dtype)
    delta = np.empty(raw.size // size, compute)
    with np.errstate(all="ignore"):  # what is no number stays so, and is found by the merge
        for start in range(0, delta.size, _CHUNK_ELEMENTS):
            stop = min(start + _CHUNK_ELEMENTS, delta.size)
            np.subtract(
                widen(raw[start * size : stop * size], dtype).astype(compute, copy=False),
                widen(base[start * base_size : stop * base_size], base_dtype),
                out=delta[start:stop],
            )
    return delta.view(np.uint8)


def mean(raws: Sequence[U8Array], dtypes: Sequence[str], to: str) -> U8Array:
    """Return the mean of several, element by element, as bytes of dtype `to`.

    They are added up in order in float32, or in float64 if any of `dtypes` is F64, divided by their
    number, and rounded once.
    """
    compute = np.float64 if "F64" in dtypes else np.float32
    with np.errstate(all="ignore"):  # what is no number stays so, and is found by the merge
        total = widen(raws[0], dtypes[0]).astype(compute)
        for raw, dtype in zip(raws[1:], dtypes[1:], strict=True):
            total += widen(raw, dtype).astype(compute)
        return narrow(total / compute(len(raws)), to)


def mean_row(chunks: Iterable[U8Array], num_rows: int, row_elements: int, dtype: str) -> U8Array:
    """Return the mean of rows, as bytes of their dtype; of one row, its own bytes.

    Parameters
    ----------
    chunks
        Whole rows, in order: the rows of each are added up in float64, and then the sums, so that
        where they are cut is part of the result.
    num_rows, row_elements
        Of all chunks, and of each row.
    dtype
        F16, BF16, F32 or F64.
    """
    total = np.zeros(row_elements)
    with np.errstate(all="ignore"):
        for chunk in chunks:
            if num_rows == 1:
                return np.array(chunk)
            rows = widen(chunk, dtype).astype(np.float64).reshape(-1, row_elements)
            total += rows.sum(axis=0)
        return narrow(total / num_rows, dtype)


F32Array = npt.NDArray[np.float32]


def dense(raw: U8Array, dtype: str, shape: tuple[int, ...], strides: tuple[int, ...]) -> F32Array:
    """Return numbers that lie at these strides, in elements, one behind the other in float32.

    Parameters
    ----------
    raw
        The bytes of numbers of `dtype`: F16, BF16 or F32.
    shape, strides
        No place is outside of them.
    """
    stored = raw.view(np.uint32 if dtype == "F32" else np.uint16)
    assert sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) < stored.size
    steps = tuple(stride * stored.itemsize for stride in strides)
    wanted = np.ascontiguousarray(np.lib.stride_tricks.as_strided(stored, shape, steps))
    numbers = widen(wanted.reshape(-1).view(np.uint8), dtype).astype(np.float32, copy=False)
    return numbers.reshape(shape)


def add_low_rank(
    out: npt.NDArray[np.floating], left: F32Array, right: F32Array, scaling: float, first: int
) -> None:
    """Add rows `first` and following of ``scaling * left @ right`` to `out`.

    Parameters
    ----------
    out
        (n, C) float32 or float64.
    left
        (G, R, K): rows of G matrices, one behind the other.
    right
        (G, K, C).
    """
    add_product, _ = kernels()
    sums = np.empty(TILE_ROWS * TILE_COLS, np.float32)
    rows, done = left.shape[1], 0
    while done < len(out):
        group, row = divmod(first + done, rows)
        count = min(rows - row, len(out) - done)
        add_product(
            left[group, row : row + count],
            right[group],
            np.float32(scaling),
            sums,
            out[done : done + count],
        )
        done += count


def add_lengthened(
    out: npt.NDArray[np.floating], delta: F32Array, weight: F32Array, magnitude: F32Array
) -> None:
    """Add to `out` what giving every row of ``weight + delta`` its length makes of `weight`.

    Parameters
    ----------
    out
        (n, C) float32 or float64.
    delta, weight
        (n, C); `delta` is overwritten.
    magnitude
        (n,): the lengths.
    """
    kernels()[1](delta, weight, magnitude, out)


def formed(raw: U8Array, dtype: str, to: str) -> npt.NDArray[np.floating]:
    """Return the numbers of `raw` as an array that can be added to: float32, or float64 for F64."""
    return np.array(widen(raw, dtype), np.float64 if to == "F64" else np.float32)
