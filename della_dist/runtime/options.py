"""How a merge is run, and what it may use."""

from __future__ import annotations

import operator
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from della_dist.config.problem import nearest
from della_dist.errors import ConfigError
from della_dist.locations import is_url
from della_dist.planning.build import MergePlan
from della_dist.planning.memory import DEFAULT_ALLOWED_MEM, MIN_ALLOWED_MEM, MemoryBudget
from della_dist.report.text import parse_size
from della_dist.runtime.task.backend import Device
from della_dist.runtime.task.inputs import any_remote
from della_dist.storage.remote.store import REQUEST_BYTES
from della_dist.storage.remote.upload import UPLOADS_IN_FLIGHT, part_bytes

Engine = Literal["auto", "local", "ray"]

#: Shards merged at once: while one is being committed, the next keeps the processors busy.
DEFAULT_WORKERS = 2
#: Attempts of one Ray actor at once: while one is being committed, the next is being read.
IN_FLIGHT = 2

#: Of a process to one remote store. More gain nothing: its cores are busy by then.
MAX_CONNECTIONS = 64


#: Workers, and threads of one: more are a slip of the hand.
MAX_PARALLEL = 1024


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How to run a merge. Nothing but `shard_bytes` changes the bytes that are written.

    Sizes may be given as text (``256MiB``).

    Raises
    ------
    ConfigError
        If one of them is of the wrong kind, or out of bounds.
    """

    engine: Engine = "auto"
    """Where the merge runs; ``auto``: on Ray where an address is given, else in this process."""
    workers: int | None = None
    """Shards merged at once, 1 to 1024; with ray: actors. None: 2; as many as fit."""
    threads: int | None = None
    """Compute threads, 1 to 1024; with ray: of an actor. None: all cores; at most 8."""
    memory_bytes: int = DEFAULT_ALLOWED_MEM
    """Budget of buffers, at least 32 MiB; with ray: of an actor."""
    device: Device = "auto"
    """Where tensors are merged; ``auto``: on a CUDA device where there is one."""
    shard_bytes: int | None = None
    """Data of an output shard at most, at least 1. None: from the size of the output."""
    restart: bool = False
    """Whether what an earlier run left in the output is discarded."""
    verify_resumed: bool = False
    """Whether the shards of an earlier run are read whole and compared with their digests."""
    lease: bool = True
    """Whether a remote output is leased; False where its store has no conditional writes, and the
    user sees to it that one run at a time writes there."""
    address: str | None = None
    """Of a Ray cluster: ``auto``, ``local``, ``ray://host:10001`` or ``host:port``."""

    def __post_init__(self) -> None:
        _check_choice("engine", self.engine, get_args(Engine))
        _check_choice("device", self.device, get_args(Device))
        for name in ("workers", "threads"):
            count = self._set_whole(name)
            if count is not None and not 1 <= count <= MAX_PARALLEL:
                raise ConfigError(
                    f"{_called(name)} is {count}; it must be from 1 to {MAX_PARALLEL}."
                )
        memory = self._set_whole("memory_bytes", size=True)
        if memory is None or memory < MIN_ALLOWED_MEM:
            raise ConfigError(
                f"{_called('memory_bytes')} is {memory} bytes; the least is "
                f"{MIN_ALLOWED_MEM >> 20} MiB."
            )
        shard = self._set_whole("shard_bytes", size=True)
        if shard is not None and shard < 1:
            raise ConfigError(f"{_called('shard_bytes')} is {shard}; it must be at least one byte.")
        for name in ("restart", "verify_resumed", "lease"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be True or False.")
        if self.address is not None and not (isinstance(self.address, str) and self.address):
            raise ConfigError(
                f"{_called('address')} is {self.address!r}; it must be auto, local, "
                "ray://HOST:10001 or HOST:PORT."
            )

    def _set_whole(self, name: str, *, size: bool = False) -> int | None:
        """Make the field a Python integer, None where that is what it is; return it."""
        value: Any = getattr(self, name)
        if value is None:
            return None
        if size and isinstance(value, str):
            try:
                whole = parse_size(value)
            except ValueError as error:
                raise ConfigError(f"{_called(name)}: {error}.") from None
        elif isinstance(value, bool) or not hasattr(value, "__index__"):
            text = " or text such as '256MiB'" if size else ""
            raise ConfigError(f"{_called(name)} is {value!r}; it must be a whole number{text}.")
        else:
            whole = operator.index(value)
        object.__setattr__(self, name, whole)
        return whole


#: What the command line calls a field where it is not the same word.
_FLAGS = {"memory_bytes": "--memory", "shard_bytes": "--shard-size"}


def _called(name: str) -> str:
    """Return what a field is called: in Python, and on the command line."""
    return f"{name} ({_FLAGS.get(name, f'--{name}')})"


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{_called(name)} is {value!r}; it must be {' or '.join(choices)}.")


def options_from(given: Mapping[str, Any]) -> RunOptions:
    """Return the options that were given by name.

    Raises
    ------
    TypeError
        For a name that no option has, as Python does for its keywords.
    ConfigError
        If one of them is wrong.
    """
    known = [field.name for field in fields(RunOptions)]
    for name in given:
        if name not in known:
            raise TypeError(f"there is no option {name!r}{nearest(name, [*known, 'seed'])}")
    return RunOptions(**given)


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
