"""What a run has to do, and how far it is: what whoever watches it is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

#: Of a shard of which less is written nobody can say how long the rest takes.
_KNOWN_SHARE = 0.05


@dataclass(frozen=True, slots=True)
class ShardUnderWay:
    """An attempt at a shard, at one moment."""

    index: int
    """Of the shard, from 0 on."""
    name: str
    """Of its file."""
    attempt: int
    """1, 2, ..."""
    age_s: float
    share: float
    """Of its bytes that are written."""
    is_slow: bool
    """Whether it takes unusually long."""

    @property
    def left_s(self) -> float:
        """What it takes from now on, if it goes on as until now; 0 where that is not known."""
        if self.share < _KNOWN_SHARE:
            return 0.0
        return self.age_s * (1 - self.share) / self.share


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """A worker that is ready, at one moment."""

    name: str
    """What a person calls it: number, host, process."""
    bytes_per_s: float
    """Read and written, over about the last 10 s."""
    shards: tuple[ShardUnderWay, ...] = ()
    """The oldest first."""

    @property
    def is_slow(self) -> bool:
        """Whether something takes unusually long there."""
        return any(shard.is_slow for shard in self.shards)


@dataclass(frozen=True, slots=True)
class WorkerCounts:
    """The workers of a run at one moment, and what is done of its work."""

    workers: tuple[WorkerStatus, ...] = ()
    """Those that are ready."""
    workers_lost: int = 0
    tasks_retried: int = 0
    stragglers: int = 0
    """Tasks that were started a second time because the first attempt took long."""
    merged_bytes: int = 0
    """Of the output, in this run: shards that are committed and parts of others, each once."""
    work_done_bytes: int = 0
    """Of `work_bytes`, likewise."""
    work_bytes: int = 0
    """What this run has to read and to write, and the work that counts as such."""

    @property
    def bytes_per_s(self) -> tuple[float, ...]:
        """What every worker reads and writes."""
        return tuple(worker.bytes_per_s for worker in self.workers)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A run at one moment."""

    phase: str
    """``starting``, ``loading kernels``, ``merging``, and last ``finishing``, or ``stopping``."""
    tasks_done: int
    bytes_read: int
    bytes_written: int
    workers: WorkerCounts | None = None
    """None until the first have begun."""


@dataclass(frozen=True, slots=True)
class Goal:
    """What the run has to do, beginning with what an earlier one left done."""

    num_tasks: int
    tasks_resumed: int
    bytes_to_write: int
    """Still to be written by this run."""
    bytes_resumed: int = 0
    """Written by earlier ones."""
    notes: tuple[str, ...] = ()
    """What a person should know before it starts."""
    stage: str = ""
    """Which merge of several this is."""

    @property
    def total_bytes(self) -> int:
        """All that the output will have; at least 1, to be divided by."""
        return max(1, self.bytes_resumed + self.bytes_to_write)

    def done_bytes(self, now: Snapshot) -> int:
        """Return how much of that is written; a task that is repeated counts once."""
        merged_bytes = now.bytes_written if now.workers is None else now.workers.merged_bytes
        return min(self.total_bytes, self.bytes_resumed + merged_bytes)


#: Called once before the work starts, with what there is to do and a look at what is done.
Watch: TypeAlias = Callable[[Goal, Callable[[], Snapshot]], None]
