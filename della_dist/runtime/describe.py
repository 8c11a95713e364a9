"""Describe a merge without running it: every check, bytes, tasks, memory, estimated time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from della_dist.config import MergeConfig
from della_dist.planning.balance_notes import form_notes
from della_dist.planning.projection import memory_notes
from della_dist.report.plan import PlannedFile, PlannedTask, PlanSummary
from della_dist.runtime.budget import budget, projected, with_remote
from della_dist.runtime.options import RunOptions, refuse_missing_ray
from della_dist.runtime.output.commit import Output
from della_dist.runtime.stages.chain import Chain, Link
from della_dist.specs.dtypes import num_elements


def describe_plan(
    config: MergeConfig, out: str | None, options: RunOptions = RunOptions()
) -> PlanSummary:
    """Return what merging `config` into `out` would take.

    Reads headers, small files, some bytes of embeddings and heads, and samples of the weights to
    compare them with those of an output that is there; writes nothing.

    Raises
    ------
    ConfigError, InputError, OutputError
        Whatever a merge would be refused for.
    """
    refuse_missing_ray(options)
    config = options.applied_to(config)
    options = replace(options, verify_resumed=False)  # which is work of its own
    chain = Chain(config, out, options)
    stages = tuple(
        replace(_summary(link, options), name=link.name, needs=link.needs) for link in chain.stages
    )
    if not stages:
        return _summary(chain.last, options)
    return replace(_summary(chain.last, options), needs=chain.last.needs, stages=stages)


def _summary(link: Link, options: RunOptions) -> PlanSummary:
    """Return what one merge would take."""
    config, plan, out = link.config, link.plan, link.location
    memory = with_remote(budget(options), plan, out, elsewhere=options.on_ray)
    projection = projected(plan, memory, options)
    summary = PlanSummary(
        merge_method=config.merge_method,
        base=None if plan.base is None else plan.base.location,
        experts=tuple(e.location for e in plan.experts),
        layers=tuple(_layers(plan.config)),
        num_tensors=plan.num_tensors,
        num_parameters=sum(num_elements(t.shape) for s in plan.shards for t in s.tensors),
        num_tasks=len(plan.shards),
        shard_bytes=plan.shard_bytes,
        bytes_to_read=projection.bytes_to_read,
        most_bytes_to_read=projection.most_bytes_to_read,
        bytes_to_write=projection.bytes_to_write,
        projected_mem=projection.projected_mem,
        buffers_mem=projection.buffers_mem,
        records_mem=projection.records_mem,
        allowed_mem=projection.allowed_mem,
        projected_device_mem=projection.device_mem,
        allowed_device_mem=projection.allowed_device_mem,
        largest_tensor=projection.largest_tensor,
        workers=memory.workers,
        threads=memory.threads,
        estimated_s=projection.estimated_s,
        files=tuple(PlannedFile(name, size) for name, size in plan.companion_bytes.items()),
        notes=(*memory_notes(projection), *plan.notes(), *form_notes(plan)),
        tasks=tuple(PlannedTask(s.name, len(s.tensors), s.size_bytes) for s in plan.shards),
    )
    output = link.found
    if out is None or output is None:
        return summary
    if not isinstance(output, Output):
        return replace(summary, output=out, complete=True, tasks_committed=len(plan.shards))
    if not options.restart:  # what is there makes room
        output.check_room()
    return replace(summary, output=out, tasks_committed=len(output.committed))


def _layers(config: MergeConfig) -> Iterator[str]:
    """Yield what each slice is made of."""
    for module in config.modules:
        of_which = "" if module.name is None else f"{module.name} "
        first = 0
        for part in module.slices:
            sources = (f"{a} to {b - 1} of {model}" for model, (a, b), _ in part.sources())
            yield f"{of_which}{first} to {first + part.num_layers - 1}: {', '.join(sources)}"
            first += part.num_layers
