"""Whether the tensors of a merge can be ranked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from della_dist.errors import InputError
from della_dist.specs.dtypes import num_elements
from della_dist.specs.rows import MAX_RANKED_ELEMENTS, row_view
from della_dist.specs.sources import Merged

if TYPE_CHECKING:
    from della_dist.planning.build import MergePlan


def refuse_unrankable(plan: MergePlan) -> None:
    """Refuse a merge that would rank more elements together than can be numbered."""
    for shard in plan.shards:
        for tensor in shard.tensors:
            if num_elements(tensor.shape) <= MAX_RANKED_ELEMENTS:
                continue
            match plan.source(tensor):
                case Merged(recipe):
                    view = row_view(recipe)
                    if view.ranked and view.num_cols > MAX_RANKED_ELEMENTS:
                        raise InputError(
                            f"tensor {tensor.name} of {plan.reference.location} has "
                            f"{view.num_cols} elements that are to be ranked together; at most "
                            f"{MAX_RANKED_ELEMENTS} can be. Use `granularity: row`, or another "
                            "method."
                        )
