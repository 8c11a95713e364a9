"""What a run tells Prometheus, through the agents of Ray's nodes.

The driver tells it: it knows of all workers, and of those that are lost. It has to be a process of
the cluster; through Ray Client (``ray://``) nothing is exported.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Literal, TypeAlias

from ray.util.metrics import Counter, Gauge, Histogram

from della_dist.locations import masked
from della_dist.report import run_log
from della_dist.report.run_events import (
    RunEvent,
    ShardCommitted,
    ShardFailed,
    ShardStarted,
    WorkerWasLost,
)

#: Seconds of a shard.
BUCKETS_S = [0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000, 10000]

Phase: TypeAlias = Literal["starting", "merging", "waiting"]
PHASES: tuple[Phase, ...] = ("starting", "merging", "waiting")


class RunMetrics:
    """The metrics of one run.

    Parameters
    ----------
    output
        Of the run: the label ``output`` of every metric.
    """

    def __init__(self, output: str) -> None:
        self._own = {"output": masked(output)}
        self._read = self._counter("read_bytes", "Tensor data read, by all workers")
        self._written = self._counter("written_bytes", "Tensor data written, by all workers")
        self._shards = self._counter("shards", "Shards committed")
        self._tensors = self._counter("tensors", "Tensors in committed shards")
        self._retries = self._counter("retries", "Attempts after one that came to nothing")
        self._stragglers = self._counter("stragglers", "Attempts beside one that takes long")
        self._failures = self._counter("failures", "Attempts that failed")
        self._lost = self._counter("workers_lost", "Workers that died, froze or hung")
        self._phases = self._counter("worker_seconds", "Seconds of all workers by phase", "phase")
        self._shard_seconds = Histogram(
            "della_dist_shard_seconds",
            "Seconds from the start of an attempt to its commit",
            boundaries=BUCKETS_S,
            tag_keys=("output",),
        )
        self._workers = Gauge(
            "della_dist_workers", "Workers by phase", tag_keys=("output", "phase")
        )
        self._moved = (0, 0)
        self._closing = contextlib.ExitStack()

    @staticmethod
    def _counter(name: str, said: str, *labels: str) -> Counter:
        return Counter(f"della_dist_{name}", said, tag_keys=("output", *labels))

    def _add(self, counter: Counter, count: float, **labels: str) -> None:
        if count > 0:
            counter.inc(count, {**self._own, **labels})

    def take(self, event: RunEvent) -> None:
        """Count an event."""
        match event:
            case ShardCommitted():
                self._add(self._shards, 1)
                self._add(self._tensors, event.num_tensors)
                self._shard_seconds.observe(event.elapsed_s, self._own)
            case ShardStarted(why="retry"):
                self._add(self._retries, 1)
            case ShardStarted(why="straggler"):
                self._add(self._stragglers, 1)
            case ShardFailed():
                self._add(self._failures, 1)
            case WorkerWasLost():
                self._add(self._lost, 1)

    def moved(self, bytes_read: int, bytes_written: int) -> None:
        """State the bytes of the run so far."""
        before, self._moved = self._moved, (bytes_read, bytes_written)
        self._add(self._read, bytes_read - before[0])
        self._add(self._written, bytes_written - before[1])

    def workers(self, counts: Mapping[Phase, int], elapsed_s: float) -> None:
        """State how many workers are in each phase, and have been for some time."""
        for phase in PHASES:
            count = counts.get(phase, 0)
            self._workers.set(count, {**self._own, "phase": phase})
            self._add(self._phases, count * elapsed_s, phase=phase)

    def open(self) -> None:
        """Listen to the events of the run."""
        self._closing.enter_context(run_log.told_to(self.take))

    def close(self) -> None:
        """Listen no more; no worker is left."""
        self._closing.close()
        self.workers({}, 0.0)
