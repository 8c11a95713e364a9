"""What must be known of a whole tensor before its blocks can be merged, and how it is gathered.

Most methods need nothing: `prepare` is ready at once. Some need passes over the tensor first:
trimming by magnitude (the k-th largest magnitude), the ``l1`` rescale (two sums a tensor), and
weights that follow from angles (the products of all pairs of deltas).
Each pass measures every block, in any order and anywhere; measurements are integers, so adding
them up is exact and the order cannot show::

    prepared = prepare(recipe)
    while not isinstance(prepared, Ready):
        total = reduce(merge_measurements, (backend.measure(recipe, prepared, b) for b in blocks))
        prepared = absorb(recipe, prepared, total)

**Selecting a k-th largest magnitude** is a radix select on the magnitude's bits, 16 bits a pass
from the top. A pass ends the search when the bucket that holds the k-th largest contains a single
distinct magnitude, which for bf16 checkpoints is the rule: one pass. float32 needs at most two,
float64 at most four.

**The l1 sums** are exact: significands are added up as integers for every exponent.

**Products** are added up within units, in the order that `della_dist.ops.blocks` states, and the
float64 sums of all units exactly, as integers. They are off by less than 2**-44 of the product of
the norms, which shows in no weight, and unlike exact sums of products they are vector arithmetic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from della_dist.ops.angles import weights_from_products
from della_dist.ops.divergence import bits_of, least_importance
from della_dist.ops.energy import weights_by_energy
from della_dist.ops.measurements import (
    Counted,
    Measurement,
    Multiplied,
    Selected,
    Summed,
    to_float,
)
from della_dist.ops.philox import stream_key
from della_dist.specs.passes import (
    SELECT_BITS,
    SELECT_BUCKETS,
    counts_overlaps,
    is_scored,
    multiplies,
    searches,
    selects,
    squares,
    sums_magnitudes,
)
from della_dist.specs.recipe import TensorRecipe, is_wide

F64Array = npt.NDArray[np.float64]
I64Array = npt.NDArray[np.int64]
U64Array = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class _Constants:
    """What is known of a tensor's merge from the beginning, or since the last pass. M experts."""

    wide: bool
    """Whether to compute in float64 (any input is F64); float32 otherwise."""
    keys: tuple[int, ...]
    """(M,) the 64-bit Philox key of each expert."""
    threshold: tuple[int, ...]
    """(M,) keep an element iff the bits of its magnitude, as an integer, reach this; or those of
    its score, where scores tell what is kept."""
    ceiling: tuple[int, ...]
    """(M,) and do not exceed this."""
    divergences: F64Array | None = field(default=None, kw_only=True, compare=False)
    """(R,) of all rows, where a pass has computed them; None: they are computed again."""


@dataclass(frozen=True, slots=True)
class Selecting(_Constants):
    """The next pass looks for k-th largest magnitudes, by ``bits`` bits from ``shift`` up.

    An element's bucket is ``(key >> shift) & (2**bits - 1)``; ``key >> (shift + bits)`` is its
    prefix. There are S searches (`della_dist.specs.passes.searches`), search s one among the
    magnitudes of expert ``s % M``.
    """

    shift: int
    bits: int
    prefix: tuple[int, ...]
    """(S,) the bits above them, found by earlier passes; -1 where a search is done."""
    remaining: tuple[int, ...]
    """(S,) how many of the largest magnitudes are still to be found below the prefix."""
    found: tuple[int, ...]
    """(S,) the bits of the magnitudes that are found, or what holds where none is looked for."""

    @property
    def tables(self) -> tuple[int, ...]:
        """Of every search, the first that counts the same: only that one is counted."""
        owners = [s % len(self.keys) for s in range(len(self.prefix))]
        seen: dict[tuple[int, int], int] = {}
        pairs = enumerate(zip(owners, self.prefix, strict=True))
        return tuple(seen.setdefault(pair, s) for s, pair in pairs)

    @property
    def counted(self) -> tuple[bool, ...]:
        """Of every search, whether this pass counts for it."""
        pairs = enumerate(zip(self.tables, self.prefix, strict=True))
        return tuple(table == s and prefix >= 0 for s, (table, prefix) in pairs)


