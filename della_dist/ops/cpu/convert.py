"""Raw numbers to the compute dtype and back in Numba: loops that LLVM vectorises.

The compute dtype is float32 or, where any input is F64, float64; every function takes both.
"""

from __future__ import annotations

import numpy as np
from numba.core import types
from numba.extending import overload

from della_dist.ops.cpu.intrinsics import (
    array_at,
    bits_float,
    float_bits,
    like,
    wide_vectors,
)
from della_dist.ops.cpu.support import (
    BF16,
    F16,
    F32,
    F64,
    Array,
    Number,
    inner,
    magnitude_bits,
)

#: Numbers that are copied at a time where they are not aligned to their size.
STAGED_ELEMENTS = 1024

_INF_BITS = np.uint32(0x7F800000)


@inner
def widen(code: Number, address: Number, start: Number, out: Array, staging: Array) -> None:
    """Widen numbers exactly.

    Parameters
    ----------
    code
        The dtype, of `DTYPE_CODES`.
    address
        Where the numbers lie; 0 for zeros.
    start
        Index of the first number to take.
    out
        (n,) float32 or float64, written.
    staging
        (8 * STAGED_ELEMENTS,) uint8: scratch for numbers that are not aligned to their size.
    """
    if address == 0:
        out[:] = 0.0
        return
    size = _item_size(code)
    place = address + np.uint64(start * size)
    if address & np.uint64(size - 1) == 0:
        _widen_aligned(code, place, out)
        return
    for first in range(0, out.size, STAGED_ELEMENTS):
        piece = out[first : first + STAGED_ELEMENTS]
        _copy(array_at(place, first * size, piece.size * size, np.uint8(0)), staging)
        _widen_aligned(code, np.uint64(staging.ctypes.data), piece)


@inner
def _widen_aligned(code: Number, place: Number, out: Array) -> None:
    n = out.size
    if code == BF16:
        _widen_bf16(array_at(place, 0, n, np.uint16(0)), out)
    elif code == F16:
        _widen_f16(array_at(place, 0, n, np.uint16(0)), out)
    elif code == F32:
        _copy(array_at(place, 0, n, np.float32(0)), out)
    else:
        _copy(array_at(place, 0, n, np.float64(0)), out)


@inner
def _item_size(code: Number) -> Number:
    return 8 if code == F64 else 4 if code == F32 else 2


@inner
def _copy(numbers: Array, out: Array) -> None:
    wide_vectors()
    for i in range(numbers.size):
        out[i] = like(out[i], numbers[i])


@inner
def _widen_bf16(bits: Array, out: Array) -> None:
    wide_vectors()
    for i in range(out.size):
        out[i] = bits_float(np.uint32(np.uint32(bits[i]) << np.uint32(16)))


@inner
def _widen_f16(bits: Array, out: Array) -> None:
    wide_vectors()
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
def narrow(
    code: Number, address: Number, start: Number, b: Array, t: Array, staging: Array
) -> Number:
    """Write ``b + t``, rounded once to nearest even.

    Parameters
    ----------
    code
        The output's dtype, of `DTYPE_CODES`.
    address
        Where the output lies.
    start
        Index of the first number to write.
    b, t
        (n,) float32 or float64: the base and what is added to it; n <= `STAGED_ELEMENTS`.
    staging
        (8 * STAGED_ELEMENTS,) uint8: scratch where the output is not aligned.

    Returns
    -------
    int
        How many numbers are not finite in the output although they are in `b`.
    """
    n = b.size
    size = _item_size(code)
    target = address + np.uint64(start * size)
    place = target
    if address & np.uint64(size - 1) != 0:
        place = np.uint64(staging.ctypes.data)
    if code == BF16:
        overflow = _narrow_bf16(b, t, array_at(place, 0, n, np.uint16(0)))
    elif code == F16:
        overflow = _narrow_f16(b, t, array_at(place, 0, n, np.uint16(0)))
    elif code == F32:
        overflow = _narrow_f32(b, t, array_at(place, 0, n, np.uint32(0)))
    else:
        overflow = _narrow_f64(b, t, array_at(place, 0, n, np.uint64(0)))
    if place != target:
        _copy(staging[: n * size], array_at(target, 0, n * size, np.uint8(0)))
    return overflow


@inner
def _is_finite(x: Number) -> Number:
    return magnitude_bits(x) < magnitude_bits(like(x, np.inf))


def _single(x: Number) -> Number:
    """Return `x` as a float32 that rounds to any 16-bit format as `x` itself does.

    A float64 becomes, where float32 cannot hold it, the neighbour whose last bit is 1 ("round
    to odd"; Boldo and Melquiond, 2008).
    """
    raise NotImplementedError


@overload(_single)
def _choose_single(x: Number) -> Number:
    return _single_of_single if x == types.float32 else _single_of_double


def _single_of_single(x: Number) -> Number:
    return x


def _single_of_double(x: Number) -> Number:
    nearest = np.float32(x)
    bits = float_bits(nearest)
    if np.float64(nearest) != x:
        # The bits count magnitudes upwards: one less is one step towards zero.
        if abs(np.float64(nearest)) > abs(x):
            bits = np.uint32(bits - np.uint32(1))
        bits = np.uint32(bits | np.uint32(1))
    return bits_float(bits)


@inner
def _narrow_bf16(b: Array, t: Array, out: Array) -> Number:
    wide_vectors()
    overflow = np.uint32(0)
    for i in range(b.size):
        exact = b[i] + t[i]
        bits = float_bits(_single(exact))
        even = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1))
        rounded = np.uint32(np.uint32(bits + np.uint32(0x7FFF) + even) >> np.uint32(16))
        if np.isnan(exact):
            rounded = np.uint32(0x7FC0)
        out[i] = rounded
        infinite = np.uint32(rounded & np.uint32(0x7F80)) == np.uint32(0x7F80)
        overflow = np.uint32(overflow + np.uint32(infinite & _is_finite(b[i])))
    return np.int64(overflow)


@inner
def _narrow_f16(b: Array, t: Array, out: Array) -> Number:
    wide_vectors()
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
        if np.isnan(exact):
            rounded = np.uint32(0x7E00)
        out[i] = rounded
        infinite = np.uint32(rounded & np.uint32(0x7C00)) == np.uint32(0x7C00)
        overflow = np.uint32(overflow + np.uint32(infinite & _is_finite(b[i])))
    return np.int64(overflow)


@inner
def _narrow_f32(b: Array, t: Array, out: Array) -> Number:
    wide_vectors()
    overflow = np.uint32(0)
    for i in range(b.size):
        rounded = np.float32(b[i] + t[i])
        bits = float_bits(rounded)
        if np.isnan(rounded):
            bits = np.uint32(0x7FC00000)
        out[i] = bits
        infinite = np.uint32(bits & _INF_BITS) == _INF_BITS
        overflow = np.uint32(overflow + np.uint32(infinite & _is_finite(b[i])))
    return np.int64(overflow)


@inner
def _narrow_f64(b: Array, t: Array, out: Array) -> Number:
    overflow = np.uint32(0)
    for i in range(b.size):
        exact = np.float64(b[i] + t[i])
        bits = float_bits(exact)
        if np.isnan(exact):
            bits = np.uint64(0x7FF8000000000000)
        out[i] = bits
        infinite = np.uint64(bits & np.uint64(0x7FF0000000000000)) == np.uint64(0x7FF0000000000000)
        overflow = np.uint32(overflow + np.uint32(infinite & _is_finite(b[i])))
    return np.int64(overflow)
