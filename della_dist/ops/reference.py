"""The formulas, written down plainly: one whole tensor at a time, in numpy.

This module is what the backends are compared with, byte for byte, and what a reader should start
with. It shares nothing with them but the recipe: it has a Philox of its own, ranks with
`numpy.sort` and `numpy.searchsorted`, finds the k-th largest magnitude by sorting, and adds up
exact sums as Python integers. What follows from angles is in `della_dist.ops.angles` alone,
exponential and logarithm are in `della_dist.ops.divergence`. Memory and speed are no concern here.

References
----------
Deep, Bhardwaj, Poria: DELLA-Merging: Reducing Interference in Model Merging through
Magnitude-Based Sampling. 2024 (section 3: drop, elect, fuse).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from fractions import Fraction
from itertools import combinations_with_replacement
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from della_dist.ops.angles import weights_from_products
from della_dist.ops.blocks import SQUARES_CHUNK, SQUARES_SUMS, BlockStats, U8Array, combine_stats
from della_dist.ops.divergence import EPS, MOST, exponential, logarithm
from della_dist.ops.energy import weights_by_energy
from della_dist.ops.rounding import narrow, widen
from della_dist.specs.dtypes import num_elements
from della_dist.specs.recipe import GUARD, MergeSettings, Overlap, TensorRecipe, is_wide
from della_dist.specs.rows import row_shape, row_view
from della_dist.specs.statistics import TensorStats

FloatArray: TypeAlias = npt.NDArray[np.floating[Any]]
U64Array: TypeAlias = npt.NDArray[np.uint64]
BoolArray: TypeAlias = npt.NDArray[np.bool_]

_LOW_32 = np.uint64(0xFFFFFFFF)


def merge_reference(
    recipe: TensorRecipe, base: U8Array | None, experts: Sequence[U8Array]
) -> tuple[U8Array, TensorStats]:
    """Merge one whole tensor.

    Parameters
    ----------
    recipe
        What to do; ``recipe.settings.on_nonfinite`` is left to the caller: a non-finite delta
        counts as zero here.
    base, experts
        The raw little-endian bytes of each checkpoint's tensor, uint8 of any alignment.

    Returns
    -------
    tuple
        The raw bytes of the merged tensor, uint8, and its statistics.
    """
    out, stats = merge_whole(recipe, base, experts)
    return out, combine_stats(recipe, [stats])


def merge_whole(
    recipe: TensorRecipe, base: U8Array | None, experts: Sequence[U8Array]
) -> tuple[U8Array, BlockStats]:
    """Merge one whole tensor; the statistics are those of a single block that holds all of it."""
    with np.errstate(all="ignore"):
        return _merge_whole(recipe, base, experts)


def _merge_whole(
    recipe: TensorRecipe, base: U8Array | None, experts: Sequence[U8Array]
) -> tuple[U8Array, BlockStats]:
    settings = recipe.settings
    num_experts = len(experts)
    n = num_elements(recipe.shape)
    compute = np.float64 if is_wide(recipe) else np.float32
    base_f = np.zeros(n, compute)
    if base is not None:
        assert recipe.base_dtype is not None
        base_f = widen(base, recipe.base_dtype).astype(compute)

    num_nonfinite = np.zeros(num_experts, np.int64)
    num_nonzero = np.zeros(num_experts, np.int64)
    num_kept = np.zeros(num_experts, np.int64)
    max_abs = np.zeros(num_experts, np.float64)
    deltas = []
    for m, expert in enumerate(experts):
        # No delta is finite where the base is not.
        start = base_f - base_f if recipe.is_delta[m] else base_f
        delta = widen(expert, recipe.expert_dtypes[m]).astype(compute) - start
        finite = np.isfinite(delta)
        deltas.append(np.where(finite, delta, compute(0.0)))
        num_nonfinite[m] = n - np.count_nonzero(finite)

    weights = weights_of(recipe, deltas)
    contributions = []
    for m, delta in enumerate(deltas):
        keep, keep_probability = drop(recipe, m, delta)
        if settings.drop in ("importance", "variance"):
            keep = by_score(recipe, base_f, deltas)
        pruned = delta
        if settings.limit is not None:
            pruned = np.clip(delta, -compute(settings.limit), compute(settings.limit))
        if settings.rescale == "inverse" and settings.drop in ("magprune", "random"):
            pruned = delta / keep_probability.astype(compute)
        elif settings.rescale == "l1":
            pruned = delta * compute(l1_ratio(delta, keep))
        weight = compute(1.0) if settings.by_energy else weights[m].astype(compute)
        contributions.append(np.where(keep, weight * pruned, compute(0.0)))

        num_nonzero[m] = np.count_nonzero(delta)
        num_kept[m] = np.count_nonzero(keep & (delta != 0))
        max_abs[m] = np.abs(delta).max(initial=0)

    unit = row_view(recipe).unit
    if settings.overlap is not None:
        fused, num_elected = mean_of_present(settings.overlap, contributions), num_kept
    else:
        shares = energies(contributions, unit) if settings.by_energy else settings.weights
        fused, num_elected = fuse(settings, contributions, shares)
    merged = base_f + compute(settings.lambda_) * fused
    out = narrow(merged, recipe.out_dtype)

    positive, negative = np.zeros(n, np.bool_), np.zeros(n, np.bool_)
    for v in contributions:
        positive |= v > 0
        negative |= v < 0
    written = widen(out, recipe.out_dtype).astype(compute)
    delta = written - base_f
    merged_delta = np.where(np.isfinite(delta), delta, compute(0.0))
    return out, BlockStats(
        num_nonfinite=num_nonfinite,
        num_nonzero=num_nonzero,
        num_kept=num_kept,
        num_elected=num_elected if settings.elect else num_kept,
        max_abs=max_abs,
        sum_sq=np.transpose([unit_products(delta, delta, unit) for delta in deltas]),
        merged_sq=unit_products(merged_delta, merged_delta, unit),
        dots=np.transpose([unit_products(delta, merged_delta, unit) for delta in deltas]),
        merged_max_abs=float(np.abs(merged_delta).max(initial=0)),
        num_conflicts=int(np.count_nonzero(positive & negative)),
        num_overflow=int(np.count_nonzero(np.isfinite(base_f) & ~np.isfinite(written))),
    )


def unit_products(a: FloatArray, b: FloatArray, unit: int) -> npt.NDArray[np.float64]:
    """Return the sum of the products of every unit: (U,)."""
    starts = range(0, a.size, unit)
    sums = [sum_of_products(a[i : i + unit], b[i : i + unit]) for i in starts]
    return np.array(sums, np.float64)


def weights_of(recipe: TensorRecipe, deltas: Sequence[FloatArray]) -> npt.NDArray[np.float64]:
    """Return the factors of every delta's elements: (M, n), or (M, 1) where all have the same."""
    settings, angles = recipe.settings, recipe.settings.angles
    n = num_elements(recipe.shape)
    if angles is None or n == 0:
        return np.array(settings.weights)[:, np.newaxis]
    cols = recipe.shape[-1] if recipe.shape else 1
    step = cols if angles.by_row else row_view(recipe).unit
    products = [
        [sum_of_products(a[i : i + step], b[i : i + step]) for i in range(0, n, step)]
        for a, b in combinations_with_replacement(deltas, 2)
    ]
    if angles.by_row:
        return np.repeat(weights_from_products(recipe, np.array(products)), cols, axis=1)
    return weights_from_products(recipe, np.array([[exact_sum(units)] for units in products]))


