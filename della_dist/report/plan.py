"""What a merge would do and take: as an object, and as lines for people."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from della_dist.config.methods import METHODS
from della_dist.report.text import format_bytes, format_mem, format_seconds, note_lines
from della_dist.wording import plural


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """A file beside the weights that the output takes over."""

    name: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class PlannedTask:
    """An output shard."""

    shard: str
    num_tensors: int
    size_bytes: int
    """Of the data of its tensors."""


@dataclass(frozen=True, slots=True)
class PlanTotal:
    """What several merges of one run would take together; see `PlanSummary`."""

    bytes_to_read: int
    most_bytes_to_read: int
    bytes_to_write: int
    """Room for all of it is needed: no stage is removed before the last merge ends."""
    projected_mem: int
    """The buffers of the one that needs most; and what is recorded of the tensors of all, whose
    plans are made at once."""
    estimated_s: float


@dataclass(frozen=True, slots=True)
class PlanSummary:
    """What a merge would do and take."""

    merge_method: str
    base: str | None
    """Location of the base, or of the model whose form and files the output has where the method
    has none; None if that is the first expert."""
    experts: tuple[str, ...]
    """Their locations."""
    layers: tuple[str, ...]
    """What the layers of an output of slices are made of, a line each; empty: of whole models."""
    num_tensors: int
    num_parameters: int
    num_tasks: int
    shard_bytes: int
    """Data of an output shard at most."""
    bytes_to_read: int
    """At least, repeated passes included."""
    most_bytes_to_read: int
    """As many, or more where values decide how often a tensor is read: in methods that trim by
    magnitude."""
    bytes_to_write: int
    projected_mem: int
    """Bytes at the peak, beyond the interpreter and its libraries: the next two together."""
    buffers_mem: int
    records_mem: int
    allowed_mem: int
    """For the buffers."""
    projected_device_mem: int
    """Bytes of device memory at the peak, of each process that has a GPU; 0 where none is used."""
    allowed_device_mem: int
    largest_tensor: str
    """The tensor that needs the largest buffers; empty if the files beside the weights do."""
    workers: int
    threads: int
    estimated_s: float
    files: tuple[PlannedFile, ...]
    notes: tuple[str, ...]
    """What a person should know of it."""
    tasks: tuple[PlannedTask, ...]
    output: str | None = None
    """Where it would be written, if that was given; then what follows is known, too."""
    complete: bool = False
    """Whether this very merge is there already."""
    tasks_committed: int = 0
    """Tasks of an earlier run that are kept."""
    name: str = ""
    """Of a stage."""
    needs: tuple[str, ...] = ()
    """Names of the stages that are among the inputs."""
    stages: tuple[PlanSummary, ...] = ()
    """What is merged before, in order."""

    def total(self) -> PlanTotal:
        """Return what this and the stages take together."""
        merges = (*self.stages, self)
        return PlanTotal(
            bytes_to_read=sum(merge.bytes_to_read for merge in merges),
            most_bytes_to_read=sum(merge.most_bytes_to_read for merge in merges),
            bytes_to_write=sum(merge.bytes_to_write for merge in merges),
            projected_mem=max(merge.buffers_mem for merge in merges)
            + sum(merge.records_mem for merge in merges),
            estimated_s=sum(merge.estimated_s for merge in merges),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return what ``della-dist plan --json`` prints.

        Without an output, nothing of it; of stages, only where there are some.
        """
        content = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        content["files"] = [dataclasses.asdict(file) for file in self.files]
        content["tasks"] = [dataclasses.asdict(task) for task in self.tasks]
        content["stages"] = [stage.to_dict() for stage in self.stages]
        unused = ["output", "complete", "tasks_committed"] if self.output is None else []
        if not self.name:
            unused.append("name")
        if not self.stages:
            unused += ["stages"] if self.name else ["stages", "needs"]
        else:
            content["total"] = dataclasses.asdict(self.total())
        return {key: value for key, value in content.items() if key not in unused}


def plan_lines(plan: PlanSummary, width: int | None = None) -> list[str]:
    """Return the lines that ``della-dist plan`` prints.

    Parameters
    ----------
    width
        See `note_lines`.
    """
    lines = []
    merges = (*plan.stages, plan)
    for number, merge in enumerate(merges, 1):
        if plan.stages:
            needs = f", of {', '.join(merge.needs)}" if merge.needs else ""
            name = merge.name or "the output"
            lines.append(f"stage   {number} of {len(merges)}: {name}{needs}")
        lines += _merge_lines(merge, width)
    if plan.stages:
        total = plan.total()
        lines.append(
            f"total   reads {_upto(total.bytes_to_read, total.most_bytes_to_read)}, writes "
            f"{format_bytes(total.bytes_to_write)}, all of it there at the end; "
            f"{format_mem(total.projected_mem)} of memory; about "
            f"{format_seconds(total.estimated_s)}"
        )
    lines.append("checks  passed; nothing was written")
    return lines


def _device_lines(plan: PlanSummary) -> list[str]:
    if not plan.allowed_device_mem:
        return []
    return [
        f"gpu     {format_mem(plan.projected_device_mem)} of projected device memory, "
        f"{format_mem(plan.allowed_device_mem)} allowed"
    ]


def _upto(least: int, most: int) -> str:
    upto = f" to {format_bytes(most)}, as the values are" if most > least else ""
    return format_bytes(least) + upto


def _merge_lines(plan: PlanSummary, width: int | None) -> list[str]:
    """Return the lines of one merge."""
    experts = plan.experts
    verb = "into" if METHODS[plan.merge_method].given(plan.base).has_base else "in the form of"
    into = f" {verb} {plan.base}" if plan.base is not None else ""
    lines = [
        f"merge   {plan.merge_method}: {plural(len(experts), 'expert')}{into}",
        *(f"        {location}" for location in experts),
        *(f"{'layers' if not i else '':8}{line}" for i, line in enumerate(plan.layers)),
        f"output  {plan.num_parameters:,} parameters in {plan.num_tensors:,} tensors, "
        f"{format_bytes(plan.bytes_to_write)}",
        f"tasks   {plural(plan.num_tasks, 'shard')} of at most {format_bytes(plan.shard_bytes)}",
        f"files   {len(plan.files)} beside the weights, "
        f"{format_bytes(sum(file.size_bytes for file in plan.files))}",
        f"reads   {_upto(plan.bytes_to_read, plan.most_bytes_to_read)}",
        f"memory  {format_mem(plan.buffers_mem)} of buffers, "
        f"{format_mem(plan.allowed_mem)} allowed "
        f"({plan.workers} workers, {plan.threads} threads), and "
        f"{format_mem(plan.records_mem)} of records",
        *_device_lines(plan),
        f"time    about {format_seconds(plan.estimated_s)}",
    ]
    lines += note_lines(plan.notes, width)
    if plan.complete:
        lines.append(f"state   {plan.output} is complete; merge would do nothing")
    elif plan.tasks_committed:
        lines.append(
            f"state   {plan.output} has {plan.tasks_committed} of {plan.num_tasks} "
            "shards; merge continues it"
        )
    return lines
