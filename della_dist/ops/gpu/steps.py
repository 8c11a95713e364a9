"""Drop, elect and fuse in torch, on any device. n elements of a chunk, M experts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from della_dist.ops.gpu.philox import uniforms
from della_dist.ops.gpu.rank import keep_probabilities
from della_dist.ops.gpu.stats import Tally, magnitude_bits
from della_dist.ops.prepare import Prepared, Ready
from della_dist.specs.recipe import GUARD, MergeSettings, TensorRecipe
from della_dist.specs.rows import row_view


def compute_dtype(prepared: Prepared) -> torch.dtype:
    """Return the dtype that the arithmetic of a tensor is done in."""
    return torch.float64 if prepared.wide else torch.float32


def round_to_compute(prepared: Prepared, value: float) -> float:
    """Return `value` rounded once to the compute dtype, so that torch need not round it."""
    if prepared.wide:
        return value
    with np.errstate(over="ignore"):
        return float(np.float32(value))


def drop(
    recipe: TensorRecipe, prepared: Prepared, start: int, m: int, delta: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Decide which elements of expert `m` survive.

    Parameters
    ----------
    recipe, prepared
        The tensor and its constants.
    start
        Position of the first element in the tensor.
    m
        The expert.
    delta
        (n,) float32 or float64, finite; whole rows where elements are ranked.

    Returns
    -------
    tuple
        (n,) bool: what is kept, None for everything; and the float32 keep probabilities, (n,) or
        (1,), None where nothing is to be divided by them.
    """
    settings = recipe.settings
    view = row_view(recipe)
    density, epsilon = settings.densities[m], settings.epsilons[m]
    if settings.drop in ("magnitude", "outliers", "threshold"):
        key = magnitude_bits(delta)
        return (key >= prepared.threshold[m]) & (key <= prepared.ceiling[m]), None
    if settings.drop in ("none", "variance") or density == 1:
        return None, None
    if view.ranked and view.num_cols > 1 and epsilon != 0:
        key_RC = magnitude_bits(delta).view(-1, view.num_cols)
        probability = keep_probabilities(key_RC, density, epsilon).view(-1)
    else:
        probability = torch.full((1,), density, dtype=torch.float32, device=delta.device)
    u = uniforms(prepared.keys[m], start, start + delta.numel(), delta.device)
    return u < probability, probability


def fuse(
    settings: MergeSettings,
    prepared: Ready,
    contributions: Sequence[torch.Tensor],
    tally: Tally,
) -> torch.Tensor:
    """Elect and add up, every sum in the order of the experts.

    Parameters
    ----------
    settings, prepared
        How to merge, and the constants.
    contributions
        (M, n): the weighted and pruned deltas.
    tally
        Where the elected contributions and the conflicts are counted.

    Returns
    -------
    torch.Tensor
        (n,): the fused delta.
    """
    numerator = torch.zeros_like(contributions[0])
    positive = torch.zeros_like(numerator, dtype=torch.bool)
    negative = torch.zeros_like(positive)
    for v in contributions:
        numerator = numerator + v
        positive |= v > 0
        negative |= v < 0
    tally.add_conflicts(positive & negative)
    if settings.overlap is not None:
        return _shared(prepared, contributions, numerator)
    weights = [round_to_compute(prepared, w) for w in settings.weights]
    if settings.by_energy:
        weights = [round_to_compute(prepared, w) for w in prepared.weights]
        contributions = [v * w for v, w in zip(contributions, weights, strict=True)]
    if settings.elect:
        to_plus = numerator >= 0
        numerator = torch.zeros_like(numerator)
        denominator = torch.zeros_like(numerator)
        zero = torch.zeros(1, dtype=numerator.dtype, device=numerator.device)
        for m, v in enumerate(contributions):
            elected = (v != 0).logical_and_((v > 0) == to_plus)
            tally.add_elected(m, elected)
            # A sum that starts at +0.0 is never -0.0, so adding +0.0 changes nothing.
            numerator = numerator + torch.where(elected, v, zero)
            denominator = denominator + torch.where(
                elected, torch.full_like(zero, weights[m]), zero
            )
    else:
        denominator = torch.zeros(1, dtype=numerator.dtype, device=numerator.device)
        for weight in weights:
            denominator = denominator + weight
    if not settings.normalize:
        return numerator
    sum_abs = 0.0
    for w in settings.weights:  # not sum(): from Python 3.12 on it compensates
        sum_abs += 0.0 if settings.by_energy else abs(w)
    guard = round_to_compute(prepared, GUARD * sum_abs)
    return torch.where(denominator.abs() <= guard, numerator, numerator / denominator)


def _shared(
    prepared: Ready, contributions: Sequence[torch.Tensor], total: torch.Tensor
) -> torch.Tensor:
    """Return the mean of the contributions that there are: (n,). One that is alone is boosted."""
    boosted, count = torch.zeros_like(total), torch.zeros_like(total)
    for v, ratio in zip(contributions, prepared.ratio, strict=True):
        boosted = boosted + v * round_to_compute(prepared, ratio)
        count = count + (v != 0).to(total.dtype)
    return torch.where(count == 1, boosted, total / count.clamp(min=1))