def exact_sum(values: Sequence[float]) -> float:
    """Return the sum, rounded once; infinite where a float64 does not hold it."""
    try:
        return float(sum(map(Fraction, values)))
    except (OverflowError, ValueError):  # the latter of a unit that adds infinities of both signs
        return float("inf")


def sum_of_products(a: FloatArray, b: FloatArray) -> float:
    """Return the sum of the products of one unit, in the order `della_dist.ops.blocks` states."""
    products = a.astype(np.float64) * b.astype(np.float64)
    total = 0.0
    for start in range(0, a.size, SQUARES_CHUNK):
        chunk = products[start : start + SQUARES_CHUNK]
        padded = np.append(chunk, np.zeros(-chunk.size % SQUARES_SUMS))
        sums = np.zeros(SQUARES_SUMS)
        for group in padded.reshape(-1, SQUARES_SUMS):
            sums = sums + group
        while sums.size > 1:
            half = sums.size // 2
            sums = sums[:half] + sums[half:]
        total += float(sums[0])
    return total


def energies(contributions: Sequence[FloatArray], unit: int) -> tuple[float, ...]:
    """Return every expert's part of the squares of what is kept."""
    n = contributions[0].size
    parts = [[v[i : i + unit] for i in range(0, n, unit)] for v in contributions]
    return weights_by_energy([exact_sum([sum_of_products(p, p) for p in v]) for v in parts])


