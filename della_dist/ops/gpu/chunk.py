"""One chunk on the device: its deltas, what tells which are kept, and what they merge to.

Nothing here waits for the device, but for weights of rows, which are found on the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from della_dist.ops.angles import weights_from_products
from della_dist.ops.gpu.convert import count_overflow, narrow, widen
from della_dist.ops.gpu.measure import ProductSums
from della_dist.ops.gpu.scores import importances, variances
from della_dist.ops.gpu.staging import Slot
from della_dist.ops.gpu.stats import Tally, magnitude_bits
from della_dist.ops.gpu.steps import compute_dtype, drop, fuse, round_to_compute
from della_dist.ops.prepare import Prepared, Ready
from della_dist.specs.passes import is_scored
from della_dist.specs.recipe import TensorRecipe
from della_dist.specs.rows import RowView, row_view


@dataclass(frozen=True, slots=True)
class Chunk:
    """The inputs of elements ``start`` to ``stop`` on the device. n = stop - start."""

    start: int
    stop: int
    base: torch.Tensor | None
    """(n * itemsize,) uint8."""
    experts: tuple[torch.Tensor, ...]
    slot: Slot
    """Where they are."""


def base_of(recipe: TensorRecipe, prepared: Prepared, chunk: Chunk) -> torch.Tensor:
    """Return the base, (n,) in the compute dtype; zeros where there is none."""
    if chunk.base is None or recipe.base_dtype is None:
        return torch.zeros(
            chunk.stop - chunk.start,
            dtype=compute_dtype(prepared),
            device=chunk.experts[0].device,
        )
    return widen(chunk.base, recipe.base_dtype, compute_dtype(prepared))


def delta_of(
    recipe: TensorRecipe, prepared: Prepared, chunk: Chunk, base: torch.Tensor, m: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return expert `m`'s deltas, zero where they are not finite, and where they are finite."""
    # No delta is finite where the base is not.
    start = base - base if recipe.is_delta[m] else base
    delta = widen(chunk.experts[m], recipe.expert_dtypes[m], compute_dtype(prepared)) - start
    finite = torch.isfinite(delta)
    return torch.where(finite, delta, 0.0), finite


def deltas_of(
    recipe: TensorRecipe, prepared: Prepared, chunk: Chunk
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return every expert's deltas, and how many of each are not finite: int64 (M,)."""
    base = base_of(recipe, prepared, chunk)
    pairs = [delta_of(recipe, prepared, chunk, base, m) for m in range(len(chunk.experts))]
    nonfinite = torch.stack([finite.logical_not().sum() for _, finite in pairs])
    return [delta for delta, _ in pairs], nonfinite


def scores_of(
    recipe: TensorRecipe, base: torch.Tensor, deltas: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Return what decides which elements of a chunk are kept: (n,), numbers from 0 on."""
    if recipe.settings.drop == "variance":
        return variances(deltas)
    return importances(base, deltas[0], row_view(recipe).num_cols)


def merge_chunk(
    recipe: TensorRecipe, prepared: Ready, view: RowView, chunk: Chunk, tally: Tally
) -> torch.Tensor:
    """Return the bits of the merged chunk as integers, (n,), on the device."""
    settings = recipe.settings
    base = base_of(recipe, prepared, chunk)
    deltas: list[torch.Tensor] = []
    contributions = []
    rows: Sequence[torch.Tensor] = ()
    if settings.angles is not None and settings.angles.by_row:
        rows = _row_weights(recipe, view, deltas_of(recipe, prepared, chunk)[0])
    mask: torch.Tensor | None = None
    if is_scored(recipe):
        score = scores_of(recipe, base, deltas_of(recipe, prepared, chunk)[0])
        mask = magnitude_bits(score) >= prepared.threshold[0]
    for m in range(len(chunk.experts)):
        delta, finite = delta_of(recipe, prepared, chunk, base, m)
        keep, probability = mask, None
        if mask is None:
            keep, probability = drop(recipe, prepared, chunk.start, m, delta)
        tally.add_delta(m, delta, finite, keep)
        deltas.append(delta)
        if settings.rescale == "inverse" and probability is not None:
            delta = delta / probability.to(delta.dtype)
        elif settings.rescale == "l1":
            delta = delta * prepared.ratio[m]
        if settings.limit is not None:
            limit = round_to_compute(prepared, settings.limit)
            delta = delta.clamp(-limit, limit)
        weight = 1.0 if settings.by_energy else round_to_compute(prepared, prepared.weights[m])
        v = delta * (rows[m] if rows else weight)
        contributions.append(v if keep is None else torch.where(keep, v, 0.0))
    fused = fuse(settings, prepared, contributions, tally)
    scaled = fused * round_to_compute(prepared, settings.lambda_)
    contributions.clear()
    bits = narrow(base + scaled, recipe.out_dtype)
    tally.add_overflow(count_overflow(base, bits, recipe.out_dtype))
    merged = widen(bits.view(torch.uint8), recipe.out_dtype, base.dtype) - base
    tally.add_merged(deltas, torch.where(torch.isfinite(merged), merged, 0.0), view.unit)
    return bits


def _row_weights(
    recipe: TensorRecipe, view: RowView, deltas: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Return the weights of a chunk's elements, (M, n), where every row has its own."""
    products = ProductSums(len(deltas), view.num_cols)
    products.add(deltas)
    weights = torch.from_numpy(weights_from_products(recipe, products.sums()))
    weights = weights.to(deltas[0].dtype).to(deltas[0].device)
    return [w.repeat_interleave(view.num_cols) for w in weights]
