"""What the page says of one merge."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import yaml

from della_dist.config import config_from_mapping
from della_dist.locations import short_names
from della_dist.report.page.deltas import deltas
from della_dist.report.page.grid import ExpertSum, Grid, place
from della_dist.report.page.html import figures, page, table
from della_dist.report.page.pictures import NOTHING, Picture
from della_dist.report.page.similarity import Similarity, similarity_section
from della_dist.report.page.timeline import timeline
from della_dist.report.page.timing import timing_section
from della_dist.report.page.trials import search_section, trial_pictures
from della_dist.report.text import format_bytes
from della_dist.specs.history import History
from della_dist.storage.manifest import TensorRecord
from della_dist.storage.tensor_table import Experts
from della_dist.version import __version__
from della_dist.wording import plural

#: Tensors that are listed.
MOST_TENSORS = 25


@dataclass(frozen=True, slots=True)
class Merge:
    """A finished merge."""

    location: str
    manifest: Mapping[str, Any]
    tensors: Sequence[tuple[TensorRecord, Experts]]
    history: History | None = None
    """How it was run; None if that is not known."""
    search: Mapping[str, Any] | None = None
    """What its configuration was found by; None: it was not searched."""


class Seen:
    """A merge, added up, with its pictures."""

    def __init__(self, merge: Merge) -> None:
        self.merge = merge
        self.grid = Grid(merge.tensors)
        self.similarity = Similarity.of(None if merge.history is None else merge.history.check)
        self.timeline = None if merge.history is None else timeline(merge.history)
        self.deltas = deltas(self.grid) if self.grid.experts else []

    @property
    def pictures(self) -> list[Picture]:
        """All of them, in the order of the page."""
        search = self.merge.search
        trials = [] if search is None else trial_pictures(search)
        alike = [] if self.similarity is None else self.similarity.pictures()
        at_work = [] if self.timeline is None else [self.timeline]
        return [*trials, *self.deltas, *alike, *at_work]


def merge_page(seen: Seen) -> str:
    """Return the page about a merge."""
    merge, grid = seen.merge, seen.grid
    manifest = merge.manifest
    config = config_from_mapping(manifest["config"])
    says = (
        f"{config.method.title} of {plural(len(config.models), 'model')}: "
        f"{manifest['num_parameters']:,} parameters in {manifest['num_tensors']:,} tensors."
    )
    sections = [("Recipe and inputs", _inputs(manifest))]
    if merge.search is not None:
        sections.append(("Search", search_section(merge.search)))
    if grid.experts:
        sections += [
            ("What each expert brought", experts_table(grid)),
            ("What became of the deltas", figures(seen.deltas)),
            ("Similarity of the experts", similarity_section(seen.similarity)),
            ("Tensors that change most", _most(merge.tensors)),
        ]
    sections += [
        ("Timing and workers", timing_section(merge.history, manifest, seen.timeline)),
        ("Kinds of tensors", _kinds(merge.tensors)),
    ]
    return page(f"Merge of {_called(merge)}", says, sections, foot(manifest))


def experts_table(grid: Grid) -> str:
    """Return a table with a row an expert, as HTML."""

    def row(name: str, one: ExpertSum) -> list[str]:
        return [
            name,
            f"{math.sqrt(one.squares):.4g}",
            f"{one.root_mean_square:.3g}",
            percent(one.num_nonzero / one.elements if one.elements else math.nan),
            percent(one.to_keep),
            percent(one.kept),
            percent(one.elected),
        ]

    heads = ["expert", "norm of its delta", "root mean square", "changed"]
    heads += ["to be kept", "kept", "in the sum"]
    rows = [row(name, one) for name, one in grid.total.experts.items()]
    conflicts = percent(grid.total.conflicts)
    return (
        table(heads, rows, label="Experts", whole=True)
        + f'<p class="says">“changed” is the share of elements that differ from the base, the rest '
        f"shares of those. Kept contributions had both signs at {conflicts} of all elements.</p>\n"
    )


def recipe(manifest: Mapping[str, Any]) -> str:
    """Return the configuration of a merge as people share it, with short names."""
    locations = [one["location"] for one in manifest["inputs"]]
    names = dict(zip(locations, short_names(locations), strict=True))
    names |= {stage["location"]: stage["name"] for stage in manifest.get("stages", ())}
    documents = [*(stage["config"] for stage in manifest.get("stages", ())), manifest["config"]]
    return "---\n".join(
        yaml.safe_dump(
            config_from_mapping(document).shown(names), sort_keys=False, allow_unicode=True
        )
        for document in documents
    )


def foot(manifest: Mapping[str, Any]) -> str:
    """Return what a page was made by."""
    tool = manifest["tool"]
    return f"Merged by {tool['name']} {tool['version']}; page by della_dist {__version__}."


def percent(share: float) -> str:
    """Return a share of 1 as a person reads it."""
    return f"{100 * share:.1f} %" if math.isfinite(share) else NOTHING


def _called(merge: Merge) -> str:
    return short_names([merge.location])[0]


def _inputs(manifest: Mapping[str, Any]) -> str:
    rows = [
        [
            one["location"],
            str(one.get("role", "")),
            str(len(one["shards"])),
            format_bytes(sum(shard["size_bytes"] for shard in one["shards"])),
        ]
        for one in manifest["inputs"]
    ]
    written = sum(shard["size_bytes"] for shard in manifest["shards"])
    return (
        f"<pre>{escape(recipe(manifest))}</pre>\n"
        + table(["input", "role", "files", "size"], rows, label="Inputs", texts=2, whole=True)
        + f"<p>Output: {plural(len(manifest['shards']), 'file')}, {format_bytes(written)}, seed "
        f"{manifest['seed']}. Model digest (SHA-256, whatever the sharding):<br>"
        f"<code>{escape(manifest['model_digest'])}</code></p>\n"
    )


def _most(tensors: Sequence[tuple[TensorRecord, Experts]]) -> str:
    """Return a table of the tensors whose deltas are largest, by root mean square."""
    found = []
    for record, experts in tensors:
        if record.stats is None or not record.stats.num_elements:
            continue
        for (name, _), stats in zip(experts, record.stats.experts, strict=True):
            size = stats.delta_l2 / math.sqrt(record.stats.num_elements)
            found.append((size, record.name, name, stats.delta_max_abs))
    found.sort(key=lambda one: (-one[0], one[1:3]))
    rows = [
        [tensor, expert, f"{size:.3g}", f"{largest:.3g}"]
        for size, tensor, expert, largest in found[:MOST_TENSORS]
    ]
    heads = ["tensor", "expert", "root mean square", "largest"]
    return table(heads, rows, label="Tensors that change most", texts=2)


def _kinds(tensors: Sequence[tuple[TensorRecord, Experts]]) -> str:
    """Return a table of all kinds of tensors, merged or not."""
    sums: dict[tuple[str, str, str], list[int]] = {}
    for record, _ in tensors:
        kind = sums.setdefault((place(record.name)[0], record.dtype, record.action), [0, 0])
        kind[0] += 1
        kind[1] += record.stop - record.start
    rows = [[*named, f"{count:,}", format_bytes(size)] for named, (count, size) in sums.items()]
    heads = ["kind", "dtype", "what became of it", "tensors", "size"]
    return table(heads, rows, label="Kinds of tensors", texts=3)