def mean_of_present(overlap: Overlap, contributions: Sequence[FloatArray]) -> FloatArray:
    """Return the mean of what experts have at each element, (n,); more of what is alone there."""
    compute = contributions[0].dtype.type
    total, boosted = np.zeros_like(contributions[0]), np.zeros_like(contributions[0])
    count = np.sum([v != 0 for v in contributions], axis=0)
    for v in contributions:
        shared = int(np.count_nonzero((v != 0) & (count > 1)))
        unique = int(np.count_nonzero((v != 0) & (count == 1)))
        rho = overlap.alpha * (shared > 0)
        if unique:
            rho = min(overlap.alpha, shared / unique)
        total = total + v
        boosted = boosted + v * compute(1.0 + overlap.r * rho)
    mean: FloatArray = np.where(count == 1, boosted, total / np.maximum(count, 1).astype(compute))
    return mean


def most_different(density: float, deltas: Sequence[FloatArray]) -> BoolArray:
    """Return where experts differ most, (n,): a part of all elements at which they do."""
    values = [delta.astype(np.float64) for delta in deltas]
    mean, total = np.zeros(values[0].size), np.zeros(values[0].size)
    for v in values:
        mean = mean + v
    mean = mean / len(values)
    for v in values:
        total = total + (v - mean) * (v - mean)
    variance = (total / len(values)).astype(deltas[0].dtype)
    if density == 1:
        return np.ones(variance.size, np.bool_)
    ordered = np.sort(variance[variance != 0])
    k = int(density * ordered.size)
    keep: BoolArray = variance >= ordered[-k] if k else np.zeros(variance.size, np.bool_)
    return keep


def fuse(
    settings: MergeSettings, contributions: Sequence[FloatArray], shares: Sequence[float]
) -> tuple[FloatArray, npt.NDArray[np.int64]]:
    """Elect and add up, every sum in the order of the experts (DELLA paper, sections 3.2 and 3.3).

    Parameters
    ----------
    settings
        How to merge.
    contributions
        (M, n): the weighted and pruned deltas, float32 or float64.
    shares
        (M,) what each counts in the divisor: the weights; by energy contributions are multiplied
        by them, once signs are elected.

    Returns
    -------
    tuple
        (n,) the fused delta, and (M,) how many contributions of each expert were elected.
    """
    n = contributions[0].size
    compute = contributions[0].dtype.type
    weights = [compute(w) for w in shares]
    total = np.zeros(n, compute)
    for v in contributions:
        total = total + v
    if settings.by_energy:
        contributions = [v * w for v, w in zip(contributions, weights, strict=True)]
    numerator, denominator = np.zeros(n, compute), np.zeros(n, compute)
    num_elected = np.zeros(len(contributions), np.int64)
    if settings.elect:
        for m, v in enumerate(contributions):
            elected = (v != 0) & ((v > 0) == (total >= 0))
            numerator = np.where(elected, numerator + v, numerator)
            denominator = np.where(elected, denominator + weights[m], denominator)
            num_elected[m] = np.count_nonzero(elected)
    else:
        numerator = total
        for weight in weights:
            denominator = denominator + weight
    if not settings.normalize:
        return numerator, num_elected
    sum_abs = 0.0
    for w in settings.weights:  # not sum(): from Python 3.12 on it compensates
        sum_abs += 0.0 if settings.by_energy else abs(w)
    guard = compute(GUARD * sum_abs)
    fused = np.where(np.abs(denominator) <= guard, numerator, numerator / denominator)
    return fused, num_elected


