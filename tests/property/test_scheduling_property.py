"""Whatever happens in whatever order: no task is lost, none is committed twice, and it ends."""

from __future__ import annotations

from hypothesis import assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from della_dist.runtime.engines.events import (
    Abort,
    AddWorker,
    Attempt,
    Commit,
    Done,
    Event,
    Failed,
    Finished,
    Heard,
    Limits,
    Start,
    Stop,
    Task,
    Tick,
    WorkerLost,
    WorkerReady,
)
from della_dist.runtime.engines.scheduler import Scheduler

LIMITS = Limits(
    max_failures=3,
    max_losses=5,
    max_failed_starts=3,
    silence_s=20,
    deadline_base_s=100,
    slowest_bytes_per_s=10,
    straggler_factor=1.1,
    straggler_min_s=2,
    straggler_min_finished=1,
    backoff_s=2,
    max_backoff_s=8,
)
LABELS = ("rack=x", "rack=y")

tasks = st.lists(
    st.tuples(st.integers(0, 1000), st.dictionaries(st.sampled_from(LABELS), st.integers(0, 1000))),
    max_size=6,
)


class Cluster(RuleBasedStateMachine):
    """An engine that does what it is told, with workers that do what they like."""

    @initialize(tasks=tasks, in_flight=st.integers(1, 3), num_starting=st.integers(0, 4))
    def begin(
        self, tasks: list[tuple[int, dict[str, int]]], in_flight: int, num_starting: int
    ) -> None:
        # Indices of a continued run: some are missing.
        self.tasks = {
            3 * i + 1: Task(3 * i + 1, cost, near) for i, (cost, near) in enumerate(tasks)
        }
        self.in_flight = in_flight
        self.scheduler = Scheduler(
            list(self.tasks.values()),
            in_flight=in_flight,
            limits=LIMITS,
            num_starting=num_starting,
        )
        self.now_s = 0.0
        self.num_names = 0
        self.starting: set[str] = set()
        self.ready: dict[str, set[Attempt]] = {}
        self.gone: set[str] = set()
        #: Every attempt that was started, and the worker that may still finish it.
        self.started: dict[Attempt, str] = {}
        self.committed: set[int] = set()
        self.failures: dict[int, int] = dict.fromkeys(self.tasks, 0)
        self.losses: dict[int, int] = dict.fromkeys(self.tasks, 0)
        self.failed_starts = 0
        self.fatal = ""
        self.ended = False
        for _ in range(num_starting):
            self.add_worker()
        self.tell(Tick())

    def add_worker(self) -> None:
        self.num_names += 1
        self.starting.add(f"w{self.num_names}")

    def lose(self, worker: str, *, hung: bool = False) -> None:
        for attempt in self.ready.pop(worker):
            (self.failures if hung else self.losses)[attempt.task] += 1
        self.gone.add(worker)

    def may_be_tried(self, task: int) -> bool:
        return self.failures[task] < LIMITS.max_failures and self.losses[task] < LIMITS.max_losses

    def tell(self, event: Event) -> None:
        """Tell an event, do what is to be done, and check that it may be."""
        for action in self.scheduler.handle(event, self.now_s):
            assert not self.ended
            match action:
                case Start(worker, attempt):
                    assert attempt not in self.started
                    assert attempt.task not in self.committed
                    running = self.ready[worker]  # it is ready
                    running.add(attempt)
                    assert len(running) <= self.in_flight
                    having = [w for w, r in self.ready.items() for a in r if a.task == attempt.task]
                    assert len(having) == len(set(having)) <= 2
                    self.started[attempt] = worker
                case Commit(attempt):
                    assert event == Finished(self.started[attempt], attempt)
                    assert attempt.task not in self.committed
                    self.committed.add(attempt.task)
                case Stop(worker, reason):
                    assert (
                        reason == "not needed any more" or self.ready[worker] or "silent" in reason
                    )
                    if reason == "not needed any more":
                        assert not self.ready[worker]
                    self.lose(worker, hung="not done with" in reason)
                case AddWorker():
                    self.add_worker()
                case Abort(error):
                    self.ended = True
                    self.check_abort(error)
                case Done():
                    self.ended = True
                    assert self.committed == set(self.tasks)
        self.scheduler.validate()
        if not self.ended:
            self.check()

    def check_abort(self, error: str) -> None:
        if error == self.fatal:
            return
        if error.startswith("no worker could be started"):
            assert self.failed_starts >= LIMITS.max_failed_starts
            assert not self.ready
            assert not self.starting
            return
        task = next(t for t in self.tasks if error.startswith(f"shard {t} failed "))
        assert f"failed {self.failures[task] + self.losses[task]} times" in error
        assert not self.may_be_tried(task)

    def check(self) -> None:
        scheduler = self.scheduler
        assert scheduler.num_workers == len(self.ready)
        assert scheduler.num_starting == len(self.starting)
        assert scheduler.num_running == sum(map(len, self.ready.values()))
        assert scheduler.num_committed == len(self.committed) < len(self.tasks)
        assert set(scheduler.bytes_per_s()) == set(self.ready)
        running = {attempt.task for attempts in self.ready.values() for attempt in attempts}
        queued = self.tasks.keys() - self.committed - running
        assert scheduler.num_queued == len(queued)
        assert all(self.may_be_tried(task) for task in queued)
        assert self.ready or self.starting

    # What workers do.

    @precondition(lambda self: self.starting)
    @rule(data=st.data(), labels=st.frozensets(st.sampled_from(LABELS)), node=st.sampled_from("no"))
    def becomes_ready(self, data: st.DataObject, labels: frozenset[str], node: str) -> None:
        worker = data.draw(st.sampled_from(sorted(self.starting)))
        self.starting.remove(worker)
        self.ready[worker] = set()
        self.failed_starts = 0
        self.tell(WorkerReady(worker, node, labels))

    @precondition(lambda self: self.starting)
    @rule(data=st.data())
    def cannot_start(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(sorted(self.starting)))
        self.starting.remove(worker)
        self.gone.add(worker)
        self.failed_starts += 1
        self.tell(WorkerLost(worker, "no room"))

    @precondition(lambda self: self.ready)
    @rule(data=st.data())
    def dies(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(sorted(self.ready)))
        self.lose(worker)
        self.tell(WorkerLost(worker, "killed"))

    @precondition(lambda self: self.started)
    @rule(data=st.data())
    def finishes(self, data: st.DataObject) -> None:
        # Any attempt ever: it may have finished before, or its worker be lost.
        attempt = data.draw(st.sampled_from(list(self.started)))
        self.finish(attempt)

    @precondition(lambda self: self.ready)
    @rule(data=st.data())
    def one_is_slow(self, data: st.DataObject) -> None:
        # All that runs finishes, but for what one worker has: what stragglers are made of.
        slow = data.draw(st.sampled_from(sorted(self.ready)))
        for worker, attempts in list(self.ready.items()):
            for attempt in sorted(attempts, key=lambda a: a.task) if worker != slow else ():
                self.finish(attempt)
        self.pass_time(10, all_well=True)

    def finish(self, attempt: Attempt) -> None:
        worker = self.started[attempt]
        if worker in self.ready:
            self.ready[worker].discard(attempt)
        self.tell(Finished(worker, attempt))

    @precondition(lambda self: self.started)
    @rule(data=st.data())
    def fails(self, data: st.DataObject) -> None:
        attempt = data.draw(st.sampled_from(list(self.started)))
        worker = self.started[attempt]
        if attempt in self.ready.get(worker, ()):
            self.ready[worker].remove(attempt)
            self.failures[attempt.task] += 1
        self.tell(Failed(worker, attempt, "timeout", retryable=True))

    @precondition(lambda self: self.started)
    @rule(data=st.data(), often=st.integers(0, 9))
    def fails_for_good(self, data: st.DataObject, often: int) -> None:
        assume(often == 0)  # else hardly a run would live to see anything else
        attempt = data.draw(st.sampled_from(list(self.started)))
        worker = self.started[attempt]
        if attempt in self.ready.get(worker, ()):
            self.ready[worker].remove(attempt)
            if attempt.task not in self.committed:
                self.fatal = "not a number"
        fatal, ended = self.fatal, self.ended
        self.tell(Failed(worker, attempt, "not a number", retryable=False))
        assert self.ended == (ended or bool(fatal))

    @rule(data=st.data(), num_bytes=st.integers(0, 10_000))
    def is_heard(self, data: st.DataObject, num_bytes: int) -> None:
        workers = sorted({*self.starting, *self.ready, *self.gone, "stranger"})
        self.tell(Heard(data.draw(st.sampled_from(workers)), num_bytes))

    @rule(seconds=st.floats(0, 12), all_well=st.sampled_from([True, True, False]))
    def time_passes(self, seconds: float, all_well: bool) -> None:
        self.pass_time(seconds, all_well=all_well)

    @precondition(lambda self: self.gone)
    @rule(data=st.data(), lost=st.booleans())
    def the_dead_speak(self, data: st.DataObject, lost: bool) -> None:
        worker = data.draw(st.sampled_from(sorted(self.gone)))
        self.tell(WorkerLost(worker, "again") if lost else WorkerReady(worker))

    @rule(task=st.integers(-1, 20).filter(lambda i: i % 3 != 1), failed=st.booleans())
    def strange_tasks(self, task: int, failed: bool) -> None:
        attempt = Attempt(task, 1)
        if failed:
            self.tell(Failed("stranger", attempt, "what?", retryable=False))
        else:
            self.tell(Finished("stranger", attempt))

    def pass_time(self, seconds: float, *, all_well: bool) -> None:
        self.now_s += seconds
        if all_well:
            for worker in list(self.ready):
                self.tell(Heard(worker, 0))
        self.tell(Tick())

    def teardown(self) -> None:
        """From now on all goes well: then the run must come to its good end."""
        if not hasattr(self, "tasks") or self.ended:
            return
        for _ in range(100):
            for worker in sorted(self.starting):
                self.starting.remove(worker)
                self.ready[worker] = set()
                self.failed_starts = 0
                self.tell(WorkerReady(worker))
            for attempts in list(self.ready.values()):
                for attempt in list(attempts):
                    self.finish(attempt)
            self.pass_time(1, all_well=True)
        assert self.committed == set(self.tasks)


TestCluster = Cluster.TestCase
TestCluster.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)
