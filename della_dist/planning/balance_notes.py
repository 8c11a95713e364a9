"""What a person should know of how matrices are merged as a whole, before the run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from della_dist.planning.build import MergePlan
from della_dist.specs.balancing import balancing
from della_dist.specs.sources import Balanced


def form_notes(plan: MergePlan) -> Iterator[str]:
    """Yield how many matrices `wudi` merges in other forms than the primal."""
    if plan.config.method.balance != "wudi":
        return
    forms: Counter[str] = Counter()
    for shard in plan.shards:
        for tensor in shard.tensors:
            source = plan.source(tensor)
            if isinstance(source, Balanced):
                how = balancing(source)
                forms[how.form] += how.num_matrices
    if forms["dual"]:
        yield (
            f"wudi: {_matrices(forms['dual'])} of fewer rows, of all experts together, than "
            "inputs: merged by the products of these rows (the dual form)."
        )
    if forms["low_rank"]:
        yield (
            f"wudi: {_matrices(forms['low_rank'])} that only adapters change: merged by the "
            "adapters' own factors, in float64. No delta of theirs is formed but to be measured."
        )


def _matrices(count: int) -> str:
    return f"{count:,} {'matrix' if count == 1 else 'matrices'}"
