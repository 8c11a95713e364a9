"""What is measured of a whole tensor, block by block, in passes before the merge."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

F64Array = npt.NDArray[np.float64]
I64Array = npt.NDArray[np.int64]
U64Array = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Selected:
    """What a pass of the selection saw in one block, or in many. M experts, S searches."""

    num_nonfinite: I64Array
    """(M,): deltas that are NaN or infinite; they count as zeros in what follows."""
    counts: I64Array
    """(S, 65536): elements below the prefix, by their next 16 magnitude bits."""
    key_min: U64Array
    """(S, 65536): smallest magnitude bits in each bucket (all ones where empty)."""
    key_max: U64Array
    """(S, 65536): largest magnitude bits in each bucket (zero where empty)."""
    divergences: list[tuple[int, F64Array]] = field(default_factory=list)
    """Of rows from a number on, (R,), where this pass computed them and the next ones may use them
    (`della_dist.specs.passes.keeps_divergences`)."""


@dataclass(frozen=True, slots=True)
class Summed:
    """What the pass of the ``l1`` rescale saw in one block, or in many. M experts."""

    num_nonfinite: I64Array
    """(M,): deltas that are NaN or infinite; they count as zeros in what follows."""
    l1: I64Array
    """(M, 2, 2, E): sums of significands, by [before or after the drop][low 26 bits or the
    rest][biased exponent]; E = 256 for float32, 2048 for float64. Subnormals count as
    exponent 1, the implicit bit is included."""


@dataclass(frozen=True, slots=True)
class Multiplied:
    """What the pass for angles, or for squares, saw in one block, or in many.

    P pairs of experts, or the M experts.
    """

    num_nonfinite: I64Array
    """(M,): deltas that are NaN or infinite; they count as zeros in what follows."""
    sums: list[int | None]
    """(P,): sums of products in multiples of 2**-1074, of experts (0, 0), (0, 1), ..., (1, 1), ...;
    None where one is infinite. Of squares (M,)."""


@dataclass(frozen=True, slots=True)
class Counted:
    """What the pass for overlaps saw in one block, or in many. M experts."""

    num_nonfinite: I64Array
    """(M,): deltas that are NaN or infinite; they count as zeros in what follows."""
    shared: I64Array
    """(M,): deltas that are kept where another expert's is, too."""
    unique: I64Array
    """(M,): deltas that are kept where no other is."""


Measurement: TypeAlias = Selected | Summed | Multiplied | Counted


def multiplied(num_nonfinite: I64Array, sums: npt.NDArray[np.float64]) -> Multiplied:
    """Return the measurement of a block whose units have the `sums` of products (P, U)."""
    return Multiplied(num_nonfinite, [_whole(row.tolist()) for row in sums])


def _whole(values: list[float]) -> int | None:
    if not all(map(math.isfinite, values)):
        return None
    ratios = map(float.as_integer_ratio, values)
    return sum(above * (_SMALLEST // below) for above, below in ratios)


#: How many of the smallest float64 number one is.
_SMALLEST = 1 << 1074


def to_float(whole: int | None) -> float:
    """Return the nearest float64, infinite where there is none."""
    try:
        return math.inf if whole is None else whole / _SMALLEST
    except OverflowError:
        return math.inf


def merge_measurements(total: Measurement, other: Measurement) -> Measurement:
    """Add `other`, of the same pass and of other blocks, to `total` in place, and return `total`.

    In place, because measurements are large.
    """
    match total, other:
        case Selected(), Selected():
            np.add(total.counts, other.counts, out=total.counts)
            np.minimum(total.key_min, other.key_min, out=total.key_min)
            np.maximum(total.key_max, other.key_max, out=total.key_max)
            total.divergences.extend(other.divergences)
        case Summed(), Summed():
            np.add(total.l1, other.l1, out=total.l1)
        case Multiplied(), Multiplied():
            pairs = zip(total.sums, other.sums, strict=True)
            total.sums[:] = [None if a is None or b is None else a + b for a, b in pairs]
        case Counted(), Counted():
            np.add(total.shared, other.shared, out=total.shared)
            np.add(total.unique, other.unique, out=total.unique)
        case _:
            raise AssertionError("measurements of two passes")
    np.add(total.num_nonfinite, other.num_nonfinite, out=total.num_nonfinite)
    return total