@dataclass(frozen=True, slots=True)
class Summing(_Constants):
    """The next pass adds up magnitudes, before and after the drop."""


@dataclass(frozen=True, slots=True)
class Multiplying(_Constants):
    """The next pass multiplies the deltas of all pairs of experts, and adds the products up."""


@dataclass(frozen=True, slots=True)
class Squaring(_Constants):
    """The next pass squares what is kept of every expert, and adds the squares up."""


@dataclass(frozen=True, slots=True)
class Counting(_Constants):
    """The next pass counts the deltas that are kept, by whether others are at their element."""


@dataclass(frozen=True, slots=True)
class Ready(_Constants):
    """The constants of the merge."""

    ratio: tuple[float, ...]
    """(M,) the factor for each expert's survivors, rounded once to the compute dtype; 1 but for the
    ``l1`` rescale; with overlap, for what no other expert shares."""
    weights: tuple[float, ...]
    """(M,) the factor for each expert: its weight, or what angles or squares make of it. Without
    meaning where every row has weights of its own."""


Pending: TypeAlias = Selecting | Summing | Multiplying | Squaring | Counting
Prepared: TypeAlias = Pending | Ready


def prepare(recipe: TensorRecipe) -> Prepared:
    """Return the state in which the merge of `recipe`'s tensor starts."""
    settings = recipe.settings
    experts = range(len(recipe.expert_dtypes))
    keys = tuple(stream_key(settings.seed, recipe.name, m, recipe.stage) for m in experts)
    wide = is_wide(recipe)
    magnitude_bits = 63 if wide else 31
    least = bits_of(settings.least, wide=wide) + 1 if settings.drop == "threshold" else 0
    most = (1 << magnitude_bits) - 1
    known = Summing(wide, keys, (least,) * len(experts), (most,) * len(experts))
    if selects(recipe):
        ranks = searches(recipe)
        bounds = (*known.threshold, *known.ceiling, *(0 for _ in ranks))
        return Selecting(
            wide,
            keys,
            known.threshold,
            known.ceiling,
            shift=magnitude_bits - SELECT_BITS,
            bits=SELECT_BITS,
            prefix=tuple(0 if rank else -1 for rank in ranks),
            remaining=ranks,
            found=bounds[: len(ranks)],
        )
    if multiplies(recipe):
        return Multiplying(wide, keys, known.threshold, known.ceiling)
    return _selected(recipe, known)


def absorb(recipe: TensorRecipe, pending: Pending, total: Measurement) -> Prepared:
    """Return the state after a pass whose measurement over the whole tensor is `total`."""
    match pending, total:
        case Selecting(), Selected():
            return _absorb_select(recipe, pending, total)
        case Summing(), Summed():
            return _ready(recipe, pending, ratio=_ratios(pending, total))
        case Multiplying(), Multiplied():
            products = np.array([to_float(whole) for whole in total.sums])
            weights = weights_from_products(recipe, products[:, np.newaxis])
            return _ready(recipe, pending, weights=tuple(weights[:, 0].tolist()))
        case Squaring(), Multiplied():
            energies = [to_float(whole) for whole in total.sums]
            return _ready(recipe, pending, weights=weights_by_energy(energies))
        case Counting(), Counted():
            shared, unique = total.shared.tolist(), total.unique.tolist()
            return _ready(recipe, pending, ratio=_boosts(recipe, shared, unique))
    raise AssertionError("a measurement of another pass")


def _ready(
    recipe: TensorRecipe,
    known: Pending,
    *,
    ratio: tuple[float, ...] = (),
    weights: tuple[float, ...] = (),
) -> Ready:
    return Ready(
        known.wide,
        known.keys,
        known.threshold,
        known.ceiling,
        ratio or (1.0,) * len(known.keys),
        weights or recipe.settings.weights,
        divergences=known.divergences,
    )


