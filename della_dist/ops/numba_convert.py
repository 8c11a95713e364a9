"""Raw numbers to the compute dtype and back in Numba: loops that LLVM vectorises.

The compute dtype is float32 or, where any input is F64, float64; every function takes both.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.core import types
from numba.extending import overload

from della_dist.ops.numba_intrinsics import (
    array_at,
    bits_float,
    float_bits,
    like,
)
from della_dist.ops.numba_support import BF16, F16, F32, inner, magnitude_bits

_INF_BITS = np.uint32(0x7F800000)


@inner
def widen(code: Any, address: Any, start: Any, out: Any) -> None:
    """Widen numbers exactly.

    Parameters
    ----------
    code
        The dtype, of `DTYPE_CODES`.
    address
        Where the numbers lie, aligned to their size; 0 for zeros.
    start
        Index of the first number to take.
    out
        (n,) float32 or float64, written.
    """
    n = out.size
    if address == 0:
        out[:] = 0.0
    elif code == BF16:
        _widen_bf16(array_at(address, start, n, np.uint16(0)), out)
    elif code == F16:
        _widen_f16(array_at(address, start, n, np.uint16(0)), out)
    elif code == F32:
        _copy(array_at(address, start, n, np.float32(0)), out)
    else:
        _copy(array_at(address, start, n, np.float64(0)), out)


@inner
def _copy(numbers: Any, out: Any) -> None:
    for i in range(out.size):
        out[i] = like(out[i], numbers[i])


@inner
def _widen_bf16(bits: Any, out: Any) -> None:
    for i in range(out.size):
        out[i] = bits_float(np.uint32(np.uint32(bits[i]) << np.uint32(16)))


@inner
def _widen_f16(bits: Any, out: Any) -> None:
    for i in range(out.size):
        half = np.uint32(bits[i])
        sign = np.uint32(np.uint32(half & np.uint32(0x8000)) << np.uint32(16))
        shifted = np.uint32(np.uint32(half & np.uint32(0x7FFF)) << np.uint32(13))
        exponent = np.uint32(shifted & np.uint32(0x0F800000))
        normal = np.uint32(shifted + np.uint32(112 << 23))
        special = np.uint32(shifted | _INF_BITS)
        # A subnormal: borrow the exponent of the smallest normal number and take it off again.
        borrowed = bits_float(np.uint32(shifted + np.uint32(113 << 23)))
        subnormal = float_bits(borrowed - bits_float(np.uint32(113 << 23)))
        wide = normal
        if exponent == np.uint32(0):
            wide = subnormal
        if exponent == np.uint32(0x0F800000):
            wide = special
        out[i] = bits_float(np.uint32(wide | sign))


@inner
def narrow(code: Any, address: Any, start: Any, b: Any, t: Any) -> Any:
    """Write ``b + t``, rounded once to nearest even.

    Parameters
    ----------
    code
        The output's dtype, of `DTYPE_CODES`.
    address
        Where the output lies, aligned to the size of its numbers.
    start
        Index of the first number to write.
    b, t
        (n,) float32 or float64: the base and what is added to it.

    Returns
    -------
    int
        How many numbers are not finite in the output although they are in `b`.
    """
    n = b.size
    if code == BF16:
        return _narrow_bf16(b, t, array_at(address, start, n, np.uint16(0)))
    if code == F16:
        return _narrow_f16(b, t, array_at(address, start, n, np.uint16(0)))
    if code == F32:
        return _narrow_f32(b, t, array_at(address, start, n, np.uint32(0)))
    return _narrow_f64(b, t, array_at(address, start, n, np.uint64(0)))


@inner
def _is_finite(x: Any) -> Any:
    return magnitude_bits(x) < magnitude_bits(like(x, np.inf))


def _single(x: Any) -> Any:
    """Return `x` as a float32 that rounds to any 16-bit format as `x` itself does.

    A float64 becomes, where float32 cannot hold it, the neighbour whose last bit is 1 ("round
    to odd"; Boldo and Melquiond, 2008).
    """
    raise NotImplementedError


@overload(_single)  # type: ignore[untyped-decorator]
def _choose_single(x: Any) -> Any:
    return _single_of_single if x == types.float32 else _single_of_double


def _single_of_single(x: Any) -> Any:
    return x


def _single_of_double(x: Any) -> Any:
    nearest = np.float32(x)
    bits = float_bits(nearest)
    if np.float64(nearest) != x:
        # The bits count magnitudes upwards: one less is one step towards zero.
        if abs(np.float64(nearest)) > abs(x):
            bits = np.uint32(bits - np.uint32(1))
        bits = np.uint32(bits | np.uint32(1))
    return bits_float(bits)


@inner
def _narrow_bf16(b: Any, t: Any, out: Any) -> Any:
    overflow = np.uint32(0)
    for i in range(b.size):
        exact = b[i] + t[i]
        bits = float_bits(_single(exact))
        even = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1))
        rounded = np.uint32(np.uint32(bits + np.uint32(0x7FFF) + even) >> np.uint32(16))
        if exact != exact:
            rounded = np.uint32(0x7FC0)
        out[i] = rounded
        infinite = np.uint32(rounded & np.uint32(0x7F80)) == np.uint32(0x7F80)
        overflow = np.uint32(overflow + np.uint32(infinite & _is_finite(b[i])))
    return np.int64(overflow)


@inner
def _narrow_f16(b: Any, t: Any, out: Any) -> Any:
    overflow = np.uint32(0)
    for i in range(b.size):
        exact = b[i] + t[i]
        single = _single(exact)
        bits = float_bits(single)
        sign = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(0x8000))
        magnitude = np.uint32(bits & np.uint32(0x7FFFFFFF))
        odd = np.uint32(np.uint32(magnitude >> np.uint32(13)) & np.uint32(1))
        rebiased = np.uint32(magnitude - np.uint32(112 << 23))
        rounded = np.uint32(np.uint32(rebiased + np.uint32(0xFFF) + odd) >> np.uint32(13))
        # Below 2**-14 the last place is 2**-24 throughout, as it is next to one half.
        half = bits_float(np.uint32(126 << 23))
        subnormal = np.uint32(float_bits(abs(single) + half) - np.uint32(126 << 23))
        if magnitude < np.uint32(113 << 23):
            rounded = subnormal
        if magnitude >= np.uint32(143 << 23):
            rounded = np.uint32(0x7C00)
        rounded = np.uint32(rounded | sign)
        if exact != exact:
            rounded = np.uint32(0x7E00)
        out[i] = rounded
        infinite = np.uint32(rounded & np.uint32(0x7C00)) == np.uint32(0x7C00)
        overflow = np.uint32(overflow + np.uint32(infinite & _is_finite(b[i])))
    return np.int64(overflow)


@inner
def _narrow_f32(b: Any, t: Any, out: Any) -> Any:
    overflow = np.uint32(0)
    for i in range(b.size):
        rounded = np.float32(b[i] + t[i])
        bits = float_bits(rounded)
        if rounded != rounded:
            bits = np.uint32(0x7FC00000)
        out[i] = bits
        infinite = np.uint32(bits & _INF_BITS) == _INF_BITS
        overflow = np.uint32(overflow + np.uint32(infinite & _is_finite(b[i])))
    return np.int64(overflow)


@inner
def _narrow_f64(b: Any, t: Any, out: Any) -> Any:
    overflow = np.uint32(0)
    for i in range(b.size):
        exact = np.float64(b[i] + t[i])
        bits = float_bits(exact)
        if exact != exact:
            bits = np.uint64(0x7FF8000000000000)
        out[i] = bits
        infinite = np.uint64(bits & np.uint64(0x7FF0000000000000)) == np.uint64(0x7FF0000000000000)
        overflow = np.uint32(overflow + np.uint32(infinite & _is_finite(b[i])))
    return np.int64(overflow)
