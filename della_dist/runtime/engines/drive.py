"""The driver's loop: tells the scheduling state what happens, and does what it says."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, Protocol

from della_dist.errors import ConfigError, DellaDistError, RunError
from della_dist.locations import masked
from della_dist.planning.build import MergePlan
from della_dist.planning.locality import file_labels, local_bytes
from della_dist.planning.projection import task_cost
from della_dist.report.run_events import (
    Progressed,
    ShardCommitted,
    ShardFailed,
    ShardStarted,
    WorkerIsReady,
    WorkerIsStopped,
    WorkerWasLost,
)
from della_dist.report.run_log import HISTORY, UNSEEN, tell
from della_dist.runtime.engines.events import (
    NOT_NEEDED,
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
from della_dist.runtime.engines.status import Status
from della_dist.runtime.output.commit import Output
from della_dist.runtime.task.merge import TaskRecord
from della_dist.runtime.task.meter import Meter
from della_dist.specs.history import TaskRun

log = logging.getLogger("della_dist.run")

#: The scheduler hears of the time at least so often.
TICK_S = 0.5
#: Workers are counted so often, for whoever looks; of a thousand it takes a while.
COUNT_EVERY_S = 0.2
#: How far the run is stands in its log so often.
TELL_EVERY_S = 10.0


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
    except BaseException as error:
        meter.enter("stopping")  # workers end the block, or the request, that they are at
        if isinstance(error, Exception):
            _keep_history(run.scheduler, output, error)
        raise


def _keep_history(scheduler: Scheduler, output: Output, error: Exception) -> None:
    """Leave what happened in the output's records, where the next run does not need it."""
    lines = [f"{now_s:.3f} {event} -> {list(then)}" for now_s, event, then in scheduler.history]
    for line in lines:
        log.log(HISTORY, "%s", masked(line))
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
        self._nodes: dict[str, int] = {}
        self._node_of: dict[str, int] = {}
        labels = file_labels(plan, plan.config.node_labels)
        tasks = [
            Task(i, task_cost(plan, shard), local_bytes(plan, shard, labels) if labels else {})
            for i, shard in enumerate(plan.shards)
            if i not in output.committed
        ]
        self._status = Status(plan, {task.index: task.cost_bytes for task in tasks}, pool.name)
        self._counted_s = 0.0
        self._told_s = time.monotonic()
        #: Attempt -> its worker, what a person calls it, and when it was started.
        self._began: dict[Attempt, tuple[str, str, float]] = {}
        self.scheduler = Scheduler(
            tasks,
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
                        self._count(time.monotonic())
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
                        level = logging.DEBUG if reason == NOT_NEEDED else logging.INFO
                        tell(WorkerIsStopped(self._pool.name(worker), reason), level)
                        self._pool.stop(worker)
                    case AddWorker():
                        self._pool.add_worker()
        now_s = time.monotonic()
        if now_s - self._counted_s >= COUNT_EVERY_S:
            self._count(now_s)
        if now_s - self._told_s >= TELL_EVERY_S:
            self._tell_progress(now_s)
        return False

    def _commit(self, attempt: Attempt) -> None:
        began_s = time.monotonic()
        worker, name, began = self._began.pop(attempt)
        run = TaskRun(
            session=self._meter.session(self._pool.engine, self._pool.cpu_s),
            worker=self._called(worker),
            attempt=attempt.number,
            start_s=began,
            end_s=self._meter.elapsed_s,
        )
        record = replace(self._pool.result(attempt), run=run)
        self._output.commit(record)
        self._meter.finished_task()
        self._status.commit(attempt.task)
        tell(
            ShardCommitted(
                record.shard.name,
                attempt.number,
                name,
                size_bytes=record.shard.size_bytes,
                num_tensors=len(record.tensors),
                elapsed_s=run.end_s - run.start_s,
                tasks_done=len(self._output.committed),
                num_tasks=len(self._plan.shards),
            )
        )
        # The clock of the scheduler stands still meanwhile: a store may hold the run up, and what
        # the workers say is not heard then. None of them is late for that.
        self._held_up_s += time.monotonic() - began_s

    def _count(self, now_s: float) -> None:
        self._counted_s = now_s
        self._meter.set_workers(self._status.counts(self.scheduler))

    def _tell_progress(self, now_s: float) -> None:
        self._told_s = now_s
        done = self._meter.snapshot()
        tell(
            Progressed(
                tasks_done=len(self._output.committed),
                num_tasks=len(self._plan.shards),
                bytes_read=done.bytes_read,
                bytes_written=done.bytes_written,
                num_workers=self.scheduler.num_workers,
                workers_lost=self.scheduler.workers_lost,
                tasks_retried=self.scheduler.tasks_retried,
                stragglers=self.scheduler.stragglers,
            ),
            UNSEEN,
        )

    def _begin(self, worker: str, attempt: Attempt) -> None:
        name = self._pool.name(worker)
        self._began[attempt] = worker, name, self._meter.elapsed_s
        others = self.scheduler.num_running_of(attempt.task) - 1
        why: Literal["first", "retry", "straggler"] = "straggler" if others else "retry"
        if attempt.number == 1:
            why = "first"
        shard = self._plan.shards[attempt.task].name
        level = logging.DEBUG if why == "first" else logging.WARNING
        tell(ShardStarted(shard, attempt.number, name, why), level)
        self._pool.start(worker, attempt)

    def _called(self, worker: str) -> str:
        """Return what a record calls a worker, which may be published: no names of machines."""
        node = self._node_of.get(worker)
        return worker if node is None else f"{worker} on node {node}"

    def _note(self, event: Event) -> BaseException | None:
        """Tell what happened to a worker; return the error of one that ends the run."""
        if isinstance(event, WorkerReady):
            if event.node:
                number = self._nodes.setdefault(event.node, len(self._nodes) + 1)
                self._node_of[event.worker] = number
            tell(WorkerIsReady(self._pool.name(event.worker)))
        elif isinstance(event, WorkerLost):
            tell(WorkerWasLost(self._pool.name(event.worker), event.reason), logging.WARNING)
        elif isinstance(event, Failed):
            name = self._pool.name(event.worker)
            number, retried = event.attempt.number, event.retryable
            shard = self._plan.shards[event.attempt.task].name
            # What ends the run is its error, and shown as that.
            level = logging.WARNING if retried else logging.DEBUG
            tell(ShardFailed(shard, number, name, event.error, is_retried=retried), level)
            return None if retried else self._pool.error(event.attempt)
        return None
