"""The ranks of tensors that adapters change: what their products add to which matrices."""

from __future__ import annotations

from collections.abc import Iterator

from della_dist.specs.recipe import keeps_all
from della_dist.specs.sources import Adapted, LowRank, Merged


def rank_of_all(source: Merged, num_matrices: int, rows: int, cols: int) -> int | None:
    """Return the ranks of all experts together, of the matrix of a stack that has most.

    None where some expert's delta is not merely a sum of products, or is changed before it counts.

    Parameters
    ----------
    source
        The tensor.
    num_matrices, rows, cols
        What it is a stack of.
    """
    settings = source.recipe.settings
    if not keeps_all(settings) or settings.on_nonfinite != "error":
        return None
    ranks = [0] * num_matrices
    for expert in source.experts:
        if not isinstance(expert, Adapted) or expert.of is not None:
            return None
        for term in expert.terms:
            if not isinstance(term, LowRank) or term.cols != cols:
                return None
            for number, _, _, _ in parts_of(term, rows):
                ranks[number] += term.rank
    return max(ranks)


def parts_of(term: LowRank, rows: int) -> Iterator[tuple[int, int, int, slice]]:
    """Yield what a product adds to the matrices of a stack.

    Parameters
    ----------
    term
        As wide as the matrices.
    rows
        Of each.

    Yields
    ------
    tuple
        The number of the matrix; which of its rows is the first; the group of the product; and
        which rows of that are added.
    """
    for group in range(term.groups):
        start = term.first_row + group * term.rows
        row = start
        while row < start + term.rows:
            number, first = divmod(row, rows)
            last = min(start + term.rows, (number + 1) * rows)
            yield number, first, group, slice(row - start, last - start)
            row = last
