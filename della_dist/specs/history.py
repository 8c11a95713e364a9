"""How an output came about: which worker merged which shard when, in one session or several.

A session is one run of the command. What it knew of itself when it committed a shard goes with the
record of that shard, so that a session that was killed is known by what it left.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Spent:
    """What an attempt at a shard took its worker."""

    bytes_read: int
    """Of tensor data of the inputs."""
    merging_s: float
    """Opening files, reading, and merging."""
    writing_s: float
    """Hashing the shard, and handing it to the store."""
    committing_s: float
    """Until it was durable under its name."""


@dataclass(frozen=True, slots=True)
class Session:
    """One run of the command, as it stood at some moment."""

    began_s: float
    """Unix time."""
    engine: str
    """``local`` or ``ray``."""
    elapsed_s: float
    """From its beginning to that moment."""
    cpu_s: float
    """CPU time of the driver and of all workers."""
    bytes_read: int
    bytes_written: int
    """By all attempts, those included that came to nothing."""
    workers_lost: int
    tasks_retried: int
    stragglers: int
    """Shards that were begun a second time because the first attempt took long."""


@dataclass(frozen=True, slots=True)
class TaskRun:
    """When and by whom a shard was merged."""

    session: Session
    """As it stood when the shard was committed."""
    worker: str
    """``0``; on a cluster also the node, by a number of its own: ``0 on node 1``."""
    attempt: int
    """1, 2, ..."""
    start_s: float
    """When the worker was given the shard, in seconds since the session began."""
    end_s: float
    """When the shard was there."""


@dataclass(frozen=True, slots=True)
class ShardRun:
    """How one shard came about."""

    index: int
    """Of the shard, in the order of the manifest."""
    session: int
    """Index among the sessions."""
    worker: str
    attempt: int
    start_s: float
    end_s: float
    spent: Spent
    bytes_written: int


@dataclass(frozen=True, slots=True)
class History:
    """How a whole output came about.

    Shards of which nothing is known, as of versions that kept no record, are left out.
    """

    model_digest: str
    """Of the output that it is of."""
    sessions: tuple[Session, ...]
    """In order of time; each as it stood at its end, or when it was heard of last."""
    shards: tuple[ShardRun, ...]
    """In order of their index."""
    check: Mapping[str, Any] | None
    """What a sample of the models said before the merge (`della_dist.report.check.recorded`)."""
