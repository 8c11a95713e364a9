"""Numbers from the bytes of tensors, exactly, and back, rounded once: plainly, in numpy."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from della_dist.ops.blocks import U8Array
from della_dist.specs.dtypes import itemsize

FloatArray: TypeAlias = npt.NDArray[np.floating[Any]]

#: Output format: (explicit bits of the significand, exponent of the smallest normal number).
_FORMATS = {"F16": (10, -14), "BF16": (7, -126), "F32": (23, -126)}

#: The one quiet NaN that is ever written.
_CANONICAL_NAN = {
    "F16": ("<u2", 0x7E00),
    "BF16": ("<u2", 0x7FC0),
    "F32": ("<u4", 0x7FC00000),
    "F64": ("<u8", 0x7FF8000000000000),
}


def widen(raw: U8Array, dtype: str) -> FloatArray:
    """Return the numbers in the raw bytes of a tensor, exactly: float16, float32 or float64."""
    values: FloatArray
    if dtype == "BF16":
        values = (raw.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
    else:
        values = raw.view(f"<f{itemsize(dtype)}")
    return values


def narrow(values: FloatArray, dtype: str) -> U8Array:
    """Return the raw bytes of `values` (float32 or float64) rounded once to `dtype`."""
    integer, nan_bits = _CANONICAL_NAN[dtype]
    exact = values.astype(np.float64)
    if dtype in _FORMATS:
        exact = round_to_format(exact, *_FORMATS[dtype])
    # Everything is representable now, or infinite: no further rounding happens.
    if dtype == "BF16":
        bits = (exact.astype("<f4").view("<u4") >> np.uint32(16)).astype("<u2")
    else:
        bits = exact.astype(f"<f{itemsize(dtype)}").view(integer)
    bits[np.isnan(values)] = nan_bits
    return np.ascontiguousarray(bits).view(np.uint8)


def round_to_format(
    values: npt.NDArray[np.float64], significand_bits: int, min_exponent: int
) -> npt.NDArray[np.float64]:
    """Round float64 numbers, to nearest even, to the multiples that a smaller format has.

    Parameters
    ----------
    values
        Any float64 numbers.
    significand_bits
        Explicit bits of the format's significand (7 for bfloat16).
    min_exponent
        Exponent of its smallest normal number (-126 for bfloat16); below it lie the subnormals.
    """
    exponent = np.frexp(values)[1].astype(np.int64) - 1
    # What one unit in the last place is worth, as an exponent; scaling by it is exact.
    last_place = np.maximum(exponent, min_exponent) - significand_bits
    rounded = np.ldexp(np.rint(np.ldexp(values, -last_place)), last_place)
    limit = 2.0 ** (2 - min_exponent)  # 2**16 for float16, 2**128 for bfloat16 and float32
    rounded[np.abs(rounded) >= limit] = np.inf
    signed: npt.NDArray[np.float64] = np.copysign(rounded, values)
    return signed
