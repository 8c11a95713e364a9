"""What happens in a run, for its log: each event as a line for people, and as data for programs.

The keys of ``--log-json`` are the fields here, and stay: new ones may come. Bytes are numbers of
bytes, and what ends in ``_s`` is in seconds. A worker is what a person calls it: ``worker 3 (host,
pid 4711)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from della_dist.report.text import format_bytes, format_seconds
from della_dist.wording import plural


@dataclass(frozen=True, slots=True)
class RunEvent:
    """Something that happened."""

    kind: ClassVar[str]
    """What lines of JSON call it."""

    def facts(self) -> dict[str, Any]:
        """Return what lines of JSON say of it."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True, slots=True)
class RunStarted(RunEvent):
    """A merge was asked for."""

    kind = "start"
    output: str
    merge_method: str
    num_merges: int
    """The output's own, and the stages before it."""
    engine: Literal["local", "ray"]
    seed: int
    version: str
    """Of della_dist."""
    host: str
    pid: int
    """Of the driver."""

    def __str__(self) -> str:
        """Return the line."""
        where = "on Ray" if self.engine == "ray" else "on this machine"
        return f"merging into {self.output} by {self.merge_method} {where}"


@dataclass(frozen=True, slots=True)
class ModelsChecked(RunEvent):
    """A sample of the weights was looked at."""

    kind = "check"
    stage: str
    """Which merge of several; empty where there is one."""
    models: tuple[Mapping[str, Any], ...]
    """As ``della-dist check --json`` has them."""
    bytes_read: int
    elapsed_s: float

    def __str__(self) -> str:
        """Return the line."""
        return (
            f"checked {format_bytes(self.bytes_read)} of the weights of "
            f"{plural(len(self.models), 'model')} in {format_seconds(self.elapsed_s)}"
        )


@dataclass(frozen=True, slots=True)
class Planned(RunEvent):
    """What a merge has to do is known; what follows until the next of these is of this merge."""

    kind = "plan"
    stage: str
    output: str
    num_tensors: int
    num_tasks: int
    """Shards of the output."""
    tasks_resumed: int
    """Of these, kept from an earlier run."""
    bytes_to_read: int
    bytes_to_write: int
    """Both without what is kept."""
    notes: tuple[str, ...]

    def __str__(self) -> str:
        """Return the line."""
        return (
            f"planned {self.output}: {plural(self.num_tensors, 'tensor')} in "
            f"{plural(self.num_tasks, 'shard')}, {format_bytes(self.bytes_to_read)} to read, "
            f"{format_bytes(self.bytes_to_write)} to write"
        )


@dataclass(frozen=True, slots=True)
class WorkerIsReady(RunEvent):
    """A worker may be given shards."""

    kind = "worker_ready"
    worker: str

    def __str__(self) -> str:
        """Return the line."""
        return f"{self.worker} is ready"


@dataclass(frozen=True, slots=True)
class WorkerWasLost(RunEvent):
    """A worker died, or could not be started."""

    kind = "worker_lost"
    worker: str
    reason: str

    def __str__(self) -> str:
        """Return the line."""
        return f"{self.worker} was lost: {self.reason}"


@dataclass(frozen=True, slots=True)
class WorkerIsStopped(RunEvent):
    """A worker is ended: it is silent or overdue, or not needed any more."""

    kind = "worker_stopped"
    worker: str
    reason: str

    def __str__(self) -> str:
        """Return the line."""
        return f"{self.worker} is stopped: {self.reason}"


@dataclass(frozen=True, slots=True)
class ShardStarted(RunEvent):
    """A worker begins a shard."""

    kind = "shard_started"
    shard: str
    attempt: int
    """1, 2, ..."""
    worker: str
    why: Literal["first", "retry", "straggler"]
    """``straggler``: another worker has it, and takes unusually long."""

    def __str__(self) -> str:
        """Return the line."""
        slow = ", beside one that takes long" if self.why == "straggler" else ""
        return f"{self.shard}, attempt {self.attempt}, on {self.worker}{slow}"


@dataclass(frozen=True, slots=True)
class ShardFailed(RunEvent):
    """An attempt came to nothing."""

    kind = "shard_failed"
    shard: str
    attempt: int
    worker: str
    error: str
    is_retried: bool
    """Whether it may be tried again; else the run ends."""

    def __str__(self) -> str:
        """Return the line."""
        return f"{self.shard}, attempt {self.attempt}, on {self.worker} failed: {self.error}"


@dataclass(frozen=True, slots=True)
class ShardCommitted(RunEvent):
    """A shard is durable, and recorded."""

    kind = "shard_committed"
    shard: str
    attempt: int
    worker: str
    size_bytes: int
    """Of the file."""
    num_tensors: int
    elapsed_s: float
    """Since the attempt was started."""
    tasks_done: int
    """Shards that are committed by now, those of earlier runs included."""
    num_tasks: int

    def __str__(self) -> str:
        """Return the line."""
        return (
            f"{self.shard} is committed by {self.worker}: {format_bytes(self.size_bytes)} in "
            f"{format_seconds(self.elapsed_s)}, {self.tasks_done} of {self.num_tasks}"
        )


@dataclass(frozen=True, slots=True)
class Progressed(RunEvent):
    """How far a merge is, now and then."""

    kind = "progress"
    tasks_done: int
    """As above."""
    num_tasks: int
    bytes_read: int
    bytes_written: int
    """By all workers in this run, in vain as well."""
    num_workers: int
    """That are ready."""
    workers_lost: int
    tasks_retried: int
    stragglers: int

    def __str__(self) -> str:
        """Return the line."""
        return f"{self.tasks_done} of {plural(self.num_tasks, 'shard')}"


@dataclass(frozen=True, slots=True)
class TrialEnded(RunEvent):
    """A trial of a search ended."""

    kind = "trial"
    number: int
    num_trials: int
    values: Mapping[str, Any]
    """What was tried."""
    score: float | None
    """None: it has none."""
    reason: str | None
    """Why it has none."""
    elapsed_s: float

    def __str__(self) -> str:
        """Return the line."""
        tried = ", ".join(f"{name}: {value}" for name, value in self.values.items())
        return f"trial {self.number} had {tried}"


@dataclass(frozen=True, slots=True)
class MergeEnded(RunEvent):
    """A stage is complete, or all of the run."""

    kind = "end"
    stage: str
    """Empty where it is all of the run: then it is the last event."""
    summary: Mapping[str, Any]
    """As ``della-dist merge --json`` prints it."""

    def facts(self) -> dict[str, Any]:
        """Return the summary, beside the name of the stage."""
        return {"stage": self.stage, **self.summary}

    def __str__(self) -> str:
        """Return the line."""
        return f"{self.summary['output']} is complete, digest {self.summary['model_digest']}"


@dataclass(frozen=True, slots=True)
class RunFailed(RunEvent):
    """The run ends with an error; the last event."""

    kind = "failed"
    error: str
    """Its class."""
    message: str
    exit_status: int
    """Of the command line."""

    def __str__(self) -> str:
        """Return the line."""
        return f"the run fails: {self.error}"
