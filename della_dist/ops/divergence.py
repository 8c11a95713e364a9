"""How far rows of an expert have moved: divergences whose bits are the same everywhere.

`arcee_fusion` takes what an element has moved times the divergence of its row for its importance.
A row x, the last axis, is seen as a distribution ``softmax(x) + EPS``; the divergence (Kullback and
Leibler) is that of the expert's row from the base's, ``sum p log(p / q)``, at least 0.

All of it is float64, whatever the inputs: the divergence of rows that differ by a fine-tuning is
what is left where numbers near each other cancel. Sums have the order that `della_dist.ops.blocks`
states, with a row as the unit. Exponential and logarithm are nothing but IEEE operations in one
order, since C libraries differ in the last place; their errors are below 2 units there. The
expert's row is the base's plus its finite deltas; where the base is not finite, both are left out.

This module has the functions in numpy; the backends have them again, with these numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import factorial
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

F64Array: TypeAlias = npt.NDArray[np.float64]

#: What is added to every probability, as in mergekit.
EPS = 1e-8

#: The largest float64: sums that exceed it count as this.
MOST = float.fromhex("0x1.fffffffffffffp+1023")

#: Exponentials of smaller numbers count as zero.
LEAST_EXPONENT = -700.0

#: 1 / log 2; log 2 in two parts, of which multiples of the first by whole numbers below 2**20 are
#: exact.
LOG2_E = float.fromhex("0x1.71547652b82fep+0")
LOG_2 = (float.fromhex("0x1.62e42fee00000p-1"), float.fromhex("0x1.a39ef35793c76p-33"))
#: Added to a number below 2**51, leaves the nearest whole number in the last bits.
TO_WHOLE = 1.5 * 2.0**52
#: The bits of one, and of the root of 1 / 2.
ONE_BITS = 0x3FF0000000000000
ROOT_BITS = 0x3FE6A09E667F3BCD

#: Taylor's series of the exponential from the third term on, and of the inverse hyperbolic tangent
#: from the second; the last ones first, as they are added.
EXPONENTIAL = tuple(float(Fraction(1, factorial(k))) for k in range(14, 1, -1))
LOGARITHM = tuple(float(Fraction(1, 2 * k + 1)) for k in range(12, 0, -1))


def bits_of(value: float, *, wide: bool) -> int:
    """Return the bits of a number from 0 on, as float64 or rounded to float32, as an integer."""
    number, key = (np.float64, np.uint64) if wide else (np.float32, np.uint32)
    return int(np.array([value], number).view(key)[0])


def least_importance(quartiles: Sequence[int], *, wide: bool) -> int:
    """Return the least importance that keeps an element: the median and 1.5 times the range.

    Parameters
    ----------
    quartiles
        The bits, as integers, of the lower quartile, the median and the upper one.
    wide
        Whether they are float64, which is computed in then; float32 otherwise.

    Returns
    -------
    int
        The bits of the bound; of a number above all where it is none.
    """
    number, key = (np.float64, np.uint64) if wide else (np.float32, np.uint32)
    low, middle, high = np.array(quartiles, key).view(number)
    with np.errstate(all="ignore"):
        bound = np.array([middle + number(1.5) * (high - low)], number)
    above_all = (1 << (63 if wide else 31)) - 1
    return above_all if np.isnan(bound[0]) else int(bound.view(key)[0])


def exponential(x: F64Array) -> F64Array:
    """Return the exponential of float64 numbers up to 0, elementwise."""
    y = np.maximum(x, LEAST_EXPONENT)
    shifted = y * LOG2_E + TO_WHOLE
    number = shifted - TO_WHOLE
    r = (y - number * LOG_2[0]) - number * LOG_2[1]
    total = np.full_like(r, EXPONENTIAL[0])
    for coefficient in EXPONENTIAL[1:]:
        total = total * r + coefficient
    power = ((shifted.view(np.uint64) << np.uint64(52)) + np.uint64(ONE_BITS)).view(np.float64)
    value: F64Array = np.where(x < LEAST_EXPONENT, 0.0, (1.0 + (r + r * (r * total))) * power)
    return value


def logarithm(x: F64Array) -> F64Array:
    """Return the natural logarithm of positive float64 numbers that are not subnormal."""
    bits = x.view(np.int64)
    number = (bits - ROOT_BITS) >> 52
    m = (bits - (number << 52)).view(np.float64)
    s = (m - 1.0) / (m + 1.0)
    square = s * s
    total = np.full_like(s, LOGARITHM[0])
    for coefficient in LOGARITHM[1:]:
        total = total * square + coefficient
    value: F64Array = number.astype(np.float64) * (LOG_2[0] + LOG_2[1]) + 2.0 * (
        s + s * (square * total)
    )
    return value
