"""Which worker does what, and what happens when one dies: a state that is told events.

Nothing here waits, looks at a clock or touches a worker. An engine calls `Scheduler.handle` with
each event and does what the actions say, so that one set of rules serves threads and clusters, and
is tested without either.

Who guarantees progress. While a task is not committed, the scheduler sees to it that an attempt
runs, or that a retry waits for its time while a worker is ready, or that a worker is asked for. The
engine sees to it that every worker it starts is reported ready or lost in the end, that ready
workers are heard of, and that a `Tick` comes every second or so. A worker that nothing is heard of
is stopped for its silence, an attempt that never ends for its deadline.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from della_dist.runtime.engines.assignments import Assignments, Worker
from della_dist.runtime.engines.events import (
    NOT_NEEDED,
    Abort,
    Action,
    AddWorker,
    Attempt,
    Commit,
    Done,
    Event,
    Failed,
    Finished,
    Heard,
    Limits,
    Running,
    Start,
    Stop,
    Task,
    Tick,
    WorkerLost,
    WorkerReady,
)
from della_dist.runtime.engines.stragglers import running, second_attempts

#: What is usual is the median of so many attempts: the latest ones.
NUM_PACES = 101
#: Of a task that is given up; the latest.
NUM_ERRORS_SHOWN = 5
#: Events that are kept, the latest: what led to a failure, whatever the run's length.
NUM_KEPT = 2000


class Scheduler:
    """The state of a run.

    Parameters
    ----------
    tasks
        What is to be done.
    in_flight
        Attempts that one worker has at once, at most.
    limits
        When patience ends.
    num_starting
        Workers that the engine starts of its own accord; it is to report each of them as ready or
        lost. As long as they are on their way, a task is kept for each before any worker gets its
        second.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        *,
        in_flight: int = 2,
        limits: Limits | None = None,
        num_starting: int = 1,
    ) -> None:
        self._limits = limits or Limits()
        self._in_flight = in_flight
        self._table = Assignments(tasks)
        self._failed_starts = 0
        #: Seconds a byte of the latest attempts.
        self._paces: deque[float] = deque(maxlen=NUM_PACES)
        self._told_s: float | None = None
        #: When a worker was ready last.
        self._manned_s = 0.0
        self._now_s = 0.0
        self._actions: list[Action] = []
        self._ended = False
        #: Time, event, and what followed; not the signs of life that nothing followed.
        self.history: deque[tuple[float, Event, tuple[Action, ...]]] = deque(maxlen=NUM_KEPT)
        #: Workers that were asked for and are neither ready nor lost.
        self.num_starting = num_starting
        #: Workers that died, froze or hung after they were ready.
        self.workers_lost = 0
        #: Times that a task went back to the queue.
        self.tasks_retried = 0
        #: Attempts started while another one of the same task was running.
        self.stragglers = 0

    @property
    def num_tasks(self) -> int:
        """Tasks of the run."""
        return len(self._table.tasks)

    @property
    def num_committed(self) -> int:
        """Tasks that are done."""
        return self._table.num_committed

    @property
    def num_queued(self) -> int:
        """Tasks that no worker has, those that wait for their retry included."""
        return len(self._table.queue)

    @property
    def num_running(self) -> int:
        """Attempts that are running."""
        return sum(len(w.running) for w in self._table.workers.values())

    @property
    def num_workers(self) -> int:
        """Workers that are ready."""
        return len(self._table.workers)

    def is_committed(self, task: int) -> bool:
        """Return whether a task is done."""
        return self._table.tasks[task].committed

    def num_running_of(self, task: int) -> int:
        """Return how many attempts of a task run."""
        return len(self._table.tasks[task].running)

    def bytes_per_s(self) -> dict[str, float]:
        """Return ready worker -> bytes that it moved a second, over about the last 10 s."""
        return {name: w.bytes_per_s(self._now_s) for name, w in self._table.workers.items()}

    def running(self) -> dict[str, list[Running]]:
        """Return ready worker -> the attempts that it has, the oldest first."""
        return running(self._table, self._paces, self._limits, self._now_s)

    def handle(self, event: Event, now_s: float) -> list[Action]:
        """Take in an event and return what is to be done, in this order.

        Events of unknown tasks, of workers that are gone, and events that come twice are harmless.
        The time is that of any clock that only goes forward.
        """
        elapsed_s = 0.0 if self._told_s is None else now_s - self._told_s
        self._told_s = now_s
        self._now_s += min(max(0.0, elapsed_s), self._limits.max_step_s)
        self._actions = []
        if not self._ended:
            self._take_in(event)
            if not self._table.num_left:
                self._act(Done())
        if not self._ended:
            self._start_queued()
            self._start_stragglers()
            self._stop_idle()
            self._ensure_worker()
        if self._actions or not isinstance(event, Tick | Heard):
            self.history.append((self._now_s, event, tuple(self._actions)))
        return self._actions

    def validate(self) -> None:
        """Assert what holds between two events, until the run has ended."""
        if not self._ended:
            self._table.validate(self._in_flight)
            assert self._table.num_left
            assert self._table.workers or self.num_starting
            assert self.num_starting >= 0

    def _act(self, action: Action) -> None:
        if not self._ended:
            self._actions.append(action)
            self._ended = isinstance(action, Abort | Done)

    def _take_in(self, event: Event) -> None:
        if isinstance(event, Tick):
            self._stop_frozen()
            self._give_up_waiting()
            return
        worker = self._table.workers.get(event.worker)
        if worker is not None:
            worker.heard_s = self._now_s
        match event:
            case WorkerReady():
                if worker is None and event.worker not in self._table.gone:
                    self._table.add(event, self._now_s)
                    self.num_starting = max(0, self.num_starting - 1)
                    self._failed_starts = 0
            case WorkerLost():
                if worker is not None:
                    self._lose(worker, f"lost: {event.reason}")
                elif event.worker not in self._table.gone:
                    self._failed_start(event)
            case Heard():
                if worker is not None:
                    worker.heard(self._now_s, event.bytes_done, event.written_bytes)
            case Finished():
                self._finished(event.attempt)
            case Failed():
                self._failed(event)

    def _failed_start(self, event: WorkerLost) -> None:
        self._table.gone.add(event.worker)
        self.num_starting = max(0, self.num_starting - 1)
        self._failed_starts += 1
        if self._starts_fail and not self._table.workers and not self.num_starting:
            times = f"{self._failed_starts} times in a row"
            self._act(Abort(f"no worker could be started, {times}. The last: {event.reason}"))
        self._replace()

    def _lose(self, worker: Worker, reason: str, *, hung: bool = False) -> None:
        """Charge the loss of a worker to what ran there, and ask for another."""
        self.workers_lost += 1
        running = self._table.forget(worker)
        # If the node died, its other workers are reported a moment later: a retry on one of them
        # would be charged with the same death again.
        due_s = self._now_s
        if worker.node and any(w.node == worker.node for w in self._table.workers.values()):
            due_s += self._limits.node_pause_s
        for attempt in running:
            self._charge(attempt, f"worker {worker.name} was {reason}", due_s, lost=not hung)
        self._replace()

    def _finished(self, attempt: Attempt) -> None:
        state = self._table.tasks.get(attempt.task)
        if state is None:
            return
        started_s = self._table.end(attempt)
        if started_s is not None:
            self._paces.append((self._now_s - started_s) / max(1, state.task.cost_bytes))
        if not state.committed:
            # Also from a worker believed lost, whose retry is queued or runs: the shard is in the
            # store, and every attempt writes the same bytes.
            self._table.commit(attempt.task)
            self._act(Commit(attempt))

    def _failed(self, event: Failed) -> None:
        if self._table.end(event.attempt) is None:
            return  # charged already, with its worker
        state = self._table.tasks[event.attempt.task]
        if not event.retryable and not state.committed:
            self._act(Abort(event.error))
            return
        backoff_s = self._limits.backoff_s * 2.0**state.num_failed
        due_s = self._now_s + min(backoff_s, self._limits.max_backoff_s)
        self._charge(event.attempt, event.error, due_s, lost=False)

    def _charge(self, attempt: Attempt, error: str, due_s: float, *, lost: bool) -> None:
        """Note why an attempt came to nothing, and put its task back unless another one runs."""
        state = self._table.charge(attempt, error, due_s, lost=lost)
        if state.committed or state.running:
            return
        if not state.may_fail(0, self._limits):
            errors = "; ".join(state.errors[-NUM_ERRORS_SHOWN:])
            self._act(Abort(f"shard {attempt.task} failed {len(state.errors)} times: {errors}"))
            return
        self._table.queue.append(attempt.task)
        self.tasks_retried += 1

    @property
    def _starts_fail(self) -> bool:
        return self._failed_starts >= self._limits.max_failed_starts

    def _replace(self) -> None:
        """Ask for a worker in place of a lost one, if there is a task for it."""
        if self._table.num_left > self.num_workers + self.num_starting and not self._starts_fail:
            self._ask()

    def _ensure_worker(self) -> None:
        """Ask for a worker where there is none at all, even if starts have failed."""
        if not self._table.workers and not self.num_starting:
            self._ask()

    def _ask(self) -> None:
        self.num_starting += 1
        self._act(AddWorker())

    def _stop_frozen(self) -> None:
        """Stop workers that are silent, and those with an attempt past its deadline."""
        for worker in list(self._table.workers.values()):
            silent = self._now_s - worker.heard_s >= self._limits.silence_s
            if silent:
                reason: str | None = f"silent for {self._limits.silence_s:.0f} s"
            else:
                reason = self._table.overdue(worker, self._limits, self._now_s)
            if reason is not None:
                self._act(Stop(worker.name, reason))
                self._lose(worker, reason, hung=not silent)

    def _give_up_waiting(self) -> None:
        """End the run where no worker has been ready for too long."""
        if self._table.workers:
            self._manned_s = self._now_s
        elif self._now_s - self._manned_s >= self._limits.start_s:
            self._act(Abort(f"no worker has been ready for {self._limits.start_s:.0f} s"))

    def _start_queued(self) -> None:
        """Give the tasks that are due to the workers with the least to do."""
        due = [t for t in self._table.queue if self._table.tasks[t].due_s <= self._now_s]
        workers = self._table.workers.values()
        while due and workers:
            least = min(len(w.running) for w in workers)
            if least >= self._in_flight or (least and len(due) <= self.num_starting):
                return
            idlest = [w for w in workers if len(w.running) == least]
            task, worker = self._table.best(due, idlest)
            due.remove(task)
            self._start(task, worker)

    def _start(self, task: int, worker: Worker) -> None:
        self._act(Start(worker.name, self._table.start(task, worker, self._now_s)))

    def _start_stragglers(self) -> None:
        """Start what takes unusually long a second time, where workers have nothing else to do."""
        chosen = second_attempts(self._table, self._paces, self._limits, self._now_s)
        for task, worker in chosen:
            self._start(task, worker)
            self.stragglers += 1

    def _stop_idle(self) -> None:
        """Stop workers that stay without work even if all that runs has to run once more."""
        idle = self._table.idle()
        if not idle or self._table.queue:
            return
        for worker in idle[len(self._table.alone()) :]:
            self._table.forget(worker)
            self._act(Stop(worker.name, NOT_NEEDED))
