"""What one worker process of a cluster does: merge tasks, and say how far it is."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from della_dist.errors import (
    ConfigError,
    DellaDistError,
    FaultError,
    OutputError,
    RunError,
    StorageError,
)
from della_dist.locations import absolute, is_url
from della_dist.planning.build import MergePlan
from della_dist.planning.memory import MemoryBudget
from della_dist.report.failures import fault_message
from della_dist.runtime.options import Device
from della_dist.runtime.task.backend import choose_backend, warm_up, with_backend
from della_dist.runtime.task.blas import arithmetic, one_blas_thread
from della_dist.runtime.task.context import MergeContext
from della_dist.runtime.task.inputs import InputStores, any_remote
from della_dist.runtime.task.merge import TaskRecord, merge_task
from della_dist.runtime.task.meter import Meter, peak_rss_bytes
from della_dist.specs.checkpoint import CheckpointIndex
from della_dist.storage.libc import free_large_buffers_at_once
from della_dist.storage.opening import open_output_store

log = logging.getLogger("della_dist.worker")


@dataclass(frozen=True, slots=True)
class WorkerSetup:
    """Everything a worker is told once."""

    plan: MergePlan
    out: str
    """Where it writes shards (`OutputStore.shards_location`)."""
    lease_token: str
    device: Device
    budget: MemoryBudget
    connections: int
    location: str = ""
    """Of the output, where that is elsewhere."""
    gpu_memory: int | None = None
    """Bytes that may be used of its GPU; None: a share of what is free there."""


@dataclass(frozen=True, slots=True)
class WorkerFacts:
    """Who a worker is."""

    node: str
    host: str
    pid: int
    gpu: str = ""
    """Which one of the node is its own, as Ray numbers them; empty where none is."""


@dataclass(frozen=True, slots=True)
class WorkerProgress:
    """How far a worker is."""

    bytes_read: int
    bytes_written: int
    peak_rss_bytes: int
    cpu_s: float
    """Of its process."""
    written_bytes: Mapping[tuple[int, int], int] = field(default_factory=dict)
    """Shard and attempt that run -> what is written of it."""


@dataclass(frozen=True, slots=True)
class TaskSuccess:
    """A shard that is committed in the store."""

    record: TaskRecord
    progress: WorkerProgress
    """Of the worker by then, so that the counts of a run are whole at its end."""


@dataclass(frozen=True, slots=True)
class TaskFailure:
    """Why an attempt came to nothing."""

    error: DellaDistError
    retryable: bool


def for_other_directories(plan: MergePlan) -> MergePlan:
    """Return `plan` with locations that mean the same in the working directory of a worker."""

    def moved(checkpoint: CheckpointIndex) -> CheckpointIndex:
        return replace(checkpoint, location=absolute(checkpoint.location))

    return replace(
        plan,
        base=None if plan.base is None else moved(plan.base),
        experts=tuple(map(moved, plan.experts)),
        others=tuple(map(moved, plan.others)),
    )


class MergeWorker:
    """Merges the tasks it is given, several at once, in threads that the caller provides."""

    def __init__(self, setup: WorkerSetup) -> None:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
        if is_url(setup.out) or any_remote(setup.plan) or setup.plan.config.method.is_balanced:
            free_large_buffers_at_once()
        self._blas = one_blas_thread(setup.plan)
        self._blas.__enter__()  # for as long as this process lives
        self._setup = setup
        self._other_kind = _other_kind(setup.plan)
        self._store = open_output_store(setup.out)
        self._meter = Meter()
        self._running: dict[tuple[int, int], Meter] = {}
        backend = choose_backend(setup.device, setup.budget, setup.gpu_memory)
        warm_up(backend, setup.plan)
        self._context = MergeContext(
            setup.plan,
            backend,
            with_backend(setup.budget, backend),
            ThreadPoolExecutor(setup.budget.threads, thread_name_prefix="compute"),
            self._meter,
            threading.Event(),
            InputStores(setup.connections, planned_elsewhere=True),
        )

    def facts(self, node: str, gpu: str = "") -> WorkerFacts:
        """Return who this worker is; answers once it is ready for tasks."""
        return WorkerFacts(node, socket.gethostname(), os.getpid(), gpu)

    def merge(self, index: int, number: int) -> TaskSuccess | TaskFailure:
        """Merge and commit one shard.

        Parameters
        ----------
        index
            Of the shard.
        number
            Of the attempt.
        """
        unusable = self._other_kind or self._not_shared()
        if unusable is not None:
            return TaskFailure(unusable, retryable=False)
        name = self._setup.plan.shards[index].name
        log.info("%s, attempt %d, begins on %s", name, number, socket.gethostname())
        meter = self._running[index, number] = Meter(self._meter)
        context = replace(self._context, meter=meter)
        try:
            record = merge_task(context, index, self._store, self._setup.lease_token)
        except DellaDistError as error:
            log.warning("%s, attempt %d, failed: %s", name, number, error)
            return TaskFailure(error, isinstance(error, StorageError))
        except (OSError, MemoryError) as error:
            log.exception("%s, attempt %d, failed", name, number)
            text = f"{type(error).__name__}: {error}"
            return TaskFailure(RunError(f"merging {name} failed: {text}"), retryable=False)
        except Exception as error:
            log.exception("%s, attempt %d, failed", name, number)
            host = f"which the log of the worker on {socket.gethostname()} has"
            return TaskFailure(FaultError(fault_message(error, host)), retryable=False)
        finally:
            del self._running[index, number]
        log.info("%s, attempt %d, is committed", name, number)
        return TaskSuccess(record, self.progress())

    def _not_shared(self) -> OutputError | None:
        """Return the error for a node that does not see the folder from which is uploaded."""
        setup = self._setup
        if is_url(setup.out) or not is_url(setup.location) or self._store.has_state():
            return None
        return OutputError(
            f"{socket.gethostname()} does not see {setup.out}, from where the driver uploads to "
            f"{setup.location}. Name a folder on a disk that all nodes share with --staging, or "
            "leave out --engine ray."
        )

    def progress(self) -> WorkerProgress:
        """Return how far this worker is; answers while it merges."""
        now = self._meter.snapshot()
        running = list(self._running.items())  # other threads begin and end some
        written = {attempt: meter.snapshot().bytes_written for attempt, meter in running}
        cpu_s = time.process_time()
        return WorkerProgress(now.bytes_read, now.bytes_written, peak_rss_bytes(), cpu_s, written)


def _other_kind(plan: MergePlan) -> ConfigError | None:
    """Return the error for a machine whose last digits would not be those that were planned."""
    if not plan.arithmetic or (own := arithmetic()) == plan.arithmetic:
        return None
    different = [
        f"{what} is {own.get(what)} there, and {planned} where the driver runs"
        for what, planned in plan.arithmetic.items()
        if own.get(what) != planned
    ]
    return ConfigError(
        f"{socket.gethostname()}, where a worker runs, is another kind of machine than the "
        f"driver's: {'; '.join(different)}. Last digits of the singular values of "
        f"{plan.config.merge_method} hang on that. Run the driver and all workers on machines of "
        "one kind, with the same packages; what was committed is kept."
    )