def _boosts(recipe: TensorRecipe, shared: list[int], unique: list[int]) -> tuple[float, ...]:
    """Return how much each expert's deltas count where no other has one."""
    overlap = recipe.settings.overlap
    assert overlap is not None
    return tuple(
        1.0 + overlap.r * (min(overlap.alpha, s / u) if u else overlap.alpha * (s > 0))
        for s, u in zip(shared, unique, strict=True)
    )


def _ratios(pending: Summing, total: Summed) -> tuple[float, ...]:
    compute = np.float64 if pending.wide else np.float32
    ratios = []
    for before, after in total.l1:
        kept = _exact_sum(after, wide=pending.wide)
        exact = _exact_sum(before, wide=pending.wide) / kept if kept else Fraction(1)
        with np.errstate(over="ignore"):
            ratios.append(float(compute(_to_float(exact))))
    return tuple(ratios)


def _absorb_select(recipe: TensorRecipe, pending: Selecting, total: Selected) -> Prepared:
    pending = replace(pending, divergences=_divergences(pending, total))
    prefix, remaining = list(pending.prefix), list(pending.remaining)
    found, tables = list(pending.found), pending.tables
    if recipe.settings.drop == "variance" and pending.shift + pending.bits == _width(pending):
        # Zeros are not counted.
        remaining = [int(recipe.settings.densities[0] * int(total.counts[0].sum()))]
        if remaining == [0]:
            found, prefix = [(1 << _width(pending)) - 1], [-1]
    for s, k in enumerate(remaining):
        if prefix[s] < 0:
            continue
        # Count down from the largest bucket to the one that holds the k-th largest magnitude.
        counts = total.counts[tables[s]]
        from_top = np.cumsum(counts[::-1])
        depth = int(np.searchsorted(from_top, k))
        bucket = SELECT_BUCKETS - 1 - depth
        low, high = (int(keys[tables[s], bucket]) for keys in (total.key_min, total.key_max))
        if low == high or pending.shift == 0:
            found[s] = low if low == high else (prefix[s] << pending.bits | bucket)
            prefix[s] = -1
        else:
            prefix[s] = prefix[s] << pending.bits | bucket
            remaining[s] = k - int(from_top[depth] - counts[bucket])
    if all(p < 0 for p in prefix):
        return _selected(recipe, _bounds(recipe, pending, found))
    return replace(
        pending,
        shift=max(0, pending.shift - SELECT_BITS),
        bits=min(SELECT_BITS, pending.shift),
        prefix=tuple(prefix),
        remaining=tuple(remaining),
        found=tuple(found),
    )


def _divergences(pending: Selecting, total: Selected) -> F64Array | None:
    """Return those of all rows, in order, once they were computed."""
    if not total.divergences:
        return pending.divergences
    return np.concatenate([part for _, part in sorted(total.divergences, key=lambda one: one[0])])


def _bounds(recipe: TensorRecipe, known: Selecting, found: list[int]) -> Summing:
    """Return what is known where the searches have ended."""
    num_experts = len(known.keys)
    if is_scored(recipe):
        by_quartiles = recipe.settings.drop == "importance"
        least = least_importance(found, wide=known.wide) if by_quartiles else found[0]
        return Summing(
            known.wide,
            known.keys,
            (least,) * num_experts,
            known.ceiling,
            divergences=known.divergences,
        )
    ceiling = tuple(found[num_experts:]) or known.ceiling
    return Summing(known.wide, known.keys, tuple(found[:num_experts]), ceiling)


def _width(known: _Constants) -> int:
    """Return the bits of a magnitude."""
    return 63 if known.wide else 31


def _selected(recipe: TensorRecipe, known: Summing) -> Prepared:
    """Return the state once the thresholds are known."""
    constants = (known.wide, known.keys, known.threshold, known.ceiling)
    if squares(recipe):
        return Squaring(*constants)
    if counts_overlaps(recipe):
        return Counting(*constants)
    if sums_magnitudes(recipe):
        return known
    return _ready(recipe, known)


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
