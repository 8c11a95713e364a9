"""Sine, cosine and arc cosine whose bits are the same on every machine.

Nothing but IEEE additions, multiplications and square roots of float64, in one order: the functions
of C libraries differ in the last place. Errors are below 1.5 units in the last place.
"""

from __future__ import annotations

from fractions import Fraction
from math import factorial
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

F64Array: TypeAlias = npt.NDArray[np.float64]

#: pi / 2, in parts of 33 bits: multiples of the first two by whole numbers up to 2**20 are exact.
_QUARTER = (
    float.fromhex("0x1.921fb544p+0"),
    float.fromhex("0x1.0b4611a6p-34"),
    float.fromhex("0x1.3198a2e037073p-69"),
)
_PI = float.fromhex("0x1.921fb54442d18p+1")
#: What pi has beyond its float64.
_PI_REST = float.fromhex("0x1.1a62633145c07p-53")

#: Taylor's series: of sine and cosine at most pi / 4 from zero, of the arc sine at most 1 / 2.
_SINE = [float(Fraction((-1) ** k, factorial(2 * k + 1))) for k in range(1, 10)]
_COSINE = [float(Fraction((-1) ** k, factorial(2 * k))) for k in range(2, 11)]
_ARC_SINE = [
    float(Fraction(factorial(2 * k), 4**k * factorial(k) ** 2 * (2 * k + 1))) for k in range(1, 26)
]


def sine(x: npt.ArrayLike) -> F64Array:
    """Return the sine of float64 numbers up to 2**20 in magnitude, elementwise."""
    return _turned(np.asarray(x, np.float64), 0)


def cosine(x: npt.ArrayLike) -> F64Array:
    """Return the cosine of float64 numbers up to 2**20 in magnitude, elementwise."""
    return _turned(np.asarray(x, np.float64), 1)


def arc_cosine(x: npt.ArrayLike) -> F64Array:
    """Return the angles, 0 to pi, whose cosines the float64 numbers `x` in [-1, 1] are."""
    x = np.asarray(x, np.float64)
    size = np.abs(x)
    near = size > 0.5
    # Of an angle near 0 or pi, half of it has a sine that tells it well.
    half = np.sqrt(0.5 * (1.0 - size))
    small = _arc_sine(np.where(near, half, x))
    doubled = 2.0 * small
    beyond = np.where(x > 0.0, doubled, _PI - (doubled - _PI_REST))
    angle: F64Array = np.where(near, beyond, 0.5 * _PI - (small - 0.5 * _PI_REST))
    return angle


def _arc_sine(x: F64Array) -> F64Array:
    square = x * x
    return x + x * (square * _polynomial(square, _ARC_SINE))


def _turned(x: F64Array, quarters: int) -> F64Array:
    """Return the sine of ``x + quarters * pi / 2``."""
    number = np.floor(x * (2.0 / _PI) + 0.5)
    rest, low = x, np.zeros_like(x)
    for part in _QUARTER:
        product = number * part
        reduced = rest - product
        # What the subtraction rounds off (Knuth).
        back = reduced - rest
        low = low + ((rest - (reduced - back)) - (product + back))
        rest = reduced
    r = rest + low
    low = (rest - r) + low
    square = r * r
    half = 0.5 * square
    sine_of = r + (low + r * (square * _polynomial(square, _SINE)))
    head = 1.0 - half
    tail = ((1.0 - head) - half) - r * low
    cosine_of = head + (tail + (square * square) * _polynomial(square, _COSINE))
    turn = np.fmod(number + quarters, 4.0)
    turn = np.where(turn < 0.0, turn + 4.0, turn)
    value = np.where((turn == 1.0) | (turn == 3.0), cosine_of, sine_of)
    signed: F64Array = np.where(turn >= 2.0, -value, value)
    return signed


def _polynomial(x: F64Array, coefficients: list[float]) -> F64Array:
    total = np.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        total = total * x + coefficient
    return total
