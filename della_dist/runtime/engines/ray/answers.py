"""What the actors of a pool have answered: who they are, how far, what came of their tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from della_dist.runtime.engines.events import (
    Attempt,
    Event,
    Failed,
    Finished,
    Heard,
    WorkerLost,
    WorkerReady,
)
from della_dist.runtime.engines.ray.worker import (
    TaskFailure,
    TaskSuccess,
    WorkerFacts,
    WorkerProgress,
)
from della_dist.runtime.task.merge import TaskRecord


@dataclass(frozen=True, slots=True)
class Call:
    """A call of an actor."""

    kind: Literal["facts", "merge", "progress"]
    worker: str
    attempt: Attempt | None = None


@dataclass(frozen=True, slots=True)
class Death:
    """In the place of an answer: the worker, its node or its environment failed."""

    reason: str


@dataclass(frozen=True, slots=True)
class Answers:
    """By worker and by attempt; those of workers that are gone are kept.

    Parameters
    ----------
    labels
        Returns the labels of a node, as ``key=value``.
    """

    labels: Callable[[str], frozenset[str]]
    _facts: dict[str, WorkerFacts] = field(default_factory=dict)
    _progress: dict[str, WorkerProgress] = field(default_factory=dict)
    _records: dict[Attempt, TaskRecord] = field(default_factory=dict)
    _errors: dict[Attempt, Exception] = field(default_factory=dict)

    def take(self, answered: Iterable[tuple[Call, Any]]) -> list[Event]:
        """Keep answers that came together and return what they mean: deaths after all else.

        What a worker did before it died counts.
        """
        events: list[Event] = []
        lost: dict[str, str] = {}
        for call, value in answered:
            if isinstance(value, Death):
                lost.setdefault(call.worker, value.reason)
            else:
                events.append(self._take(call, value))
        return [*events, *(WorkerLost(worker, reason) for worker, reason in lost.items())]

    def _take(self, call: Call, value: Any) -> Event:  # noqa: ANN401
        if call.kind == "facts":
            self._facts[call.worker] = value
            return WorkerReady(call.worker, value.node, self.labels(value.node))
        if call.kind == "progress":
            self._progress[call.worker] = value
            written = {Attempt(*one): size for one, size in value.written_bytes.items()}
            return Heard(call.worker, value.bytes_read + value.bytes_written, written)
        assert call.attempt is not None
        if isinstance(value, TaskFailure):
            self._errors[call.attempt] = value.error
            return Failed(call.worker, call.attempt, str(value.error), value.retryable)
        assert isinstance(value, TaskSuccess)
        self._records[call.attempt] = value.record
        self._progress[call.worker] = value.progress
        return Finished(call.worker, call.attempt)

    def result(self, attempt: Attempt) -> TaskRecord:
        """Return the record of an attempt that finished; it is let go of."""
        return self._records.pop(attempt)

    def error(self, attempt: Attempt) -> Exception:
        """Return what an attempt failed with."""
        return self._errors[attempt]

    def name(self, worker: str) -> str:
        """Return what a person calls a worker."""
        facts = self._facts.get(worker)
        if facts is None:
            return f"worker {worker}"
        gpu = f", GPU {facts.gpu}" if facts.gpu else ""
        return f"worker {worker} ({facts.host}, pid {facts.pid}{gpu})"

    def total_bytes(self) -> tuple[int, int]:
        """Return the bytes read and written by all workers so far."""
        progress = self._progress.values()
        return sum(p.bytes_read for p in progress), sum(p.bytes_written for p in progress)

    def cpu_s(self) -> float:
        """Return the CPU time of all workers so far."""
        return sum(p.cpu_s for p in self._progress.values())

    def peak_rss_bytes(self) -> int:
        """Return the peak resident set of the largest worker so far."""
        return max((p.peak_rss_bytes for p in self._progress.values()), default=0)
