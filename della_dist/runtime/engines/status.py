"""How far a run is, worker by worker, and how much of its work is done."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from della_dist.planning.build import MergePlan
from della_dist.report.progress import ShardUnderWay, WorkerCounts, WorkerStatus
from della_dist.runtime.engines.scheduler import Scheduler


class Status:
    """What is committed and what is under way.

    Parameters
    ----------
    plan
        What is merged.
    costs_bytes
        Of every task of the run, what it takes (`Task.cost_bytes`), by number.
    name
        Returns what a person calls a worker.
    """

    def __init__(
        self, plan: MergePlan, costs_bytes: Mapping[int, int], name: Callable[[str], str]
    ) -> None:
        self._shards = plan.shards
        self._costs_bytes = costs_bytes
        self._name = name
        self._work_bytes = sum(costs_bytes.values())
        self._work_done_bytes = 0
        self._committed_bytes = 0

    def commit(self, task: int) -> None:
        """Note that a task is done."""
        self._work_done_bytes += self._costs_bytes[task]
        self._committed_bytes += self._shards[task].size_bytes

    def counts(self, scheduler: Scheduler) -> WorkerCounts:
        """Return the state of this moment."""
        rates = scheduler.bytes_per_s()
        shares: dict[int, float] = {}
        workers = []
        for worker, attempts in scheduler.running().items():
            under_way = []
            for running in attempts:
                task = running.attempt.task
                share = min(1.0, running.written_bytes / max(1, self._shards[task].size_bytes))
                shares[task] = max(shares.get(task, 0.0), share)
                name = self._shards[task].name
                under_way.append(
                    ShardUnderWay(
                        task, name, running.attempt.number, running.age_s, share, running.is_slow
                    )
                )
            workers.append(WorkerStatus(self._name(worker), rates[worker], tuple(under_way)))
        done = {t: share for t, share in shares.items() if not scheduler.is_committed(t)}
        merged_bytes = sum(int(share * self._shards[t].size_bytes) for t, share in done.items())
        work_bytes = sum(int(share * self._costs_bytes[t]) for t, share in done.items())
        return WorkerCounts(
            tuple(workers),
            scheduler.workers_lost,
            scheduler.tasks_retried,
            scheduler.stragglers,
            merged_bytes=self._committed_bytes + merged_bytes,
            work_done_bytes=self._work_done_bytes + work_bytes,
            work_bytes=self._work_bytes,
        )
