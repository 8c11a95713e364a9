"""Who has which task: the tables behind the scheduler's decisions."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from della_dist.runtime.engines.events import Attempt, Limits, Task, WorkerReady

#: Throughput is measured over about so long.
RATE_WINDOW_S = 10.0


@dataclass(slots=True, eq=False)
class Worker:
    """A worker that is ready."""

    name: str
    node: str
    labels: frozenset[str]
    heard_s: float
    moved: deque[tuple[float, int]]
    """Time, and bytes moved until then."""
    running: dict[Attempt, float] = field(default_factory=dict)
    """Attempt -> when it was started."""
    written_bytes: Mapping[Attempt, int] = field(default_factory=dict)
    """What each attempt has written, as was heard last."""

    def heard(self, now_s: float, bytes_done: int, written_bytes: Mapping[Attempt, int]) -> None:
        """Note how much was moved until now, and written."""
        self.written_bytes = written_bytes
        self.moved.append((now_s, max(bytes_done, self.moved[-1][1])))
        while len(self.moved) > 2 and self.moved[1][0] <= now_s - RATE_WINDOW_S:
            self.moved.popleft()

    def bytes_per_s(self, now_s: float) -> float:
        """Return the throughput of about the last 10 s."""
        (first_s, first), (_, last) = self.moved[0], self.moved[-1]
        return (last - first) / (now_s - first_s) if now_s > first_s else 0.0

    def local_bytes(self, task: Task) -> int:
        """Return how much of a task's input is near."""
        return sum(task.local_bytes.get(label, 0) for label in self.labels)


@dataclass(slots=True, eq=False)
class TaskState:
    """What became of a task so far."""

    task: Task
    num_started: int = 0
    running: dict[Attempt, Worker] = field(default_factory=dict)
    num_failed: int = 0
    """Attempts that failed or hung."""
    num_lost: int = 0
    """Attempts that were lost with their worker."""
    errors: list[str] = field(default_factory=list)
    """What became of them."""
    due_s: float = 0.0
    """When it may be started (again)."""
    committed: bool = False

    def may_fail(self, more: int, limits: Limits) -> bool:
        """Return whether so many more attempts may come to nothing, and yet another be made."""
        return (
            self.num_failed + more < limits.max_failures
            and self.num_lost + more < limits.max_losses
        )


class Assignments:
    """Tasks, ready workers, and the attempts that run.

    A task that is not committed is queued or has an attempt running, never both.
    """

    def __init__(self, tasks: Iterable[Task]) -> None:
        self.tasks = {task.index: TaskState(task) for task in tasks}
        #: Tasks to be started, those included that are not due yet.
        self.queue = list(self.tasks)
        #: Ready workers by name.
        self.workers: dict[str, Worker] = {}
        #: Names of workers that were lost or stopped.
        self.gone: set[str] = set()
        self.num_committed = 0

    def validate(self, in_flight: int) -> None:
        """Assert what holds between two events; no worker has more than `in_flight` attempts."""
        assert len(self.queue) == len(set(self.queue))
        assert self.num_committed == sum(state.committed for state in self.tasks.values())
        assert not self.gone & self.workers.keys()
        for index, state in self.tasks.items():
            if state.committed:
                assert index not in self.queue
            else:
                assert (index in self.queue) != bool(state.running), "lost, or both queued and run"
            assert state.num_started >= len(state.running) + state.num_failed + state.num_lost
            for attempt, worker in state.running.items():
                assert self.workers[worker.name] is worker
                assert attempt in worker.running
        for worker in self.workers.values():
            assert len(worker.running) <= in_flight
            assert all(attempt in self.tasks[attempt.task].running for attempt in worker.running)

    @property
    def num_left(self) -> int:
        """Tasks that are not committed."""
        return len(self.tasks) - self.num_committed

    def add(self, ready: WorkerReady, now_s: float) -> None:
        """Add a worker."""
        moved = deque([(now_s, 0)])
        worker = Worker(ready.worker, ready.node, ready.labels, now_s, moved)
        self.workers[worker.name] = worker

    def forget(self, worker: Worker) -> list[Attempt]:
        """Strike a worker off and return what ran there."""
        del self.workers[worker.name]
        self.gone.add(worker.name)
        for attempt in worker.running:
            del self.tasks[attempt.task].running[attempt]
        return list(worker.running)

    def start(self, task: int, worker: Worker, now_s: float) -> Attempt:
        """Give a task to a worker."""
        if task in self.queue:
            self.queue.remove(task)
        state = self.tasks[task]
        state.num_started += 1
        attempt = Attempt(task, state.num_started)
        state.running[attempt] = worker
        worker.running[attempt] = now_s
        return attempt

    def end(self, attempt: Attempt) -> float | None:
        """Strike an attempt off and return when it was started; None if it does not run."""
        state = self.tasks.get(attempt.task)
        if state is None or attempt not in state.running:
            return None
        return state.running.pop(attempt).running.pop(attempt)

    def charge(self, attempt: Attempt, error: str, due_s: float, *, lost: bool) -> TaskState:
        """Note why an attempt that was struck off came to nothing."""
        state = self.tasks[attempt.task]
        state.num_lost += lost
        state.num_failed += not lost
        state.errors.append(f"attempt {attempt.number}: {error}")
        state.due_s = due_s
        return state

    def commit(self, task: int) -> None:
        """Note that a task is done."""
        self.tasks[task].committed = True
        self.num_committed += 1
        if task in self.queue:
            self.queue.remove(task)

    def best(self, due: Iterable[int], workers: Iterable[Worker]) -> tuple[int, Worker]:
        """Return the task and the worker that go together best: the nearest, then the largest."""

        def rank(pair: tuple[int, Worker]) -> tuple[int, int]:
            task = self.tasks[pair[0]].task
            return pair[1].local_bytes(task), task.cost_bytes

        tasks = list(due)
        return max(((task, worker) for worker in workers for task in tasks), key=rank)

    def overdue(self, worker: Worker, limits: Limits, now_s: float) -> str | None:
        """Return what a worker has had for longer than it may take; None if there is nothing."""
        for attempt, started_s in worker.running.items():
            cost = self.tasks[attempt.task].task.cost_bytes
            allowed_s = limits.deadline_base_s + cost / limits.slowest_bytes_per_s
            if now_s - started_s >= allowed_s:
                return f"not done with shard {attempt.task} after {allowed_s:.0f} s"
        return None

    def idle(self) -> list[Worker]:
        """Return the workers that nothing runs on."""
        return [w for w in self.workers.values() if not w.running]

    def alone(self) -> list[tuple[float, int]]:
        """Return the tasks of which just one attempt runs, and when that was started."""
        return [
            (started_s, attempt.task)
            for worker in self.workers.values()
            for attempt, started_s in worker.running.items()
            if len(self.tasks[attempt.task].running) == 1 and not self.tasks[attempt.task].committed
        ]