def drop(
    recipe: TensorRecipe, m: int, delta: FloatArray
) -> tuple[BoolArray, npt.NDArray[np.float32]]:
    """Decide which elements of expert `m` survive.

    Parameters
    ----------
    recipe, m
        The recipe and the expert's position in it.
    delta
        (n,): the finite deltas of the whole tensor, in row-major order.

    Returns
    -------
    tuple
        (n,) which elements are kept, and (n,) float32 their keep probabilities.
    """
    settings, n = recipe.settings, delta.size
    probability = np.ones(n, np.float32)
    if settings.drop == "threshold":
        return np.abs(delta) > delta.dtype.type(settings.least), probability
    if settings.drop in ("none", "importance", "variance") or n == 0:
        return np.ones(n, np.bool_), probability
    if settings.drop == "magnitude":
        magnitude = np.abs(delta)
        k = min(n, max(1, int(settings.densities[m] * n)))
        return magnitude >= np.sort(magnitude)[n - k], probability
    if settings.drop == "outliers":
        magnitude, ordered = np.abs(delta), np.sort(np.abs(delta))
        k = min(n, max(1, int(settings.densities[m] * n)))
        top = n - min(n - k, int(settings.gammas[m] * n))
        return (magnitude >= ordered[top - k]) & (magnitude <= ordered[top - 1]), probability
    if settings.drop == "random":
        probability[:] = settings.densities[m]
    else:
        num_cols = n if settings.granularity == "tensor" else row_shape(recipe.shape)[1]
        delta_RC = delta.reshape(-1, num_cols)
        probability_RC = probability.reshape(-1, num_cols)
        for r, row in enumerate(delta_RC):
            probability_RC[r] = magprune_probability(row, settings, m)
    return uniforms(settings.seed, recipe.name, m, n, recipe.stage) < probability, probability


def magprune_probability(
    row: FloatArray, settings: MergeSettings, m: int
) -> npt.NDArray[np.float32]:
    """Return the keep probability of every delta of one `row` (DELLA paper, section 3.1)."""
    density, epsilon, n = settings.densities[m], settings.epsilons[m], row.size
    if n == 1:
        return np.full(1, density, np.float32)
    magnitude = np.abs(row)
    ordered = np.sort(magnitude)
    first = np.searchsorted(ordered, magnitude, side="left")
    last = np.searchsorted(ordered, magnitude, side="right") - 1
    mean_rank = (first + last).astype(np.float64) * 0.5
    probability = (density - epsilon) + (2.0 * epsilon) * (mean_rank / (n - 1))
    return probability.astype(np.float32)


def by_score(recipe: TensorRecipe, base: FloatArray, deltas: Sequence[FloatArray]) -> BoolArray:
    """Return which elements of every expert are kept, where all together tell: (n,)."""
    if recipe.settings.drop == "variance":
        return most_different(recipe.settings.densities[0], deltas)
    return most_important(recipe, base, deltas[0])


