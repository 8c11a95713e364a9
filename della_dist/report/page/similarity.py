"""What a sample of the models said before a merge: how alike the experts are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from della_dist.locations import short_names
from della_dist.report.check import format_percent
from della_dist.report.page.heat_map import HeatMap
from della_dist.report.page.html import figures, table
from della_dist.report.page.pictures import MOST_ROWS
from della_dist.report.text import format_bytes

_NONE = (
    "The record of this merge has no comparison of its models: it was run with --no-check, or by a "
    "version that kept none. della-dist check CONFIG makes one."
)


@dataclass(frozen=True, slots=True)
class Similarity:
    """What `della_dist.report.check.recorded` kept."""

    models: Sequence[Mapping[str, Any]]
    names: Sequence[str]
    pairs: Mapping[tuple[int, int], tuple[float, float]]
    """Cosine of the deltas, and share of signs that agree, by the indexes of two models."""
    read: str

    @classmethod
    def of(cls, check: Mapping[str, Any] | None) -> Similarity | None:
        """Return the content of a record; None if there is none, or it is of another form."""
        if check is None:
            return None
        try:
            models = list(check["models"])
            return cls(
                models,
                short_names([str(model["model"]) for model in models]),
                {(int(a), int(b)): (float(c), float(d)) for a, b, c, d in check["pairs"]},
                f"{format_bytes(check['bytes_read'])} of {check['num_tensors']:,} tensors",
            )
        except (KeyError, TypeError, ValueError, OverflowError):
            return None

    def pictures(self) -> list[HeatMap]:
        """Return those of two experts and more."""
        if not self.pairs:
            return []
        count = min(len(self.names), MOST_ROWS)
        names = list(self.names[:count])
        first = "" if count == len(self.names) else f" The first {count} of {len(self.names)}."

        def pairs(which: int) -> list[list[float]]:
            return [
                [
                    1.0
                    if i == j
                    else self.pairs.get((min(i, j), max(i, j)), (math.nan, math.nan))[which]
                    for j in range(count)
                ]
                for i in range(count)
            ]

        cosines = pairs(0)
        least = min((x for row in cosines for x in row if math.isfinite(x)), default=0.0)
        return [
            HeatMap(
                "cosines",
                "Cosine between deltas",
                "How alike what two experts changed is: 0 of deltas that have nothing in common, 1 "
                f"of the same direction, below 0 of opposite ones.{first}",
                names,
                names,
                cosines,
                limits=(min(0.0, least), 1.0),
                is_of_pairs=True,
            ),
            HeatMap(
                "agreement",
                "Sign agreement",
                "Of the weights that two experts both changed, the share that they changed in the "
                f"same direction; 50 % of deltas that have nothing in common.{first}",
                names,
                names,
                pairs(1),
                is_share=True,
                limits=(0.0, 1.0),
                is_of_pairs=True,
            ),
        ]


def similarity_section(found: Similarity | None) -> str:
    """Return the section about the models, as HTML."""
    if found is None:
        return f"<p>{escape(_NONE)}</p>\n"
    if not found.models:
        return "<p>No tensor is merged of several models that could be compared.</p>\n"
    rows = [
        [
            name,
            short_names([str(model.get("reference"))])[0],
            str(model.get("verdict")),
            *(
                _text(model.get(key), share)
                for key, share in (
                    ("relative_delta", True),
                    ("matrix_cosine", False),
                    ("untouched", True),
                )
            ),
        ]
        for name, model in zip(found.names, found.models, strict=True)
    ]
    heads = ["model", "compared with", "verdict", "norm of its delta", "cosine", "untouched"]
    drawn = found.pictures()
    return (
        table(heads, rows, label="Models", texts=3, whole=True)
        + f'<p class="says">From a sample before the merge ({escape(found.read)}). The norm is in '
        "parts of that of the model that it is compared with; the cosine is the median over "
        "matrices.</p>\n" + (figures(drawn) if drawn else "")
    )


def _text(value: Any, is_share: bool) -> str:  # noqa: ANN401
    if type(value) not in (int, float):
        return "?"
    return format_percent(value) if is_share else f"{value:.4f}"
