"""What the page says of two merges."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from html import escape

from della_dist.locations import short_names
from della_dist.report.page.deltas import NO_LAYER
from della_dist.report.page.grid import Grid, place
from della_dist.report.page.heat_map import HeatMap
from della_dist.report.page.html import figures, page, table
from della_dist.report.page.merge import Merge, foot, percent, recipe
from della_dist.report.page.pictures import NOTHING
from della_dist.storage.manifest import TensorRecord
from della_dist.wording import plural


def compared_page(one: Merge, other: Merge) -> str:
    """Return the page about two merges and their differences."""
    a, b = _names(one, other)
    grids = Grid(one.tensors), Grid(other.tensors)
    tensors = _by_name(one), _by_name(other)
    equal = sum(_is_equal(record, tensors[1].get(name)) for name, record in tensors[0].items())
    says = f"{equal:,} of {len(tensors[0].keys() | tensors[1].keys()):,} tensors have equal bytes."
    sections = [
        ("Recipes", _recipes(one, other, a, b)),
        ("Experts", _experts(grids, a, b)),
        ("Pictures", figures(_pictures(tensors, grids, a, b))),
        ("Tensors of one alone", _alone(tensors, a, b)),
    ]
    return page(f"{a} and {b}", says, sections, foot(one.manifest))


def _names(one: Merge, other: Merge) -> tuple[str, str]:
    a, b = short_names([one.location, other.location])
    return (a, b) if a != b else (f"{a} (first)", f"{b} (second)")


def _by_name(merge: Merge) -> dict[str, TensorRecord]:
    return {record.name: record for record, _ in merge.tensors}


def _is_equal(one: TensorRecord, other: TensorRecord | None) -> bool:
    return other is not None and (one.dtype, one.shape, one.blake3) == (
        other.dtype,
        other.shape,
        other.blake3,
    )


def _recipes(one: Merge, other: Merge, a: str, b: str) -> str:
    old, new = (recipe(merge.manifest).splitlines() for merge in (one, other))
    if old == new:
        return f"<p>Both have the same recipe.</p>\n<pre>{escape(recipe(one.manifest))}</pre>\n"
    lines = difflib.unified_diff(old, new, a, b, lineterm="", n=len(old) + len(new))
    return f"<pre>{escape(chr(10).join(lines))}</pre>\n"


def _experts(grids: tuple[Grid, Grid], a: str, b: str) -> str:
    rows = []
    for name in dict.fromkeys((*grids[0].experts, *grids[1].experts)):
        both = [grid.total.of(name) for grid in grids]
        rows.append(
            [
                name,
                *(f"{math.sqrt(one.squares):.4g}" if one.elements else NOTHING for one in both),
                *(percent(one.kept) for one in both),
                *(percent(one.elected) for one in both),
            ]
        )
    columns = ("norm of its delta", "kept", "in the sum")
    heads = ["expert", *(f"{column}, {name}" for column in columns for name in (a, b))]
    conflicts = [percent(grid.total.conflicts) for grid in grids]
    return (
        table(heads, rows, label="Experts of both", whole=True)
        + f'<p class="says">Kept contributions had both signs at {conflicts[0]} of the elements of '
        f"{escape(a)}, {conflicts[1]} of {escape(b)}.</p>\n"
    )


def _pictures(
    tensors: tuple[Mapping[str, TensorRecord], Mapping[str, TensorRecord]],
    grids: tuple[Grid, Grid],
    a: str,
    b: str,
) -> list[HeatMap]:
    sums: dict[tuple[str, int | None], list[int]] = {}
    for name, record in tensors[0].items():
        if name in tensors[1]:
            found = sums.setdefault(place(name), [0, 0])
            found[0] += _is_equal(record, tensors[1][name])
            found[1] += 1
    kinds = list(dict.fromkeys(kind for kind, _ in sums))
    layers = sorted({at for _, at in sums}, key=lambda at: (at is None, at or 0))
    columns = [NO_LAYER if at is None else str(at) for at in layers]

    def equal(kind: str, at: int | None) -> float:
        count, of = sums.get((kind, at), (0, 0))
        return count / of if of else math.nan

    def more_conflicts(kind: str, at: int | None) -> float:
        both = [grid.cells.get((kind, at)) for grid in grids]
        one, other = (math.nan if cell is None else cell.conflicts for cell in both)
        return other - one

    drawn = [
        HeatMap(
            "equal",
            "Equal bytes",
            f"Share of the tensors of each kind that are equal in {a} and {b}.",
            kinds,
            columns,
            [[equal(kind, at) for at in layers] for kind in kinds],
            is_share=True,
            limits=(0.0, 1.0),
        )
    ]
    changes = [[more_conflicts(kind, at) for at in layers] for kind in kinds]
    if any(math.isfinite(value) for row in changes for value in row):
        says = f"Share of elements with both signs in {b}, less that in {a}."
        drawn.append(
            HeatMap(
                "conflicts",
                f"Sign conflicts: {b} less {a}",
                says,
                kinds,
                columns,
                changes,
                is_share=True,
                scale="signed",
            )
        )
    return drawn


def _alone(
    tensors: tuple[Mapping[str, TensorRecord], Mapping[str, TensorRecord]], a: str, b: str
) -> str:
    rows = [
        [name, place]
        for mine, theirs, place in ((tensors[0], tensors[1], a), (tensors[1], tensors[0], b))
        for name in mine
        if name not in theirs
    ]
    if not rows:
        return "<p>Both have the same tensors.</p>\n"
    return f"<p>{plural(len(rows), 'tensor')}.</p>\n" + table(
        ["tensor", "only in"], rows, label="Tensors of one alone", texts=2
    )
