"""The scheduler, one situation at a time."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from della_dist.runtime.engines.events import (
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
    Start,
    Stop,
    Task,
    Tick,
    WorkerLost,
    WorkerReady,
)
from della_dist.runtime.engines.scheduler import Scheduler

MB = 1_000_000


class Engine:
    """Tells a scheduler events, with a clock that is set by hand."""

    def __init__(
        self,
        costs: Sequence[int | Task],
        *,
        in_flight: int = 1,
        limits: Limits | None = None,
        num_starting: int = 1,
    ) -> None:
        tasks = [c if isinstance(c, Task) else Task(i, c) for i, c in enumerate(costs)]
        self.scheduler = Scheduler(
            tasks, in_flight=in_flight, limits=limits, num_starting=num_starting
        )
        self.now_s = 1000.0

    def tell(self, *events: Event) -> list[Action]:
        return [action for e in events for action in self.scheduler.handle(e, self.now_s)]

    def ready(self, *workers: str) -> list[Action]:
        return self.tell(*(WorkerReady(w) for w in workers))

    def wait(self, seconds: float, *heard: str) -> list[Action]:
        """Let time pass, with a sign of life of some workers every second."""
        actions: list[Action] = []
        end_s = self.now_s + seconds
        while self.now_s < end_s:
            self.now_s = min(end_s, self.now_s + 1)
            actions += self.tell(Tick(), *(Heard(w, 0) for w in heard))
        return actions

    def finish(self, worker: str, task: int, number: int = 1) -> list[Action]:
        return self.tell(Finished(worker, Attempt(task, number)))


def start(worker: str, task: int, number: int = 1) -> Start:
    return Start(worker, Attempt(task, number))


def commit(task: int, number: int = 1) -> Commit:
    return Commit(Attempt(task, number))


def failed(worker: str, task: int, number: int = 1, *, retryable: bool = True) -> Failed:
    return Failed(worker, Attempt(task, number), f"timeout {number}", retryable)


# The ordinary course.


def test_one_worker_largest_first() -> None:
    engine = Engine([2, 5, 3])
    assert engine.ready("a") == [start("a", 1)]
    assert engine.finish("a", 1) == [commit(1), start("a", 2)]
    assert engine.finish("a", 2) == [commit(2), start("a", 0)]
    assert engine.finish("a", 0) == [commit(0), Done()]


def test_counts() -> None:
    engine = Engine([1] * 5, in_flight=2, num_starting=2)
    scheduler = engine.scheduler
    engine.ready("a")
    assert (scheduler.num_workers, scheduler.num_starting) == (1, 1)
    assert (scheduler.num_tasks, scheduler.num_queued, scheduler.num_running) == (5, 3, 2)
    engine.finish("a", 0)
    assert (scheduler.num_committed, scheduler.num_queued, scheduler.num_running) == (1, 2, 2)


def test_nothing_to_do() -> None:
    assert Engine([]).tell(Tick()) == [Done()]


def test_nothing_after_the_end() -> None:
    engine = Engine([1])
    engine.ready("a")
    assert engine.finish("a", 0) == [commit(0), Done()]
    assert engine.finish("a", 0) == []
    assert engine.tell(WorkerLost("a", "x"), Tick(), WorkerReady("b")) == []


def test_every_worker_gets_one_before_any_gets_two() -> None:
    engine = Engine([1] * 3, in_flight=2, num_starting=2)
    # A task is kept for the worker that is on its way.
    assert engine.ready("a") == [start("a", 0), start("a", 1)]
    assert engine.ready("b") == [start("b", 2)]
    engine = Engine([1] * 2, in_flight=2, num_starting=2)
    assert engine.ready("a") == [start("a", 0)]
    assert engine.ready("b") == [start("b", 1)]


def test_a_task_is_not_kept_for_a_worker_that_never_comes() -> None:
    engine = Engine([1] * 2, in_flight=2, num_starting=2)
    assert engine.ready("a") == [start("a", 0)]
    assert engine.tell(WorkerLost("b", "no room")) == [AddWorker()]
    limits = Limits(max_failed_starts=1)
    engine = Engine([1] * 2, in_flight=2, num_starting=2, limits=limits)
    engine.ready("a")
    assert engine.tell(WorkerLost("b", "no room")) == [start("a", 1)]


def test_near_tasks_first_then_large_ones() -> None:
    tasks = [
        Task(0, 9),
        Task(1, 5, {"rack=x": 2, "disk=fast": 2}),
        Task(2, 6, {"rack=x": 3}),
        Task(3, 7, {"rack=x": 3}),
        Task(4, 8, {"rack=y": 6}),
    ]
    engine = Engine(tasks, in_flight=5)
    actions = engine.tell(WorkerReady("a", "node", frozenset({"rack=x", "disk=fast"})))
    assert actions == [start("a", task) for task in (1, 3, 2, 0, 4)]


def test_a_near_task_is_left_to_the_worker_it_is_near_to() -> None:
    engine = Engine([Task(0, 9, {"rack=x": 9}), Task(1, 8)], num_starting=2)
    for state in engine.scheduler._table.tasks.values():
        state.due_s = 5.0
    engine.tell(WorkerReady("a"), WorkerReady("b", "", frozenset({"rack=x"})))
    assert engine.wait(5) == [start("b", 0), start("a", 1)]


# Lost workers.


def test_the_tasks_of_a_lost_worker_go_to_others() -> None:
    engine = Engine([5, 4, 3], in_flight=2)
    engine.ready("a")
    assert engine.tell(WorkerLost("a", "killed")) == [AddWorker()]
    assert engine.ready("b") == [start("b", 0, 2), start("b", 1, 2)]
    assert (engine.scheduler.workers_lost, engine.scheduler.tasks_retried) == (1, 2)


def test_a_lost_worker_is_lost_once() -> None:
    engine = Engine([5, 4, 3])
    engine.ready("a", "b")
    assert engine.tell(WorkerLost("a", "killed")) == [AddWorker()]
    assert engine.tell(WorkerLost("a", "killed"), Heard("a", 5), WorkerReady("a")) == []
    assert engine.scheduler.workers_lost == 1
    assert engine.scheduler.num_workers == 1


def test_no_replacement_without_work() -> None:
    engine = Engine([5, 4], in_flight=1, num_starting=2)
    engine.ready("a", "b")
    engine.finish("a", 0)
    assert engine.tell(WorkerLost("a", "killed")) == []


def test_an_attempt_is_charged_to_what_ran_on_the_lost_worker() -> None:
    engine = Engine([5, 4], limits=Limits(max_losses=2), num_starting=2)
    engine.ready("a", "b")
    engine.tell(WorkerLost("a", "out of memory"))
    engine.ready("c")
    (abort,) = engine.tell(WorkerLost("c", "killed"))
    assert abort == Abort(
        "shard 0 failed 2 times: attempt 1: worker a was lost: out of memory; "
        "attempt 2: worker c was lost: killed"
    )
    assert engine.finish("b", 1) == []


def test_a_worker_that_cannot_be_started_is_replaced_a_few_times() -> None:
    engine = Engine([1] * 9, limits=Limits(max_failed_starts=3), num_starting=1)
    assert engine.tell(WorkerLost("a", "no room")) == [AddWorker()]
    assert engine.tell(WorkerLost("b", "no room")) == [AddWorker()]
    (abort,) = engine.tell(WorkerLost("c", "no such image"))
    assert abort == Abort("no worker could be started, 3 times in a row. The last: no such image")
    assert engine.scheduler.workers_lost == 0


def test_failing_starts_do_not_end_a_run_that_has_workers() -> None:
    engine = Engine([1] * 9, limits=Limits(max_failed_starts=2), num_starting=2)
    engine.ready("a")
    assert engine.tell(WorkerLost("b", "no room")) == [AddWorker()]
    assert engine.tell(WorkerLost("c", "no room")) == []
    # The last worker is lost too: one more is tried, and counts.
    assert engine.tell(WorkerLost("a", "killed")) == [AddWorker()]
    (abort,) = engine.tell(WorkerLost("d", "no room"))
    assert isinstance(abort, Abort)


def test_failing_starts_wait_for_those_on_their_way() -> None:
    engine = Engine([1] * 9, limits=Limits(max_failed_starts=2), num_starting=3)
    assert engine.tell(WorkerLost("a", "no room")) == [AddWorker()]
    assert engine.tell(WorkerLost("b", "no room")) == []
    assert engine.ready("c") == [start("c", 0)]
    # Starts work again.
    assert engine.tell(WorkerLost("d", "no room")) == [AddWorker()]


def test_a_worker_is_asked_for_where_none_is() -> None:
    engine = Engine([1], num_starting=0)
    assert engine.tell(Tick()) == [AddWorker()]
    assert engine.wait(100) == []


# Failures.


def test_a_permanent_failure_ends_the_run() -> None:
    engine = Engine([1, 1], num_starting=2)
    engine.ready("a", "b")
    assert engine.tell(failed("a", 0, retryable=False)) == [Abort("timeout 1")]
    assert engine.finish("b", 1) == []


def test_retries_come_later_and_later() -> None:
    engine = Engine([1], limits=Limits(backoff_s=5, max_backoff_s=15))
    engine.ready("a")
    for number, delay_s in enumerate([5, 10, 15, 15], start=1):
        assert engine.tell(failed("a", 0, number)) == []
        assert engine.wait(delay_s - 1, "a") == []
        assert engine.wait(1, "a") == [start("a", 0, number + 1)]
    (abort,) = engine.tell(failed("a", 0, 5))
    assert isinstance(abort, Abort)
    assert abort.error.startswith("shard 0 failed 5 times: attempt 1: timeout 1; attempt 2: ")


def test_losses_and_failures_are_counted_apart() -> None:
    engine = Engine([1], limits=Limits(max_failures=2, max_losses=9))
    for number in range(1, 9):
        assert engine.ready(f"w{number}") == [start(f"w{number}", 0, number)]
        assert engine.tell(WorkerLost(f"w{number}", "preempted")) == [AddWorker()]
    engine.ready("x")
    assert engine.tell(failed("x", 0, 9)) == []
    assert engine.wait(5, "x") == [start("x", 0, 10)]
    (abort,) = engine.tell(failed("x", 0, 10))
    assert abort == Abort(  # the latest
        "shard 0 failed 10 times: attempt 6: worker w6 was lost: preempted; attempt 7: worker w7 "
        "was lost: preempted; attempt 8: worker w8 was lost: preempted; attempt 9: timeout 9; "
        "attempt 10: timeout 10"
    )


def test_a_task_that_hangs_fails() -> None:
    engine = Engine([1], limits=Limits(max_failures=2, deadline_base_s=10))
    engine.ready("a")
    assert engine.wait(11, "a")[0] == Stop("a", "not done with shard 0 after 10 s")
    engine.ready("b")
    assert [type(action) for action in engine.wait(11, "b")] == [Stop, Abort]


def test_a_failure_is_charged_once() -> None:
    engine = Engine([1])
    engine.ready("a")
    engine.tell(failed("a", 0), failed("a", 0), WorkerLost("a", "killed"))
    assert engine.scheduler.tasks_retried == 1
    # What an attempt of a lost worker says has no weight any more, unless it is done.
    engine.ready("b")
    engine.wait(5, "b")
    engine.tell(WorkerLost("b", "killed"))
    assert engine.tell(failed("b", 0, 2, retryable=False)) == []


# Late and doubled results.


def test_a_late_result_of_a_lost_worker_is_good() -> None:
    engine = Engine([5, 4])
    engine.ready("a")
    engine.tell(WorkerLost("a", "node gone"))
    assert engine.finish("a", 0) == [commit(0)]
    assert engine.ready("b") == [start("b", 1)]


def test_a_late_result_while_the_retry_runs() -> None:
    engine = Engine([5, 4])
    engine.ready("a")
    engine.tell(WorkerLost("a", "node gone"))
    assert engine.ready("b") == [start("b", 0, 2)]
    assert engine.finish("a", 0, 1) == [commit(0)]
    # The retry goes on, and its result is no news. A failure would not matter either.
    assert engine.finish("b", 0, 2) == [start("b", 1)]


def test_a_failure_of_what_is_committed_does_not_matter() -> None:
    engine = Engine([5, 4])
    engine.ready("a")
    engine.tell(WorkerLost("a", "node gone"), WorkerReady("b"))
    engine.finish("a", 0, 1)
    assert engine.tell(failed("b", 0, 2, retryable=False)) == [start("b", 1)]
    assert engine.scheduler.tasks_retried == 1


def test_the_end_does_not_wait_for_a_retry() -> None:
    engine = Engine([5])
    engine.ready("a")
    engine.tell(WorkerLost("a", "node gone"), WorkerReady("b"))
    assert engine.finish("a", 0, 1) == [commit(0), Done()]


def test_a_result_that_comes_twice() -> None:
    engine = Engine([5, 4])
    engine.ready("a")
    assert engine.finish("a", 0) == [commit(0), start("a", 1)]
    assert engine.finish("a", 0) == []


def test_unknown_events() -> None:
    engine = Engine([5])
    engine.ready("a")
    assert engine.finish("a", 7) == []
    assert engine.tell(failed("a", 7, retryable=False), Heard("z", 3), WorkerReady("a")) == []
    assert engine.scheduler.num_workers == 1


# Silence and deadlines.


def test_a_silent_worker_is_stopped() -> None:
    engine = Engine([5, 4, 3], num_starting=2)
    engine.ready("a", "b")
    assert engine.wait(59, "b") == []
    assert engine.wait(1, "b") == [Stop("a", "silent for 60 s"), AddWorker()]
    assert engine.scheduler.workers_lost == 1
    assert engine.finish("b", 1) == [commit(1), start("b", 0, 2)]
    # That it is gone was known.
    assert engine.tell(WorkerLost("a", "stopped"), Heard("a", 9)) == []


@pytest.mark.parametrize("event", [Heard("a", 0), Finished("a", Attempt(0, 1)), failed("a", 0)])
def test_signs_of_life(event: Event) -> None:
    engine = Engine([5, 4, 3])
    engine.ready("a")
    engine.wait(59)
    assert not any(isinstance(action, Stop) for action in engine.tell(event))
    assert not any(isinstance(action, Stop) for action in engine.wait(59))
    assert any(isinstance(action, Stop) for action in engine.wait(1))


def test_nobody_is_silent_while_nobody_listens() -> None:
    engine = Engine([5, 4])
    engine.ready("a")
    engine.now_s += 3600
    assert engine.tell(Tick()) == []
    engine.now_s -= 1800
    assert engine.tell(Tick()) == []
    assert engine.wait(49) == []
    assert engine.wait(1) == [Stop("a", "silent for 60 s"), AddWorker()]


def test_a_worker_whose_attempt_is_overdue_is_stopped() -> None:
    limits = Limits(deadline_base_s=10, slowest_bytes_per_s=1 * MB)
    engine = Engine([5 * MB, 4 * MB], limits=limits)
    engine.ready("a")
    assert engine.wait(14, "a") == []
    (stop, add) = engine.wait(1, "a")
    assert (stop, add) == (Stop("a", "not done with shard 0 after 15 s"), AddWorker())
    assert engine.ready("b") == [start("b", 0, 2)]


# Stragglers and idle workers.


def straggling() -> Engine:
    """Return an engine whose attempts took 10 s each, but for one that still runs."""
    engine = Engine([100, *[50] * 3], num_starting=2)
    assert engine.ready("a", "b") == [start("a", 0), start("b", 1)]
    engine.wait(10, "a", "b")
    assert engine.finish("b", 1) == [commit(1), start("b", 2)]
    engine.wait(10, "a", "b")
    assert engine.finish("b", 2) == [commit(2), start("b", 3)]
    engine.wait(10, "a", "b")
    return engine


def test_a_straggler_is_started_a_second_time() -> None:
    engine = straggling()
    assert engine.finish("b", 3) == [commit(3)]
    # Usual are 20 s; twice that is too long.
    assert engine.wait(10, "a", "b") == []
    assert engine.wait(1, "a", "b") == [start("b", 0, 2)]
    assert engine.scheduler.stragglers == 1
    assert engine.wait(100, "a", "b") == []
    assert engine.finish("b", 0, 2) == [commit(0, 2), Done()]


@pytest.mark.parametrize("first", [1, 2])
def test_one_of_two_attempts_fails(first: int) -> None:
    engine = straggling()
    engine.finish("b", 3)
    engine.wait(11, "a", "b")
    worker, other = ("a", "b") if first == 1 else ("b", "a")
    assert engine.tell(failed(worker, 0, first)) == []
    assert engine.scheduler.tasks_retried == 0
    assert engine.tell(failed(other, 0, 3 - first)) == []
    assert engine.scheduler.tasks_retried == 1
    assert engine.wait(10, "a", "b") == [start("a", 0, 3)]


def test_the_worker_of_one_of_two_attempts_is_lost() -> None:
    engine = straggling()
    engine.finish("b", 3)
    engine.wait(11, "a", "b")
    assert engine.tell(WorkerLost("a", "killed")) == []
    assert engine.finish("b", 0, 2) == [commit(0, 2), Done()]


def test_second_attempts_that_fail_have_an_end() -> None:
    engine = straggling()
    engine.finish("b", 3)
    engine.wait(10, "a", "b")
    for number, delay_s in enumerate((1, 5, 10, 20), start=2):
        assert engine.wait(delay_s - 1, "a", "b") == []
        assert engine.wait(1, "a", "b") == [start("b", 0, number)]
        assert engine.tell(failed("b", 0, number)) == []
    assert engine.wait(100, "a", "b") == []
    assert engine.finish("a", 0) == [commit(0), Done()]


def test_a_second_attempt_goes_to_another_node() -> None:
    engine = Engine([100, 100, *[50] * 4], num_starting=4)
    for worker, node in (("a", "slow"), ("x", "slow"), ("b", "slow"), ("c", "fast")):
        engine.tell(WorkerReady(worker, node))
    engine.wait(10, *"axbc")
    for worker, task in (("b", 2), ("c", 3), ("b", 4), ("c", 5)):
        engine.finish(worker, task)
    # Both b and c are idle.
    assert engine.wait(30, *"axbc") == [start("c", 0, 2), start("b", 1, 2)]


def test_too_little_is_known_to_call_an_attempt_slow() -> None:
    engine = Engine([100, 50, 50], num_starting=2)
    engine.ready("a", "b")
    engine.wait(1, "a", "b")
    engine.finish("b", 1)
    engine.finish("b", 2)
    assert engine.wait(200, "a", "b") == []


def test_idle_workers_are_stopped() -> None:
    engine = Engine([5, 4], num_starting=4)
    assert engine.ready("a") == [start("a", 0)]
    assert engine.ready("b") == [start("b", 1)]
    assert engine.ready("c") == []
    assert engine.ready("d") == []  # both attempts might have to run a second time
    assert engine.ready("e") == [Stop("e", "not needed any more")]
    assert engine.finish("a", 0) == [
        commit(0),
        Stop("c", "not needed any more"),
        Stop("d", "not needed any more"),
    ]
    assert engine.scheduler.workers_lost == 0
    # The one that was kept takes over.
    assert engine.tell(WorkerLost("b", "killed")) == [start("a", 1, 2)]


def test_nobody_is_stopped_while_a_retry_waits() -> None:
    engine = Engine([5], num_starting=2)
    engine.ready("a", "b")
    assert engine.tell(failed("a", 0)) == []
    assert engine.scheduler.num_workers == 2


# Throughput.


def test_throughput() -> None:
    engine = Engine([5, 4])
    assert engine.scheduler.bytes_per_s() == {}
    engine.ready("a")
    assert engine.scheduler.bytes_per_s() == {"a": 0}
    for i in range(1, 21):
        engine.now_s += 1
        engine.tell(Heard("a", 100 * i if i <= 10 else 1000 + 10 * (i - 10)))
    assert engine.scheduler.bytes_per_s() == {"a": 10}
    for _ in range(20):
        engine.now_s += 1
        engine.tell(Heard("a", 0))  # counts never go back
    assert engine.scheduler.bytes_per_s() == {"a": 0}


def test_a_frozen_worker_slows_down() -> None:
    engine = Engine([5, 4])
    engine.ready("a")
    engine.now_s += 10
    engine.tell(Heard("a", 100))
    engine.now_s += 10
    engine.tell(Tick())
    assert engine.scheduler.bytes_per_s() == {"a": 5}


def test_attempts_that_run() -> None:
    """What each has written, how old it is, and whether that is much."""
    engine = Engine([10 * MB, *[1 * MB] * 4], in_flight=2)
    engine.ready("a")
    for task in (1, 2, 3):
        engine.now_s += 5
        engine.tell(Finished("a", Attempt(task, 1)))
    engine.tell(Heard("a", 7 * MB, {Attempt(0, 1): 3 * MB, Attempt(1, 1): MB}))
    large, small = engine.scheduler.running()["a"]
    assert (large.attempt, large.age_s, large.written_bytes) == (Attempt(0, 1), 15, 3 * MB)
    assert (small.attempt, small.age_s, small.written_bytes) == (Attempt(4, 1), 0, 0)
    # Usual are 5 s a MB: twice that is slow, and never less than half a minute.
    for seconds, slow in ((29, [False, False]), (2, [False, True]), (60, [True, True])):
        engine.wait(seconds, "a")
        running = engine.scheduler.running()["a"]
        assert [one.is_slow for one in running] == slow


def test_a_run_without_workers_waits_and_then_ends() -> None:
    engine = Engine([1] * 3, limits=Limits(start_s=100), num_starting=2)
    assert engine.wait(99) == []
    engine.ready("a")
    engine.wait(50, "a")
    engine.tell(WorkerLost("a", "its node went away"))
    assert not [a for a in engine.wait(99) if isinstance(a, Abort)]
    assert Abort("no worker has been ready for 100 s") in engine.wait(2)


def test_the_death_of_a_node_is_charged_once() -> None:
    # Its workers are reported one after another; a retry does not go to the next to be reported.
    scheduler = Scheduler([Task(i, 100) for i in range(4)], num_starting=4)
    now_s = 0.0
    started: list[Start] = []

    def tell(event: Event) -> None:
        started.extend(a for a in scheduler.handle(event, now_s) if isinstance(a, Start))

    for worker, node in (("a", "n1"), ("b", "n1"), ("c", "n1"), ("d", "n2")):
        tell(WorkerReady(worker, node))
    assert [s.worker for s in started] == ["a", "b", "c", "d"]
    for worker in ("a", "b", "c"):
        tell(WorkerLost(worker, "node n1 died"))
    assert len(started) == 4
    now_s += 3
    for worker in ("e", "f", "g"):
        tell(WorkerReady(worker, "n3"))
    assert sorted(s.attempt.task for s in started[4:]) == [0, 1, 2]
    assert {s.attempt.number for s in started[4:]} == {2}
    assert scheduler.tasks_retried == 3


def test_a_retry_keeps_away_from_a_node_that_may_be_dying() -> None:
    scheduler = Scheduler([Task(0, 100), Task(1, 100)], num_starting=2)
    first = [scheduler.handle(WorkerReady(worker, "n1"), 0.0) for worker in "ab"]
    assert [type(a) for actions in first for a in actions] == [Start, Start]
    lost = scheduler.handle(WorkerLost("a", "killed"), 0.0)
    assert not [action for action in lost if isinstance(action, Start)]
    assert not scheduler.handle(Finished("b", Attempt(1, 1)), 1.0)[1:]
    # It was only the worker: the other one of the node goes on with both.
    later = scheduler.handle(Tick(), 3.0)
    assert later == [Start("b", Attempt(0, 2))]
