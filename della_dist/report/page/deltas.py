"""The pictures of what became of the experts' deltas."""

from __future__ import annotations

import math
from collections.abc import Callable

from della_dist.report.page.grid import ExpertSum, Grid, span
from della_dist.report.page.heat_map import HeatMap

#: Experts that have a picture of their own; of more there is one of all together.
MOST_EXPERTS = 8

#: A column of tensors that belong to no layer: embeddings, the last norm, the head.
NO_LAYER = "none"


def deltas(grid: Grid) -> list[HeatMap]:
    """Return the pictures of what happened to the deltas of experts."""
    layers = [NO_LAYER if layer is None else str(layer) for layer in grid.layers]
    of_expert = {
        expert: grid.by_kind(lambda one, name=expert: one.of(name).root_mean_square)  # type: ignore[misc]
        for expert in grid.experts[:MOST_EXPERTS]
    }
    # One scale for all, so that they can be compared; what was not changed has no place in it.
    changed = [[v for v in row if v > 0] for values in of_expert.values() for row in values]
    scale = span(changed)
    sizes = [
        HeatMap(
            f"delta-{i + 1}",
            f"Size of the deltas of {expert}",
            "Root mean square of what the expert changed, of each kind of tensor in each layer, "
            "on one scale for all experts, by factors.",
            grid.kinds,
            layers,
            values,
            limits=scale,
            scale="log",
        )
        for i, (expert, values) in enumerate(of_expert.items())
    ]
    everywhere = (0.0, 1.0)
    kept = "Share of an expert's deltas that the drop step kept, by layer."
    planned = {
        round(one.to_keep, 4) for one in grid.total.experts.values() if math.isfinite(one.to_keep)
    }
    if len(planned) == 1:
        kept += f" The recipe asks for {100 * planned.pop():.3g} %."

    def of_experts(
        name: str,
        title: str,
        says: str,
        value: Callable[[ExpertSum], float],
        limits: tuple[float, float] | None,
        *,
        is_share: bool = True,
    ) -> HeatMap:
        return HeatMap(
            name,
            title,
            says,
            grid.experts,
            layers,
            grid.by_expert(value),
            is_share=is_share,
            limits=limits,
        )

    survived = grid.by_expert(lambda one: one.survived)
    came_through: list[HeatMap] = []
    if any(math.isfinite(value) for row in survived for value in row):
        alike = (min(0.0, span(survived)[0]), 1.0)
        says = "Cosine of the merged delta with that of"
        came_through = [
            of_experts(
                "survived",
                "Where influence survived, by expert",
                f"{says} each expert, by layer: 1 where the merge is the expert, 0 where nothing "
                "of it is left.",
                lambda one: one.survived,
                alike,
                is_share=False,
            ),
            *(
                HeatMap(
                    f"survived-{i + 1}",
                    f"Where the influence of {expert} survived",
                    f"{says} the expert, of each kind of tensor in each layer.",
                    grid.kinds,
                    layers,
                    grid.by_kind(lambda one, name=expert: one.of(name).survived),  # type: ignore[misc]
                    limits=alike,
                )
                for i, expert in enumerate(grid.experts[:MOST_EXPERTS])
            ),
        ]
    shares = [
        of_experts("kept", "Kept", kept, lambda one: one.kept, everywhere),
        of_experts(
            "influence",
            "What came through",
            "Share of an expert's deltas that entered the sum: kept, and of the elected sign.",
            lambda one: one.elected,
            everywhere,
        ),
    ]
    return [
        of_experts(
            "sizes",
            "Size of the deltas by expert",
            "Root mean square of what each expert changed, by layer.",
            lambda one: one.root_mean_square,
            None,
            is_share=False,
        ),
        *(one for one in shares if not _is_all(one)),
        HeatMap(
            "conflicts",
            "Sign conflicts",
            "Share of elements at which what was kept of the experts had both signs.",
            grid.kinds,
            layers,
            grid.by_kind(lambda one: one.conflicts),
            is_share=True,
        ),
        *sizes,
        *came_through,
    ]


def _is_all(shares: HeatMap) -> bool:
    """Return whether nothing was lost, which needs no picture."""
    return all(value == 1 for row in shares.values for value in row if math.isfinite(value))
