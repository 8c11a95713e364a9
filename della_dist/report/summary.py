"""What a merge and a verification did: as objects, and as lines for people."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from della_dist.report.text import format_bytes, format_mem, format_seconds, format_share
from della_dist.wording import plural


@dataclass(frozen=True, slots=True)
class MergeSummary:
    """What a merge did."""

    output: str
    model_digest: str
    num_tensors: int
    num_merged: int
    """Of `num_tensors`, merged by the method; the others are copied."""
    num_from_base: int
    """Of `num_tensors`, copied from the base (or first model) although an expert has another one
    (integers), or none."""
    num_unstored: int
    """Output heads that an input stores, and the output does not: they are the embedding."""
    num_tasks: int
    tasks_resumed: int
    bytes_read: int
    bytes_written: int
    elapsed_s: float
    peak_rss_bytes: int
    """Of the largest process: the driver or a worker."""
    workers_lost: int = 0
    tasks_retried: int = 0
    stragglers: int = 0
    """Tasks that were started a second time because the first attempt took long."""
    already_complete: bool = False
    """Whether nothing was done: this very merge was there, and nothing of it was missing."""
    num_factors: int = 0
    """Of `num_tensors`, factors of merged deltas, two of each: where the output is an adapter."""
    energy: float | None = None
    """Of such an output made now, the share of the deltas' squared norm that all factors keep."""
    notes: tuple[str, ...] = ()
    """What a person should know of it, as ``plan`` says; none where nothing was left to do."""
    name: str = ""
    """Of a stage."""
    stages: tuple[MergeSummary, ...] = ()
    """Of the stages that were made, or were there, before the output itself; bytes, seconds and
    memory are those of all together then."""
    stages_in: str | None = None
    """The folder that their outputs are kept in; None: they are removed."""

    def to_dict(self) -> dict[str, Any]:
        """Return what ``della-dist merge --json`` prints; of stages and factors where there are."""
        content = {f.name: getattr(self, f.name) for f in fields(self)}
        content["stages"] = [stage.to_dict() for stage in self.stages]
        unused = [] if self.name else ["name"]
        if not self.stages:
            unused += ["stages", "stages_in"]
        if not self.num_factors:
            unused += ["num_factors", "energy"]
        return {key: value for key, value in content.items() if key not in unused}


@dataclass(frozen=True, slots=True)
class VerifySummary:
    """What was found to be as written."""

    output: str
    model_digest: str
    num_files: int
    num_tensors: int
    bytes_read: int
    recomputed: tuple[str, ...]
    """Names of the tensors that were recomputed from the inputs."""
    edited: tuple[str, ...]
    """Files that are there to be edited, and were: the model card."""
    elapsed_s: float


def merge_lines(summary: MergeSummary) -> list[str]:
    """Return the lines that ``della-dist merge`` prints in the end."""
    digest = f"digest  {summary.model_digest}"
    stages = [f"stage   {stage.name}: {_done(stage)}" for stage in summary.stages]
    if stages:
        kept = "removed" if summary.stages_in is None else f"kept in {summary.stages_in}"
        stages.append(f"stages  {kept}")
    if summary.already_complete:
        return [*stages, f"{summary.output} is complete already; nothing was done.", digest]
    return [
        *stages,
        _done(summary),
        f"output  {summary.output}",
        *_kept(summary),
        f"took    {format_seconds(summary.elapsed_s)}, read {format_bytes(summary.bytes_read)}, "
        f"wrote {format_bytes(summary.bytes_written)}, peak memory "
        f"{format_mem(summary.peak_rss_bytes)}",
        digest,
    ]


def _kept(summary: MergeSummary) -> list[str]:
    if summary.energy is None:
        return []
    return [f"keeps   {format_share(summary.energy)} of the deltas' squared norm"]


def _done(summary: MergeSummary) -> str:
    """Return what was made."""
    if summary.already_complete:
        return "was complete already"
    resumed = summary.tasks_resumed
    kept = f", {resumed} of them kept from an earlier run" if resumed else ""
    return f"merged {_tensor_counts(summary)} into {plural(summary.num_tasks, 'shard')}{kept}"


def _tensor_counts(summary: MergeSummary) -> str:
    """Return how many tensors of the model are in the output, and how they came there."""
    count, merged, unstored = summary.num_tensors, summary.num_merged, summary.num_unstored
    parts = [f"{merged} merged"]
    if summary.num_factors:
        parts.append(f"{summary.num_factors} factors")
    if copied := count - merged - summary.num_factors:
        parts.append(f"{copied} copied")
    if summary.num_from_base:
        parts.append(f"{summary.num_from_base} of them not equal or missing in some expert")
    if unstored:
        parts.append(f"{unstored} tied and unstored")
    return f"{count} of {count + unstored} tensors ({', '.join(parts)})"


def verify_lines(summary: VerifySummary) -> list[str]:
    """Return the lines that ``della-dist verify`` prints."""
    lines = [
        f"{summary.output}: {summary.num_files} files, {summary.num_tensors} tensors, "
        f"{format_bytes(summary.bytes_read)} are as written ({format_seconds(summary.elapsed_s)})",
        *(f"{name} was edited since; it is no part of what is verified" for name in summary.edited),
    ]
    if summary.recomputed:
        lines.append(f"recomputed {len(summary.recomputed)} tensors from the inputs: equal")
    return [*lines, f"digest  {summary.model_digest}"]
