"""What must be known of a whole tensor before its blocks can be merged, and how it is gathered.

Most methods need nothing: `prepare` is ready at once. Two need passes over the tensor first:
trimming by magnitude (the k-th largest magnitude) and the ``l1`` rescale (two sums a tensor).
Each pass measures every block, in any order and anywhere; measurements are integers, so adding
them up is exact and the order cannot show::

    prepared = prepare(recipe)
    while prepared.stage != "ready":
        total = reduce(merge_measurements, (backend.measure(recipe, prepared, b) for b in blocks))
        prepared = absorb(recipe, prepared, total)

**Selecting the k-th largest magnitude** is a radix select on the magnitude's bits, 16 bits a pass
from the top. A pass ends the search when the bucket that holds the k-th largest contains a single
distinct magnitude, which for bf16 checkpoints is the rule: one pass. float32 needs at most two,
float64 at most four.

**The l1 sums** are exact: significands are added up as integers for every exponent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

import numpy as np
import numpy.typing as npt

from della_dist.ops.philox import stream_key
from della_dist.specs.dtypes import num_elements
from della_dist.specs.recipe import TensorRecipe

I64Array = npt.NDArray[np.int64]
U64Array = npt.NDArray[np.uint64]

#: Buckets of one selection pass.
SELECT_BUCKETS = 65_536

#: The elected weights count as zero up to this fraction of the sum of all absolute weights.
GUARD = 2.0**-20


@dataclass(frozen=True, slots=True)
class Prepared:
    """The constants of a tensor's merge, rounded once to the compute dtype."""

    stage: Literal["select", "l1", "ready"]
    wide: bool
    """Whether to compute in float64 (any input is F64); float32 otherwise."""
    keys: tuple[int, ...]
    """The 64-bit Philox key of each expert."""
    shift: int = 0
    """Selection: the pass looks at ``bits`` bits of the magnitude from this one up..."""
    bits: int = 16
    """...so that the bucket is ``(key >> shift) & (2**bits - 1)``, and ``key >> (shift + bits)``
    is the prefix."""
    prefix: tuple[int, ...] = ()
    """Selection: the bits above them, found by earlier passes; -1 where an expert is done."""
    remaining: tuple[int, ...] = ()
    """Selection: how many of the largest magnitudes are still to be found below the prefix."""
    threshold: tuple[int, ...] = ()
    """Keep an element iff the bits of its magnitude, as an integer, reach this."""
    ratio: tuple[float, ...] = ()
    """l1: the factor for each expert's survivors, already rounded to the compute dtype."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """What one pass saw in one block, or in many. M experts."""

    num_nonfinite: I64Array
    """(M,): deltas that are NaN or infinite; they count as zeros in what follows."""
    counts: I64Array | None = None
    """Selection, (M, 65536): elements below the prefix, by their next 16 magnitude bits."""
    key_min: U64Array | None = None
    """Selection, (M, 65536): smallest magnitude bits in each bucket (all ones where empty)."""
    key_max: U64Array | None = None
    """Selection, (M, 65536): largest magnitude bits in each bucket (zero where empty)."""
    l1: I64Array | None = None
    """l1, (M, 2, 2, E): sums of significands, by [before or after the drop][low 26 bits or the
    rest][biased exponent]; E = 256 for float32, 2048 for float64. Subnormals count as
    exponent 1, the implicit bit is included."""


def merge_measurements(a: Measurement, b: Measurement) -> Measurement:
    """Return the measurement of two disjoint sets of blocks together."""

    def add(x: I64Array | None, y: I64Array | None) -> I64Array | None:
        return None if x is None or y is None else x + y

    return Measurement(
        num_nonfinite=a.num_nonfinite + b.num_nonfinite,
        counts=add(a.counts, b.counts),
        key_min=None
        if a.key_min is None or b.key_min is None
        else np.minimum(a.key_min, b.key_min),
        key_max=None
        if a.key_max is None or b.key_max is None
        else np.maximum(a.key_max, b.key_max),
        l1=add(a.l1, b.l1),
    )


def prepare(recipe: TensorRecipe) -> Prepared:
    """Return the state in which the merge of `recipe`'s tensor starts."""
    settings = recipe.settings
    experts = range(len(recipe.expert_dtypes))
    prepared = Prepared(
        stage="ready",
        wide="F64" in (recipe.base_dtype, *recipe.expert_dtypes),
        keys=tuple(stream_key(settings.seed, recipe.name, m, recipe.stage) for m in experts),
    )
    if settings.drop == "magnitude":
        n = num_elements(recipe.shape)
        # At least one survivor; densities are in (0, 1].
        remaining = tuple(min(n, max(1, int(d * n))) for d in settings.densities)
        if all(k == n for k in remaining):
            prepared = replace(prepared, threshold=(0,) * len(remaining))
        else:
            return replace(
                prepared,
                stage="select",
                shift=(63 if prepared.wide else 31) - 16,
                prefix=(0,) * len(remaining),
                remaining=remaining,
                threshold=(0,) * len(remaining),
            )
    return _after_select(recipe, prepared)


