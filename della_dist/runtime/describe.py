"""Describe a merge without running it: every check, bytes, tasks, memory, estimated time."""

from __future__ import annotations

from typing import Any

from della_dist.config import MergeConfig
from della_dist.planning.projection import memory_notes, project
from della_dist.runtime.companions.carried import companions_mem, to_json
from della_dist.runtime.open_plan import open_plan
from della_dist.runtime.options import RunOptions, budget, with_remote
from della_dist.runtime.output.commit import Output
from della_dist.runtime.output.existing import open_output
from della_dist.runtime.task.backend import choose_backend
from della_dist.specs.dtypes import num_elements


def describe_plan(config: MergeConfig, out: str | None, options: RunOptions) -> dict[str, Any]:
    """Return what merging `config` into `out` would take, as a JSON-able mapping.

    Reads headers, small files, some bytes of embeddings and heads, and samples of the weights to
    compare them with those of an output that is there; writes nothing. Byte counts are named
    ``*_bytes`` or ``*_mem``, durations ``*_s``.

    Raises
    ------
    ConfigError, InputError, OutputError
        Whatever a merge would be refused for.
    """
    memory = budget(options)
    plan = open_plan(config, shard_bytes=options.shard_bytes, with_content=out is not None)
    memory = with_remote(memory, plan, out)
    projection = project(
        plan, memory, choose_backend(options.device).scratch_bytes, companions_mem(plan)
    )
    described: dict[str, Any] = {
        "merge_method": config.merge_method,
        "base": None if plan.base is None else plan.base.location,
        "experts": [e.location for e in plan.experts],
        "num_tensors": plan.num_tensors,
        "num_parameters": sum(num_elements(t.shape) for s in plan.shards for t in s.tensors),
        "num_tasks": len(plan.shards),
        "shard_bytes": plan.shard_bytes,
        "bytes_to_read": projection.bytes_to_read,
        "bytes_to_write": projection.bytes_to_write,
        "projected_mem": projection.projected_mem,
        "buffers_mem": projection.buffers_mem,
        "records_mem": projection.records_mem,
        "allowed_mem": projection.allowed_mem,
        "largest_tensor": projection.largest_tensor,
        "workers": memory.workers,
        "threads": memory.threads,
        "estimated_s": projection.estimated_s,
        "files": to_json(plan),
        "notes": [*memory_notes(projection), *plan.notes()],
        "tasks": [
            {"shard": s.name, "num_tensors": len(s.tensors), "size_bytes": s.size_bytes}
            for s in plan.shards
        ],
    }
    if out is not None:
        output = open_output(out, plan, restart=False)
        described["output"] = out
        described["complete"] = not isinstance(output, Output)
        described["tasks_committed"] = len(plan.shards)
        if isinstance(output, Output):
            described["tasks_committed"] = len(output.committed)
            output.check_room()
    return described
