"""The local engine: worker threads of this process, which share one pool of compute threads."""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from della_dist.planning.build import MergePlan
from della_dist.runtime.budget import budget, connections, with_remote
from della_dist.runtime.engines.events import (
    Attempt,
    Event,
    Failed,
    Finished,
    Heard,
    Limits,
    WorkerReady,
)
from della_dist.runtime.options import RunOptions
from della_dist.runtime.output.commit import Output
from della_dist.runtime.task.backend import choose_backend, warm_up, with_backend
from della_dist.runtime.task.context import Cancelled, MergeContext
from della_dist.runtime.task.inputs import InputStores
from della_dist.runtime.task.merge import TaskRecord, merge_task
from della_dist.runtime.task.meter import Meter, peak_rss_bytes

#: What the workers have done is told so often.
HEARD_EVERY_S = 0.5


class LocalPool:
    """Threads of this process; see `della_dist.runtime.engines.drive.Pool`.

    Leaving it (it is a context manager) stops what still runs at its next block.

    Parameters
    ----------
    plan, output
        What is merged, into what.
    options
        How.
    meter
        Told what is read and written.

    Raises
    ------
    ConfigError
        If the options do not fit.
    """

    engine = "local"
    in_flight = 1
    #: Threads do not die or freeze on their own, and a second attempt would be no faster.
    limits = Limits(silence_s=math.inf, deadline_base_s=math.inf, straggler_min_s=math.inf)

    def __init__(self, plan: MergePlan, output: Output, options: RunOptions, meter: Meter) -> None:
        memory = with_remote(budget(options), plan, output.store.location)
        backend = choose_backend(options.device, memory, options.gpu_memory)
        memory = with_backend(memory, backend)
        self._compute = ThreadPoolExecutor(memory.threads, thread_name_prefix="compute")
        self._context = MergeContext(
            plan,
            backend,
            memory,
            self._compute,
            meter,
            threading.Event(),
            InputStores(connections(memory)),
        )
        self._output = output
        self._began_cpu_s = time.process_time()
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._results: dict[Attempt, TaskRecord] = {}
        self._errors: dict[Attempt, BaseException] = {}
        self.num_starting = memory.workers
        self._threads = ThreadPoolExecutor(self.num_starting, thread_name_prefix="worker")
        self._meters = {str(number): Meter(meter) for number in range(self.num_starting)}
        self._attempts: dict[str, tuple[Attempt, Meter]] = {}
        self._heard_s = 0.0

    @property
    def peak_rss_bytes(self) -> int:
        """Peak resident set of this process."""
        return peak_rss_bytes()

    @property
    def cpu_s(self) -> float:
        """CPU time of this process since there are workers."""
        return time.process_time() - self._began_cpu_s

    def open(self) -> None:
        """Load the kernels, and start the workers."""
        self._context.meter.enter("loading kernels")
        warm_up(self._context.backend, self._context.plan)
        for number in range(self.num_starting):
            self._events.put(WorkerReady(str(number)))

    def add_worker(self) -> None:
        """Do nothing: no thread is ever lost."""

    def start(self, worker: str, attempt: Attempt) -> None:
        """Begin an attempt."""
        meter = Meter(self._meters[worker])
        self._attempts[worker] = attempt, meter
        self._threads.submit(self._run, worker, attempt, replace(self._context, meter=meter))

    def stop(self, worker: str) -> None:
        """Do nothing: a thread without work is idle."""

    def poll(self, timeout_s: float) -> Sequence[Event]:
        """Wait for something to happen; say how far the workers are, now and then."""
        heard: Sequence[Event] = ()
        if (now_s := time.monotonic()) - self._heard_s >= HEARD_EVERY_S:
            self._heard_s = now_s
            heard = [self._heard(worker) for worker in self._meters]
        try:
            return [*heard, self._events.get(timeout=timeout_s)]
        except queue.Empty:
            return heard

    def _heard(self, worker: str) -> Heard:
        done = self._meters[worker].snapshot()
        written = {}
        if worker in self._attempts:
            attempt, meter = self._attempts[worker]
            written[attempt] = meter.snapshot().bytes_written
        return Heard(worker, done.bytes_read + done.bytes_written, written)

    def result(self, attempt: Attempt) -> TaskRecord:
        """Return the record of an attempt that finished."""
        return self._results.pop(attempt)

    def error(self, attempt: Attempt) -> BaseException:
        """Return what an attempt failed with."""
        return self._errors[attempt]

    def name(self, worker: str) -> str:
        """Return what a person calls a worker."""
        return f"worker {worker}"

    def _run(self, worker: str, attempt: Attempt, context: MergeContext) -> None:
        try:
            self._results[attempt] = merge_task(
                context, attempt.task, self._output.store, self._output.lease_token
            )
            self._events.put(Finished(worker, attempt))
        except Cancelled:
            return
        except BaseException as error:  # the driver raises it, whatever it is: nobody else would
            self._errors[attempt] = error
            # What may pass by itself was tried again for a while already, in this very process.
            text = str(error) or type(error).__name__
            self._events.put(Failed(worker, attempt, text, retryable=False))

    def __enter__(self) -> LocalPool:
        return self

    def __exit__(self, *_: object) -> None:
        self._context.cancelled.set()
        self._threads.shutdown(cancel_futures=True)
        self._compute.shutdown(cancel_futures=True)
