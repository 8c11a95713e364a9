"""How a merge is run, and what it may use."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Literal

from della_dist.errors import ConfigError
from della_dist.locations import is_url
from della_dist.plan.build import MergePlan
from della_dist.plan.memory import DEFAULT_ALLOWED_MEM, MIN_ALLOWED_MEM, MemoryBudget
from della_dist.runtime.backend import Device
from della_dist.runtime.inputs import any_remote
from della_dist.storage.remote import REQUEST_BYTES
from della_dist.storage.upload import UPLOADS_IN_FLIGHT, part_bytes

Engine = Literal["auto", "local", "ray"]

#: Shards merged at once: while one is being committed, the next keeps the processors busy.
DEFAULT_WORKERS = 2
#: Attempts of one Ray actor at once: while one is being committed, the next is being read.
IN_FLIGHT = 2

#: Of a process to one remote store. More gain nothing: its cores are busy by then.
MAX_CONNECTIONS = 64


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How to run a merge. Nothing but `shard_bytes` changes the bytes that are written."""

    engine: Engine = "auto"
    workers: int | None = None
    threads: int | None = None
    memory_bytes: int = DEFAULT_ALLOWED_MEM
    device: Device = "auto"
    shard_bytes: int | None = None
    restart: bool = False
    verify_resumed: bool = False
    """Whether the shards of an earlier run are read whole and compared with their digests."""
    lease: bool = True
    """Whether a remote output is leased; False where its store has no conditional writes, and the
    user sees to it that one run at a time writes there."""
    address: str | None = None
    """Of a Ray cluster: ``auto``, ``local``, ``ray://host:10001`` or ``host:port``."""


def budget(options: RunOptions) -> MemoryBudget:
    """Return the workers, threads and memory of a run.

    Raises
    ------
    ConfigError
        If one of them is out of bounds.
    """
    threads = len(os.sched_getaffinity(0)) if options.threads is None else options.threads
    workers = DEFAULT_WORKERS if options.workers is None else options.workers
    for name, value in (("--threads", threads), ("--workers", workers)):
        if not 1 <= value <= 1024:
            raise ConfigError(f"{name} is {value}; it must be from 1 to 1024.")
    if options.memory_bytes < MIN_ALLOWED_MEM:
        raise ConfigError(
            f"--memory is {options.memory_bytes} bytes; the least is {MIN_ALLOWED_MEM >> 20} MiB."
        )
    return MemoryBudget(options.memory_bytes, workers, threads)


def with_remote(memory: MemoryBudget, plan: MergePlan, out: str | None) -> MemoryBudget:
    """Return the budget with what remote inputs and outputs need set aside.

    Parameters
    ----------
    memory
        Of the run.
    plan
        What is read.
    out
        The output; None if nothing is written.

    Raises
    ------
    ConfigError
        If nothing useful would be left.
    """
    upload_mem = 0
    if out is not None and is_url(out):
        part = part_bytes(max(shard.size_bytes for shard in plan.shards))
        upload_mem = memory.workers * (UPLOADS_IN_FLIGHT + 1) * part
    rest = memory.allowed_mem - upload_mem
    read_ahead_mem = rest // 2 if any_remote(plan) else 0
    if rest - read_ahead_mem < MIN_ALLOWED_MEM:
        least = upload_mem + MIN_ALLOWED_MEM * (2 if any_remote(plan) else 1)
        raise ConfigError(
            f"--memory is {memory.allowed_mem >> 20} MiB; with remote inputs or a remote output "
            f"and {memory.workers} workers the least is {-(-least // (1 << 20))} MiB. Give more, "
            "or fewer --workers."
        )
    return replace(memory, read_ahead_mem=read_ahead_mem, upload_mem=upload_mem)


def connections(memory: MemoryBudget) -> int:
    """Return how many requests a remote store makes at once: as many as the budget can hold."""
    return max(8, min(MAX_CONNECTIONS, memory.read_ahead_mem // REQUEST_BYTES))