def absorb(recipe: TensorRecipe, prepared: Prepared, total: Measurement) -> Prepared:
    """Return the state after a pass whose measurement over the whole tensor is `total`."""
    if prepared.stage == "select":
        return _absorb_select(recipe, prepared, total)
    assert prepared.stage == "l1"
    assert total.l1 is not None
    compute = np.float64 if prepared.wide else np.float32
    ratio = []
    for before, after in total.l1:
        kept = _exact_sum(after, wide=prepared.wide)
        exact = _exact_sum(before, wide=prepared.wide) / kept if kept else Fraction(1)
        with np.errstate(over="ignore"):
            ratio.append(float(compute(_to_float(exact))))
    return replace(prepared, stage="ready", ratio=tuple(ratio))


def _absorb_select(recipe: TensorRecipe, prepared: Prepared, total: Measurement) -> Prepared:
    assert total.counts is not None
    assert total.key_min is not None
    assert total.key_max is not None
    prefix, remaining = list(prepared.prefix), list(prepared.remaining)
    threshold = list(prepared.threshold)
    for m, k in enumerate(remaining):
        if prefix[m] < 0:
            continue
        # Count down from the largest bucket to the one that holds the k-th largest magnitude.
        from_top = np.cumsum(total.counts[m][::-1])
        depth = int(np.searchsorted(from_top, k))
        bucket = SELECT_BUCKETS - 1 - depth
        low, high = int(total.key_min[m, bucket]), int(total.key_max[m, bucket])
        if low == high or prepared.shift == 0:
            threshold[m] = low if low == high else (prefix[m] << prepared.bits | bucket)
            prefix[m] = -1
        else:
            prefix[m] = prefix[m] << prepared.bits | bucket
            remaining[m] = k - int(from_top[depth] - total.counts[m, bucket])
    if all(p < 0 for p in prefix):
        prepared = replace(prepared, threshold=tuple(threshold), prefix=(), remaining=())
        return _after_select(recipe, prepared)
    return replace(
        prepared,
        shift=max(0, prepared.shift - 16),
        bits=min(16, prepared.shift),
        prefix=tuple(prefix),
        remaining=tuple(remaining),
        threshold=tuple(threshold),
    )


def _after_select(recipe: TensorRecipe, prepared: Prepared) -> Prepared:
    l1 = recipe.settings.rescale == "l1" and num_elements(recipe.shape) > 0
    return replace(prepared, stage="l1" if l1 else "ready", shift=0)


def _to_float(exact: Fraction) -> float:
    """Return the nearest float64; an absurd ratio becomes infinite and shows as an overflow."""
    try:
        return float(exact)
    except OverflowError:
        return math.inf


def _exact_sum(sums: I64Array, *, wide: bool) -> Fraction:
    """Return the exact value of the significand sums ``(2, E)`` of float32 or float64 numbers."""
    bias = 1075 if wide else 150
    total = 0
    for part, weight in ((0, 0), (1, 26)):
        for exponent in np.flatnonzero(sums[part]):
            total += int(sums[part, exponent]) << (int(exponent) + weight)
    return Fraction(total, 1 << bias)
