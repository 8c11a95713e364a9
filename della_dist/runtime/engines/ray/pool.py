"""The Ray engine: one actor a GPU or a group of CPU cores, on one machine or many.

Actors are neither restarted nor their calls repeated by Ray: the scheduling state knows what was
lost with one, and asks for another. Only this module, `connection` and
`metrics` import ray.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import RayError

from della_dist.errors import RunError
from della_dist.locations import absolute
from della_dist.planning.build import MergePlan
from della_dist.planning.memory import MemoryBudget
from della_dist.runtime.budget import IN_FLIGHT, connections, with_remote
from della_dist.runtime.engines.events import Attempt, Event, Limits, WorkerLost
from della_dist.runtime.engines.ray.address import reason_of
from della_dist.runtime.engines.ray.answers import Answers, Call, Death
from della_dist.runtime.engines.ray.connection import connect, lifeline
from della_dist.runtime.engines.ray.metrics import Phase, RunMetrics
from della_dist.runtime.engines.ray.sizing import BASELINE_BYTES, pool_shape
from della_dist.runtime.engines.ray.worker import (
    MergeWorker,
    TaskFailure,
    TaskSuccess,
    WorkerFacts,
    WorkerProgress,
    WorkerSetup,
    for_other_directories,
)
from della_dist.runtime.options import Device, RunOptions
from della_dist.runtime.output.commit import Output
from della_dist.runtime.task.merge import TaskRecord
from della_dist.runtime.task.meter import Meter

#: An actor that is ready is asked so often how far it is.
PROGRESS_S = 1.0
#: An answer that does not arrive within this time is lost with its worker.
FETCH_S = 60.0


_ray: Any = ray  # its stubs do not know concurrency groups


class _Actor(MergeWorker):
    """A `MergeWorker` that knows where it is, and answers questions while it merges.

    The groups are named here and not with the calls, which Ray Client (``ray://``) does not know.
    """

    @_ray.method(concurrency_group="control")  # type: ignore[untyped-decorator]
    def where(self) -> WorkerFacts:
        """Return who this worker is."""
        here = ray.get_runtime_context()
        return self.facts(here.get_node_id(), ",".join(here.get_accelerator_ids().get("GPU", [])))

    @_ray.method(concurrency_group="work")  # type: ignore[untyped-decorator]
    def merge(self, index: int, number: int) -> TaskSuccess | TaskFailure:
        """Merge and commit one shard."""
        return super().merge(index, number)

    @_ray.method(concurrency_group="control")  # type: ignore[untyped-decorator]
    def progress(self) -> WorkerProgress:
        """Return how far this worker is."""
        return super().progress()


class RayPool:
    """Actors of a Ray cluster; see `della_dist.runtime.engines.drive.Pool`. A context manager.

    Connects to a cluster, or starts one on this machine for as long as the pool is open.

    Parameters
    ----------
    plan, output
        What is merged, into what.
    options
        How.
    meter
        Told the bytes of all workers.

    Raises
    ------
    ConfigError
        If there is no cluster at the address, or it has nothing that can run an actor.
    RunError
        If a cluster answers there, but drops every connection.
    """

    engine = "ray"
    in_flight = IN_FLIGHT

    def __init__(
        self,
        plan: MergePlan,
        output: Output,
        options: RunOptions,
        meter: Meter,
        limits: Limits | None = None,
    ) -> None:
        self.limits = limits or Limits()
        self._meter = meter
        address = connect(options)
        try:
            self._lifeline = lifeline(address)
            self._shape = pool_shape(
                options,
                len(output.remaining),
                [node["Resources"] for node in ray.nodes() if node["Alive"]],
            )
            budget = with_remote(
                MemoryBudget(options.memory_bytes, IN_FLIGHT, self._shape.threads),
                plan,
                output.store.location,
                elsewhere=True,
            )
        except BaseException:
            ray.shutdown()
            raise
        self.num_starting = self._shape.num_workers
        self._plan = plan
        self._output = output
        # Actors without a GPU of their own leave those of their node alone.
        self._device: Device = options.device if self._shape.uses_gpu else "cpu"
        self._gpu_memory = options.gpu_memory
        self._budget = budget
        self._setup: Any = None
        self._actors: dict[str, Any] = {}
        self._calls: dict[Any, Call] = {}
        self._answers = Answers(_labels)
        self._num_named = 0
        self._asked_s = time.monotonic()
        self._metrics = RunMetrics(output.store.location)
        self._began_cpu_s = time.process_time()

    @property
    def peak_rss_bytes(self) -> int:
        """Peak resident set of the largest worker so far."""
        return self._answers.peak_rss_bytes()

    @property
    def cpu_s(self) -> float:
        """CPU time of this process since there is a pool, and of all its workers."""
        return time.process_time() - self._began_cpu_s + self._answers.cpu_s()

    def open(self) -> None:
        """Ask for the whole pool at once, which is what an autoscaler goes by."""
        self._setup = ray.put(
            WorkerSetup(
                for_other_directories(self._plan),
                absolute(self._output.store.shards_location),
                self._output.lease_token,
                self._device,
                self._budget,
                connections(self._budget),
                self._output.store.location,
                self._gpu_memory,
            )
        )
        for _ in range(self.num_starting):
            self.add_worker()

    def add_worker(self) -> None:
        """Ask for one more actor."""
        worker = str(self._num_named)
        self._num_named += 1
        actor = _REMOTE.options(
            num_cpus=self._shape.threads,
            num_gpus=1 if self._shape.uses_gpu else 0,
            memory=self._budget.allowed_mem + BASELINE_BYTES,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy="SPREAD",
        ).remote(self._setup)
        self._actors[worker] = actor
        call = actor.where.remote()
        self._calls[call] = Call("facts", worker)

    def start(self, worker: str, attempt: Attempt) -> None:
        """Begin an attempt."""
        if worker not in self._actors:
            return  # lost since the caller last knew; the event that says so is on its way
        call = self._actors[worker].merge.remote(attempt.task, attempt.number)
        self._calls[call] = Call("merge", worker, attempt)

    def stop(self, worker: str) -> None:
        """Kill an actor; what it still answers is not heard."""
        self._forget(worker)

    def poll(self, timeout_s: float) -> Sequence[Event]:
        """Wait for an actor to answer or to die; ask those alive how far they are.

        Raises
        ------
        RunError
            If the cluster is gone.
        """
        self._ask_progress()
        if missing := self._lifeline.missing():
            raise RunError(
                f"the Ray cluster is gone: nothing answers at {missing}. What was committed is "
                "kept. Run the same command again once there is a cluster: it continues."
            )
        ready, _ = ray.wait(list(self._calls), num_returns=1, timeout=timeout_s, fetch_local=False)
        if ready:  # whatever else is there by now
            ready, _ = ray.wait(
                list(self._calls), num_returns=len(self._calls), timeout=0, fetch_local=False
            )
        events = self._take_in(ready)
        moved = self._answers.total_bytes()
        self._meter.set_bytes(*moved)
        self._metrics.moved(*moved)
        return events

    def result(self, attempt: Attempt) -> TaskRecord:
        """Return the record of an attempt that finished."""
        return self._answers.result(attempt)

    def error(self, attempt: Attempt) -> Exception:
        """Return what an attempt failed with."""
        return self._answers.error(attempt)

    def name(self, worker: str) -> str:
        """Return what a person calls a worker."""
        return self._answers.name(worker)

    def _take_in(self, ready: Sequence[Any]) -> list[Event]:
        """Return what the answers say, and let go of the workers that died."""
        answered: list[tuple[Call, Any]] = []
        for ref in ready:
            call = self._calls.pop(ref)
            try:
                value = ray.get(ref, timeout=FETCH_S)
            except RayError as error:  # it died, its node did, its environment is broken
                value = Death(reason_of(error))
            answered.append((call, value))
        events = self._answers.take(answered)
        for event in events:
            if isinstance(event, WorkerLost):
                self._forget(event.worker)
        return events

    def _ask_progress(self) -> None:
        """Have one question on its way to every worker that is ready, now and then."""
        now_s = time.monotonic()
        if now_s - self._asked_s < PROGRESS_S:
            return
        self._metrics.workers(self._phases(), now_s - self._asked_s)
        self._asked_s = now_s
        asked = {c.worker for c in self._calls.values() if c.kind != "merge"}
        for worker, actor in self._actors.items():
            if worker not in asked:
                self._calls[actor.progress.remote()] = Call("progress", worker)

    def _phases(self) -> Counter[Phase]:
        """Return what the workers do, by their calls."""
        phases: dict[str, Phase] = dict.fromkeys(self._actors, "waiting")
        for call in self._calls.values():
            if call.kind == "facts":
                phases[call.worker] = "starting"
            elif call.kind == "merge":
                phases[call.worker] = "merging"
        return Counter(phases.values())

    def _forget(self, worker: str) -> None:
        actor = self._actors.pop(worker, None)
        # Without its head, or its client's connection, ray.kill would wait, or start a Ray anew.
        if actor is not None and ray.is_initialized() and self._lifeline.holds():
            with contextlib.suppress(ConnectionError):
                ray.kill(actor, no_restart=True)
        for ref in [ref for ref, call in self._calls.items() if call.worker == worker]:
            del self._calls[ref]

    def __enter__(self) -> RayPool:
        self._metrics.open()
        return self

    def __exit__(self, kind: object, exc: object, trace: object) -> None:
        with contextlib.ExitStack() as closing:
            closing.callback(ray.shutdown)
            closing.callback(self._metrics.close)
            for worker in list(self._actors):
                self._forget(worker)
        if isinstance(exc, RayError | ConnectionError):  # the latter is Ray Client's
            raise RunError(
                f"the Ray cluster failed, or the connection to it ({reason_of(exc)}). What was "
                "committed is kept. Run the same command again: it continues."
            ) from exc


_REMOTE = _ray.remote(concurrency_groups={"work": IN_FLIGHT, "control": 1})(_Actor)


def _labels(node: str) -> frozenset[str]:
    for found in ray.nodes():
        if found["NodeID"] == node:
            labels: Mapping[str, str] = found.get("Labels") or {}
            return frozenset(f"{key}={value}" for key, value in labels.items())
    return frozenset()
