"""The driver's loop: tells the scheduling state what happens, and does what it says."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from della_dist.errors import ConfigError, DellaDistError, RunError
from della_dist.locations import masked
from della_dist.planning.build import MergePlan
from della_dist.planning.locality import file_labels, local_bytes
from della_dist.planning.projection import task_cost
from della_dist.report.progress import WorkerCounts
from della_dist.runtime.engines.events import (
    Abort,
    AddWorker,
    Attempt,
    Commit,
    Done,
    Event,
    Failed,
    Limits,
    Start,
    Stop,
    Task,
    Tick,
    WorkerLost,
    WorkerReady,
)
from della_dist.runtime.engines.scheduler import Scheduler
from della_dist.runtime.output.commit import Output
from della_dist.runtime.task.merge import TaskRecord
from della_dist.runtime.task.meter import Meter
from della_dist.specs.history import TaskRun

log = logging.getLogger("della_dist.run")

#: The scheduler hears of the time at least so often.
TICK_S = 0.5


class Pool(Protocol):
    """The workers of an engine."""

    engine: str
    """What people call it."""
    in_flight: int
    """Attempts that one worker runs at once."""
    num_starting: int
    """Workers that `open` starts."""
    limits: Limits

    def open(self) -> None:
        """Start the workers."""

    def add_worker(self) -> None:
        """Start one more."""

    def start(self, worker: str, attempt: Attempt) -> None:
        """Begin an attempt; returns at once."""

    def stop(self, worker: str) -> None:
        """End a worker without waiting for it."""

    def poll(self, timeout_s: float) -> Sequence[Event]:
        """Wait for something to happen, not longer than `timeout_s`; return what did."""

    def result(self, attempt: Attempt) -> TaskRecord:
        """Return the record of an attempt that finished."""

    def error(self, attempt: Attempt) -> BaseException:
        """Return what an attempt failed with."""

    def name(self, worker: str) -> str:
        """Return what a person calls a worker: number, host, process."""

    @property
    def peak_rss_bytes(self) -> int:
        """Peak resident set of the largest worker so far."""

    @property
    def cpu_s(self) -> float:
        """CPU time so far, of this process and of all workers."""

    def __enter__(self) -> Pool:
        """Return this pool."""

    def __exit__(self, kind: object, exc: object, trace: object) -> None:
        """End all workers."""


def drive(plan: MergePlan, output: Output, pool: Pool, meter: Meter) -> None:
    """Merge and commit every task that `output` still lacks, on the workers of `pool`.

    Raises
    ------
    DellaDistError
        The error that ended the run; what was committed by then stays committed.
    """
    run = _Run(plan, output, pool, meter)
    pool.open()
    meter.enter("merging")
    events: Sequence[Event] = ()
    try:
        while not run.take_in(events):
            events = pool.poll(TICK_S)
    except Exception as error:
        _keep_history(run.scheduler, output, error)
        raise


def _keep_history(scheduler: Scheduler, output: Output, error: Exception) -> None:
    """Leave what happened in the output's records, where the next run does not need it."""
    lines = [f"{now_s:.3f} {event} -> {list(then)}" for now_s, event, then in scheduler.history]
    for line in lines:
        log.debug("%s", masked(line))
    if isinstance(error, DellaDistError) and error.exit_code == ConfigError.exit_code:
        return  # a refusal leaves nothing behind
    where = output.keep_events("\n".join([*lines, f"{type(error).__name__}: {error}", ""]))
    if where is not None:
        log.info("what happened until then is in %s", where)


class _Run:
    def __init__(self, plan: MergePlan, output: Output, pool: Pool, meter: Meter) -> None:
        self._plan = plan
        self._output = output
        self._pool = pool
        self._meter = meter
        self._held_up_s = 0.0
        #: Who has which attempt, and since when.
        self._begun: dict[Attempt, tuple[str, float]] = {}
        self._nodes: dict[str, int] = {}
        self._node_of: dict[str, int] = {}
        labels = file_labels(plan, plan.config.node_labels)
        self.scheduler = Scheduler(
            [
                Task(i, task_cost(plan, shard), local_bytes(plan, shard, labels) if labels else {})
                for i, shard in enumerate(plan.shards)
                if i not in output.committed
            ],
            in_flight=pool.in_flight,
            limits=pool.limits,
            num_starting=pool.num_starting,
        )

    def take_in(self, events: Sequence[Event]) -> bool:
        """Handle events and do what they lead to; return whether the run is done."""
        for event in (*events, Tick()):
            failure = self._note(event)
            for action in self.scheduler.handle(event, time.monotonic() - self._held_up_s):
                match action:
                    case Done():
                        self._count()
                        return True
                    case Abort(error):
                        raise failure or RunError(
                            f"the merge failed: {error.rstrip('.')}. "
                            "Run the same command again: it continues."
                        )
                    case Start(worker, attempt):
                        self._begin(worker, attempt)
                    case Commit(attempt):
                        self._commit(attempt)
                    case Stop(worker, reason):
                        log.info("%s is stopped: %s", self._pool.name(worker), reason)
                        self._pool.stop(worker)
                    case AddWorker():
                        self._pool.add_worker()
        self._count()
        return False

    def _commit(self, attempt: Attempt) -> None:
        began_s = time.monotonic()
        worker, start_s = self._begun.pop(attempt)
        run = TaskRun(
            session=self._meter.session(self._pool.engine, self._pool.cpu_s),
            worker=self._called(worker),
            attempt=attempt.number,
            start_s=start_s,
            end_s=self._meter.elapsed_s,
        )
        self._output.commit(replace(self._pool.result(attempt), run=run))
        self._meter.finished_task()
        # The clock of the scheduler stands still meanwhile: a store may hold the run up, and what
        # the workers say is not heard then. None of them is late for that.
        self._held_up_s += time.monotonic() - began_s

    def _count(self) -> None:
        scheduler = self.scheduler
        self._meter.set_workers(
            WorkerCounts(
                tuple(scheduler.bytes_per_s().values()),
                scheduler.workers_lost,
                scheduler.tasks_retried,
                scheduler.stragglers,
            )
        )

    def _begin(self, worker: str, attempt: Attempt) -> None:
        if attempt.number > 1:
            log.warning("%s on %s", self._describe(attempt), self._pool.name(worker))
        else:
            log.debug("%s on %s", self._describe(attempt), self._pool.name(worker))
        self._begun[attempt] = worker, self._meter.elapsed_s
        self._pool.start(worker, attempt)

    def _called(self, worker: str) -> str:
        """Return what a record calls a worker, which may be published: no names of machines."""
        node = self._node_of.get(worker)
        return worker if node is None else f"{worker} on node {node}"

    def _note(self, event: Event) -> BaseException | None:
        """Log what went wrong; return the error that ends the run if the scheduler ends it."""
        if isinstance(event, WorkerReady) and event.node:
            self._node_of[event.worker] = self._nodes.setdefault(event.node, len(self._nodes) + 1)
        elif isinstance(event, WorkerLost):
            log.warning("%s was lost: %s", self._pool.name(event.worker), event.reason)
        elif isinstance(event, Failed):
            if not event.retryable:
                return self._pool.error(event.attempt)
            where = self._pool.name(event.worker)
            log.warning("%s on %s failed: %s", self._describe(event.attempt), where, event.error)
        return None

    def _describe(self, attempt: Attempt) -> str:
        return f"{self._plan.shards[attempt.task].name}, attempt {attempt.number},"
