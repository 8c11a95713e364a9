"""The dtypes of safetensors files, and which of them are merged."""

from __future__ import annotations

import math
from collections.abc import Mapping

#: Bits of one element of every dtype of the safetensors format (version 0.8).
DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}

#: The dtypes that are merged; everything else is copied (integers, booleans) or refused.
FLOAT_DTYPES = frozenset({"F16", "BF16", "F32", "F64"})

#: The dtypes that are copied from the base when every checkpoint holds the same bytes.
COPY_DTYPES = frozenset({"BOOL", "U8", "I8", "I16", "U16", "I32", "U32", "I64", "U64"})


def num_elements(shape: tuple[int, ...]) -> int:
    """Return the number of elements of `shape` (1 for the empty shape of a scalar)."""
    return math.prod(shape)


def itemsize(dtype: str) -> int:
    """Return the bytes of one element of `dtype`, which has whole bytes."""
    return DTYPE_BITS[dtype] // 8


def num_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the bytes that a tensor of `dtype` and `shape` occupies in a file.

    Raises
    ------
    ValueError
        If `dtype` is a sub-byte type and the tensor does not end on a whole byte.
    """
    bits = DTYPE_BITS[dtype] * num_elements(shape)
    if bits % 8:
        raise ValueError(f"a {dtype} tensor of shape {shape} does not end on a whole byte")
    return bits // 8
