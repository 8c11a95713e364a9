"""Tensors that no file holds, formed of rows that files hold: bytes in, bytes out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from della_dist.ops.blocks import U8Array
from della_dist.ops.reference import narrow, widen


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
