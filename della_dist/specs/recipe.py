"""How one tensor is merged: everything about it but its data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Drop = Literal["none", "magprune", "random", "magnitude"]
Granularity = Literal["row", "tensor"]
Rescale = Literal["inverse", "l1", "none"]
OnNonfinite = Literal["error", "zero"]


@dataclass(frozen=True, slots=True)
class MergeSettings:
    """How every element of one tensor is merged (DELLA paper, section 3).

    ``weights``, ``densities`` and ``epsilons`` have one entry an expert, in the order of the
    configuration, which is also the order of every sum over experts.
    """

    drop: Drop
    elect: bool
    rescale: Rescale
    normalize: bool
    lambda_: float
    granularity: Granularity
    on_nonfinite: OnNonfinite
    seed: int
    weights: tuple[float, ...]
    densities: tuple[float, ...]
    epsilons: tuple[float, ...]
    """Half widths of the keep-probability window; all zero unless ``drop`` is ``magprune``."""


@dataclass(frozen=True, slots=True)
class TensorRecipe:
    """Everything about one tensor but its data: enough to merge any block of it anywhere."""

    name: str
    shape: tuple[int, ...]
    base_dtype: str | None
    """None where the method has no base (``linear``): the base then counts as zero."""
    expert_dtypes: tuple[str, ...]
    out_dtype: str
    settings: MergeSettings
    stage: int = 0
    """Merges that lie one after another behind the inputs: part of the key of the random words."""