def most_important(recipe: TensorRecipe, base: FloatArray, delta: FloatArray) -> BoolArray:
    """Return which elements of the one expert are kept by importance: (n,).

    Parameters
    ----------
    recipe
        Whose rows, the last axis, have divergences.
    base, delta
        (n,): the base, and the finite deltas.
    """
    if delta.size == 0:
        return np.ones(0, np.bool_)
    cols = recipe.shape[-1] if recipe.shape else 1
    divergences = []
    for start in range(0, delta.size, cols):
        row = base[start : start + cols].astype(np.float64)
        q = np.where(np.isfinite(row), row, -np.inf)
        p = np.minimum(q + delta[start : start + cols].astype(np.float64), MOST)
        divergences.append(divergence(p, q))
    compute = delta.dtype.type
    importance = np.abs(delta) * np.repeat(np.array(divergences), cols).astype(compute)
    ordered = np.sort(importance)
    low, middle, high = (ordered[quarters * (delta.size - 1) // 4] for quarters in (1, 2, 3))
    keep: BoolArray = importance >= middle + compute(1.5) * (high - low)
    return keep


def divergence(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> float:
    """Return the divergence of one row from another: see `della_dist.ops.divergence`."""
    probabilities = []
    for row in (x, y):
        top = row.max()
        e = exponential(row - (0.0 if np.isinf(top) else top))
        total = sum_of_products(e, np.ones(e.size))
        probabilities.append(e / (total if total != 0 else 1.0) + EPS)
    p, q = probabilities
    return max(sum_of_products(p, logarithm(p / q)), 0.0)


def uniforms(
    seed: int, tensor_name: str, m: int, n: int, stage: int = 0
) -> npt.NDArray[np.float32]:
    """Return the random numbers in [0, 1) of elements 0 to `n` - 1 of one tensor and expert."""
    ordinal = m + (stage << 32)
    message = seed.to_bytes(8, "little") + ordinal.to_bytes(8, "little") + tensor_name.encode()
    key = int.from_bytes(hashlib.blake2b(message).digest()[:8], "little")
    counter = np.arange(-(-n // 4), dtype=np.uint64)
    zero = np.zeros_like(counter)
    words = philox4x32(
        (counter & _LOW_32, counter >> np.uint64(32), zero, zero), (key & 0xFFFFFFFF, key >> 32)
    )
    word = np.stack(words, axis=1).reshape(-1)[:n]
    u: npt.NDArray[np.float32] = (word >> np.uint64(8)).astype(np.float32) * np.float32(2.0**-24)
    return u


def philox4x32(
    counter: tuple[U64Array, U64Array, U64Array, U64Array], key: tuple[int, int]
) -> tuple[U64Array, U64Array, U64Array, U64Array]:
    """Return the four 32-bit words (as uint64 arrays) of Philox4x32-10 for arrays of counters."""
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for _ in range(10):
        # Both factors are below 2**32: the product fits.
        product0 = x0 * np.uint64(0xD2511F53)
        product1 = x2 * np.uint64(0xCD9E8D57)
        x0, x1, x2, x3 = (
            (product1 >> np.uint64(32)) ^ x1 ^ np.uint64(k0),
            product1 & _LOW_32,
            (product0 >> np.uint64(32)) ^ x3 ^ np.uint64(k1),
            product0 & _LOW_32,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return x0, x1, x2, x3


def l1_ratio(delta: FloatArray, keep: BoolArray) -> float:
    """Return sum|delta| / sum|kept delta|, correctly rounded; 1 where nothing is kept."""
    kept = exact_abs_sum(delta[keep])
    if kept == 0:
        return 1.0
    try:
        return float(exact_abs_sum(delta) / kept)
    except OverflowError:
        return float("inf")


def exact_abs_sum(values: FloatArray) -> Fraction:
    """Return the sum of the absolute `values`, exactly."""
    significand, exponent = np.frexp(np.abs(values.astype(np.float64)))
    integer = np.ldexp(significand, 53).astype(np.int64)
    total = Fraction(0)
    for e in np.unique(exponent):
        total += sum(integer[exponent == e].tolist()) * Fraction(2) ** (int(e) - 53)
    return total
