"""Which attempts take unusually long, so that a second one of the same task is worth it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from della_dist.runtime.engines.assignments import Assignments, Worker
from della_dist.runtime.engines.events import Attempt, Limits, Running

#: No younger attempt is called slow, where there are no second attempts either.
_SLOW_S = Limits().straggler_min_s


def usual_pace(paces: Sequence[float], limits: Limits) -> float:
    """Return the seconds a byte that are usual; infinite until enough attempts have finished."""
    if len(paces) < limits.straggler_min_finished:
        return math.inf
    return statistics.median(paces)


def second_attempts(
    table: Assignments, paces: Sequence[float], limits: Limits, now_s: float
) -> list[tuple[int, Worker]]:
    """Return the tasks to be started a second time, and where: on workers without work.

    Parameters
    ----------
    paces
        Seconds a byte of the attempts that finished lately: their median is what is usual.
    """
    idle = table.idle()
    if not idle or table.queue:
        return []
    pace = usual_pace(paces, limits)
    chosen: list[tuple[int, Worker]] = []
    for started_s, task in sorted(table.alone()):
        state = table.tasks[task]
        usual_s = limits.straggler_factor * pace * state.task.cost_bytes
        slow = now_s - started_s > max(usual_s, limits.straggler_min_s)
        # Where second attempts fail, they are neither made without end nor without a pause.
        may_fail = state.may_fail(1, limits) and state.due_s <= now_s
        if idle and slow and may_fail:
            # Often it is the node that is slow, not the worker.
            node = next(iter(state.running.values())).node
            worker = min(idle, key=lambda w: w.node == node)
            idle.remove(worker)
            chosen.append((task, worker))
    return chosen


def running(
    table: Assignments, paces: Sequence[float], limits: Limits, now_s: float
) -> dict[str, list[Running]]:
    """Return ready worker -> the attempts that it has, the oldest first.

    Parameters
    ----------
    paces
        See `second_attempts`.
    """
    pace = usual_pace(paces, limits)
    least_s = min(limits.straggler_min_s, _SLOW_S)

    def seen(worker: Worker, attempt: Attempt, started_s: float) -> Running:
        usual_s = pace * max(1, table.tasks[attempt.task].task.cost_bytes)
        age_s = now_s - started_s
        is_slow = age_s > max(limits.straggler_factor * usual_s, least_s)
        return Running(attempt, age_s, worker.written_bytes.get(attempt, 0), is_slow)

    return {
        worker.name: [seen(worker, *begun) for begun in worker.running.items()]
        for worker in table.workers.values()
    }
