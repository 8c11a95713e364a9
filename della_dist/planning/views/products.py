"""Products of two matrices, by the tensors of a model that have their rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

from della_dist.planning.views.located import Target
from della_dist.specs.sources import LowRank


def divided(target: Target, product: LowRank) -> Iterator[tuple[str, LowRank]]:
    """Yield the parts of a product that the tensors of a model have."""
    if target.is_whole:
        yield target.spans[0].entry.name, product
        return
    row = 0
    for span in target.spans:
        done = 0
        while done < span.count:
            group, first = divmod(row + done, product.rows)
            count = min(product.rows - first, span.count - done)
            left, right = product.left_strides, product.right_strides
            yield (
                span.entry.name,
                replace(
                    product,
                    groups=1,
                    rows=count,
                    left_start=group * left[0] + first * left[1],
                    right_start=group * right[0],
                    first_row=span.first + done,
                ),
            )
            done += count
        row += span.count


def overlap(products: Sequence[LowRank]) -> bool:
    """Return whether two products change the same rows of a tensor."""
    ranges = sorted((one.first_row, one.first_row + one.groups * one.rows) for one in products)
    return any(stop > start for (_, stop), (start, _) in pairwise(ranges))
