"""What the scheduler is told and what it asks for: plain values, nothing happens here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Task:
    """One shard of the output."""

    index: int
    cost_bytes: int
    """What it takes: bytes read and written, and the work that counts as such."""
    local_bytes: Mapping[str, int] = field(default_factory=dict)
    """Node label ``key=value`` -> bytes of its inputs that lie on nodes so labelled."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try at a task; unique over the run."""

    task: int
    number: int
    """1, 2, ..."""


@dataclass(frozen=True, slots=True)
class Limits:
    """When patience ends."""

    max_failures: int = 5
    """Attempts of one task that may fail or hang."""
    max_losses: int = 20
    """Attempts of one task that may be lost with their worker. Most workers die for reasons of
    their own, as on spot machines; but it may be the task that kills them, by its memory."""
    max_failed_starts: int = 5
    """Workers in a row that were lost before they were ready."""
    start_s: float = 900.0
    """So long a run without a single ready worker waits for one: an autoscaler takes minutes."""
    silence_s: float = 60.0
    """A ready worker that is not heard of for so long is frozen."""
    deadline_base_s: float = 300.0
    slowest_bytes_per_s: float = 2e6
    """An attempt may take `deadline_base_s` and its cost at this rate; then its worker hangs."""
    straggler_factor: float = 2.0
    """An attempt that takes so many times what is usual may be started a second time."""
    straggler_min_s: float = 30.0
    """But no attempt younger than this."""
    straggler_min_finished: int = 3
    """Attempts that must have finished before anything is usual."""
    backoff_s: float = 5.0
    """Delay before the first retry of a failed attempt; doubles with each."""
    max_backoff_s: float = 60.0
    node_pause_s: float = 2.0
    """Delay of a retry where the lost worker's node has others, which may be lost as well."""
    max_step_s: float = 10.0
    """A longer pause between two events is the caller's own (it was stopped, or swapped out), and
    counts as this much: nobody is silent or late because nobody listened."""


@dataclass(frozen=True, slots=True)
class WorkerReady:
    """A worker may be given tasks from now on. Names are never used twice."""

    worker: str
    node: str = ""
    labels: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """A worker died, or could not be started (then it was never ready)."""

    worker: str
    reason: str


@dataclass(frozen=True, slots=True)
class Heard:
    """A sign of life."""

    worker: str
    bytes_done: int
    """Bytes that this worker has read and written so far in all its attempts."""
    written_bytes: Mapping[Attempt, int] = field(default_factory=dict)
    """What each attempt that runs there has written of its shard."""


@dataclass(frozen=True, slots=True)
class Finished:
    """An attempt's shard is committed in the store, and its result is at hand."""

    worker: str
    attempt: Attempt


@dataclass(frozen=True, slots=True)
class Failed:
    """An attempt ended with an error."""

    worker: str
    attempt: Attempt
    error: str
    retryable: bool


@dataclass(frozen=True, slots=True)
class Running:
    """An attempt that runs, as it is seen at one moment."""

    attempt: Attempt
    age_s: float
    written_bytes: int
    is_slow: bool
    """Whether it takes unusually long."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed."""


Event = WorkerReady | WorkerLost | Heard | Finished | Failed | Tick


@dataclass(frozen=True, slots=True)
class Start:
    """Begin an attempt on a worker."""

    worker: str
    attempt: Attempt


@dataclass(frozen=True, slots=True)
class Commit:
    """Record the result of this attempt: exactly once a task."""

    attempt: Attempt


#: Why a worker is stopped of which nothing is wrong.
NOT_NEEDED = "not needed any more"


@dataclass(frozen=True, slots=True)
class Stop:
    """End this worker (silent, overdue, or not needed any more) without waiting for it."""

    worker: str
    reason: str


@dataclass(frozen=True, slots=True)
class AddWorker:
    """Start one more worker, and tell in the end that it is ready or lost."""


@dataclass(frozen=True, slots=True)
class Abort:
    """The run cannot go on. Nothing comes after it."""

    error: str


@dataclass(frozen=True, slots=True)
class Done:
    """Every task is committed. Nothing comes after it."""


Action = Start | Commit | Stop | AddWorker | Abort | Done
