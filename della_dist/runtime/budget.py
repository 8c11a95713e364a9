"""What a run may use: memory, workers, threads, requests at once."""

from __future__ import annotations

import os
from dataclasses import replace

from della_dist.errors import ConfigError
from della_dist.locations import HUB_PREFIX, is_url
from della_dist.planning.build import MergePlan
from della_dist.planning.memory import MIN_ALLOWED_MEM, MemoryBudget
from della_dist.planning.projection import Projection, project
from della_dist.runtime.companions.carried import companions_mem
from della_dist.runtime.options import RunOptions
from della_dist.runtime.task.backend import choose_backend, with_backend
from della_dist.runtime.task.inputs import any_read_remotely, any_remote
from della_dist.storage.remote.files import REQUEST_BYTES
from della_dist.storage.remote.upload import UPLOADS_IN_FLIGHT, part_bytes

#: Shards merged at once: while one is being committed, the next keeps the processors busy.
DEFAULT_WORKERS = 2
#: Attempts of one Ray actor at once: while one is being committed, the next is being read.
IN_FLIGHT = 2

#: Of a process to one remote store. More gain nothing: its cores are busy by then.
MAX_CONNECTIONS = 64


def available_cores() -> int:
    """Return the processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def budget(options: RunOptions) -> MemoryBudget:
    """Return the workers, threads and memory of a run."""
    return MemoryBudget(
        options.memory_bytes,
        options.workers or DEFAULT_WORKERS,
        options.threads or available_cores(),
    )


def with_remote(
    memory: MemoryBudget, plan: MergePlan, out: str | None, *, elsewhere: bool = False
) -> MemoryBudget:
    """Return the budget with what remote inputs and outputs need set aside.

    Parameters
    ----------
    memory
        Of the run.
    plan
        What is read.
    out
        The output; None if nothing is written.
    elsewhere
        Whether other machines read, whose caches are not known.

    Raises
    ------
    ConfigError
        If nothing useful would be left.
    """
    upload_mem = 0
    # What goes to the Hub is written to a folder here, and sent from there as a stream.
    if out is not None and is_url(out) and not out.startswith(HUB_PREFIX):
        part = part_bytes(max(shard.size_bytes for shard in plan.shards))
        upload_mem = memory.workers * (UPLOADS_IN_FLIGHT + 1) * part
    rest = memory.allowed_mem - upload_mem
    remote = any_remote(plan) if elsewhere else any_read_remotely(plan)
    read_ahead_mem = rest // 2 if remote else 0
    if rest - read_ahead_mem < MIN_ALLOWED_MEM:
        least = upload_mem + MIN_ALLOWED_MEM * (2 if remote else 1)
        raise ConfigError(
            f"--memory is {memory.allowed_mem >> 20} MiB; with remote inputs or a remote output "
            f"and {memory.workers} workers the least is {-(-least // (1 << 20))} MiB. Give more, "
            "or fewer --workers."
        )
    return replace(memory, read_ahead_mem=read_ahead_mem, upload_mem=upload_mem)


def projected(plan: MergePlan, memory: MemoryBudget, options: RunOptions) -> Projection:
    """Return what a run of `plan` takes, the files beside the weights included.

    Of a cluster it is what this machine, if it has a GPU, would take in a worker's place.

    Raises
    ------
    ConfigError
        If something does not fit, or there is no such device here.
    """
    try:
        backend = choose_backend(options.device, memory, options.gpu_memory)
    except ConfigError:
        if not options.on_ray:
            raise
        backend = choose_backend("cpu", memory)
    needs = backend.scratch_bytes, companions_mem(plan), backend.device_bytes
    return project(plan, with_backend(memory, backend), *needs)


def connections(memory: MemoryBudget) -> int:
    """Return how many requests a remote store makes at once: as many as the budget can hold."""
    return max(8, min(MAX_CONNECTIONS, memory.read_ahead_mem // REQUEST_BYTES))
