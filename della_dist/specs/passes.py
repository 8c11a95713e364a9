"""How often a tensor is read, and what is gathered of it before it can be merged.

Trimming by magnitude looks for the k-th largest magnitude by 16 of its bits a pass, and ends early
where those bits leave one magnitude only; where outliers are dropped, for two in the same passes.
The ``l1`` rescale takes one pass more. Weights that follow from the angles between whole tensors
take a pass that multiplies these with each other; weights that follow from what is kept one that
squares it; and where it matters what experts share, one counts that.
"""

from __future__ import annotations

from della_dist.specs.dtypes import num_elements
from della_dist.specs.recipe import TensorRecipe, is_wide
from della_dist.specs.rows import row_view

#: Bits of the magnitude that one selection pass decides, and its buckets.
SELECT_BITS = 16
SELECT_BUCKETS = 1 << SELECT_BITS

#: Bytes of an exact sum of float64 numbers, as a Python integer, and of another that joins it.
PRODUCT_BYTES = 1024

#: Elements that rows have at least whose divergences are kept: a 32nd of a byte for each of them.
MIN_KEPT_COLS = 512


def num_kept(recipe: TensorRecipe) -> tuple[int, ...]:
    """Return how many elements trimming by magnitude keeps of each expert: at least one."""
    n = num_elements(recipe.shape)
    # Densities are in (0, 1].
    return tuple(min(n, max(1, int(d * n))) for d in recipe.settings.densities)


def num_above(recipe: TensorRecipe) -> tuple[int, ...]:
    """Return how many elements, the largest ones, are dropped of each expert as outliers."""
    n, settings = num_elements(recipe.shape), recipe.settings
    kept = zip(settings.gammas, num_kept(recipe), strict=True)
    return tuple(min(int(gamma * n), n - k) for gamma, k in kept)


def is_scored(recipe: TensorRecipe) -> bool:
    """Return whether scores of elements, of all experts together, tell what is kept."""
    settings = recipe.settings
    return settings.drop == "importance" or (
        settings.drop == "variance" and settings.densities[0] != 1
    )


def searches(recipe: TensorRecipe) -> tuple[int, ...]:
    """Return which of the largest magnitudes must be found, 1 the largest; 0 where none.

    The least that is kept of each expert; then, where outliers are dropped, the largest that is.
    By importance, the quartiles of that. By variance one, whose rank the first pass tells: a part
    of all that are not zero.
    """
    n, settings = num_elements(recipe.shape), recipe.settings
    if settings.drop == "importance":
        return tuple(n - quarters * (n - 1) // 4 for quarters in (1, 2, 3)) if n else ()
    if is_scored(recipe):
        return (n,) if n else ()
    kept = num_kept(recipe)
    if settings.drop == "magnitude":
        return kept if any(k != n for k in kept) else ()
    if settings.drop != "outliers" or all(k == n for k in kept):
        return ()
    above = num_above(recipe)
    floors = tuple(a + k if k != n else 0 for a, k in zip(above, kept, strict=True))
    return (*floors, *(a + 1 if a else 0 for a in above))


def selects(recipe: TensorRecipe) -> bool:
    """Return whether magnitudes of some rank must be found: not where all are kept."""
    return bool(searches(recipe))


def sums_magnitudes(recipe: TensorRecipe) -> bool:
    """Return whether the magnitudes must be added up before the merge."""
    return recipe.settings.rescale == "l1" and num_elements(recipe.shape) > 0


def multiplies(recipe: TensorRecipe) -> bool:
    """Return whether the deltas of whole tensors must be multiplied before the merge."""
    angles = recipe.settings.angles
    return angles is not None and not angles.by_row and num_elements(recipe.shape) > 0


def squares(recipe: TensorRecipe) -> bool:
    """Return whether what is kept must be squared and added up before the merge."""
    return recipe.settings.by_energy and num_elements(recipe.shape) > 0


def counts_overlaps(recipe: TensorRecipe) -> bool:
    """Return whether deltas that others share must be counted before the merge."""
    overlap, count = recipe.settings.overlap, len(recipe.expert_dtypes)
    matters = overlap is not None and overlap.r != 0 and overlap.alpha != 0 and count > 1
    return matters and num_elements(recipe.shape) > 0


def _passes_of_kept(recipe: TensorRecipe) -> int:
    """Return how many passes there are once it is known what is kept."""
    return sums_magnitudes(recipe) + squares(recipe) + counts_overlaps(recipe)


def num_products(num_experts: int) -> int:
    """Return how many pairs experts make, each with itself included."""
    return num_experts * (num_experts + 1) // 2


def least_passes(recipe: TensorRecipe) -> int:
    """Return how often the tensor is read, merging included, if one selection pass is enough."""
    return 1 + selects(recipe) + _passes_of_kept(recipe) + multiplies(recipe)


def most_passes(recipe: TensorRecipe) -> int:
    """Return how often the tensor is read, merging included, whatever its values are."""
    magnitude_bits = 63 if is_wide(recipe) else 31
    selection = -(-magnitude_bits // SELECT_BITS)
    return 1 + selects(recipe) * selection + _passes_of_kept(recipe) + multiplies(recipe)


def gathered_bytes(recipe: TensorRecipe) -> int:
    """Return the bytes of what one pass gathers, of a block or of the whole tensor, at most."""
    num_experts = len(recipe.expert_dtypes)
    exponents = 2048 if is_wide(recipe) else 256
    # For each search the counts and the range of every bucket, and for one a running sum of
    # counts; or two sums, in two parts, for every exponent; or a whole number for every product.
    selected = 8 * SELECT_BUCKETS * (3 * len(searches(recipe)) + 1) if selects(recipe) else 0
    summed = 8 * 4 * exponents * num_experts if sums_magnitudes(recipe) else 0
    multiplied = PRODUCT_BYTES * num_products(num_experts) if multiplies(recipe) else 0
    squared = PRODUCT_BYTES * num_experts if squares(recipe) else 0
    kept = 0
    if keeps_divergences(recipe):  # those of a block or of all, and again where they are joined
        kept = 16 * (num_elements(recipe.shape) // row_view(recipe).num_cols)
    return max(selected, summed, multiplied, squared) + kept


def keeps_divergences(recipe: TensorRecipe) -> bool:
    """Return whether the divergences of all rows are kept from the first pass on: if they are few.

    Exponentials and logarithms take most of the time of a pass.
    """
    is_by_row = recipe.settings.drop == "importance" and num_elements(recipe.shape) > 0
    return is_by_row and row_view(recipe).num_cols >= MIN_KEPT_COLS
