"""How alike models are: sums over elements of a model and of others that are compared with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import reduce
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from della_dist.ops.blocks import U8Array
from della_dist.ops.rounding import widen

F64Array: TypeAlias = npt.NDArray[np.float64]
I64Array: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Sums:
    """Sums over the same elements of a reference and of M models, all float64 or int64.

    Elements at which the reference or a model is NaN or infinite count for nothing in what is
    summed of that model. A delta is the model less the reference.
    """

    num_elements: int
    reference_nonfinite: int
    nonfinite: I64Array
    """(M,): elements at which a model is not finite."""
    reference_squares: F64Array
    """(M,): of the reference, where the model is finite."""
    squares: F64Array
    """(M,)"""
    dots: F64Array
    """(M,): of a model with the reference."""
    delta_dots: F64Array
    """(M, M): of two models' deltas; the diagonal has their squares."""
    untouched: I64Array
    """(M,): elements that are those of the reference."""
    changed: I64Array
    """(M, M): elements that both of two models change."""
    agreed: I64Array
    """(M, M): of these, those that they change in the same direction."""


def block_sums(
    reference: U8Array,
    reference_dtype: str,
    models: Sequence[U8Array],
    dtypes: Sequence[str],
    is_delta: Sequence[bool],
) -> Sums:
    """Return the sums over one block.

    Numbers are widened exactly, and everything is computed in float64. Products are added up as
    BLAS does: with one thread of it, in one order on machines of one kind.

    Parameters
    ----------
    reference, models
        (n * itemsize,) uint8: the same n elements of each.
    reference_dtype, dtypes
        F16, BF16, F32 or F64.
    is_delta
        Which models are deltas already, to which the reference is added.
    """
    start = widen(reference, reference_dtype).astype(np.float64)
    values = np.empty((len(models), start.size))
    with np.errstate(all="ignore"):
        for m, (raw, dtype, is_one) in enumerate(zip(models, dtypes, is_delta, strict=True)):
            values[m] = widen(raw, dtype)
            if is_one:
                values[m] += start
        deltas = values - start
        reference_squares = np.full(len(models), start @ start)
        squares = _squares(values)
        finite = np.ones((1, 1), np.bool_)
        nonfinite = np.zeros(len(models), np.int64)
        reference_finite = finite[0]
        if not np.isfinite(squares).all() or not np.isfinite(reference_squares).all():
            reference_finite = np.isfinite(start)
            finite = np.isfinite(values)
            nonfinite = np.count_nonzero(~finite, axis=1).astype(np.int64)
            finite &= reference_finite
            values, deltas = np.where(finite, values, 0), np.where(finite, deltas, 0)
            start = np.where(reference_finite, start, 0)
            reference_squares = _squares(np.where(finite, start, 0))
            squares = _squares(values)
        # Sums of at most 2^24 ones are exact in float32.
        up, down = (deltas > 0).astype(np.float32), (deltas < 0).astype(np.float32)
        touched = up + down
        changed = (touched @ touched.T).astype(np.int64)
        num_finite = np.count_nonzero(np.broadcast_to(finite, values.shape), axis=1)
        return Sums(
            num_elements=start.size,
            reference_nonfinite=int(np.count_nonzero(~reference_finite)),
            nonfinite=nonfinite,
            reference_squares=reference_squares,
            squares=squares,
            dots=values @ start,
            delta_dots=deltas @ deltas.T,
            untouched=num_finite.astype(np.int64) - changed.diagonal(),
            changed=changed,
            agreed=(up @ up.T + down @ down.T).astype(np.int64),
        )


def _squares(values: F64Array) -> F64Array:
    """Return the sum of squares of each row."""
    sums: F64Array = np.einsum("ij,ij->i", values, values)
    return sums


def total(blocks: Sequence[Sums]) -> Sums:
    """Return the sums over several blocks of the same models, added up in their order."""
    with np.errstate(all="ignore"):
        return reduce(_added, blocks)


def _added(one: Sums, other: Sums) -> Sums:
    names = [field.name for field in fields(Sums)]
    return Sums(**{name: getattr(one, name) + getattr(other, name) for name in names})
