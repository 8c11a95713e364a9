"""What a run has done so far, counted by its threads and read by whoever shows it."""

from __future__ import annotations

import contextlib
import resource
import sys
import threading
import time
from pathlib import Path

from della_dist.report.progress import Snapshot, WorkerCounts
from della_dist.specs.history import Session


class Meter:
    """Thread-safe counts of a run, or of a part of it.

    Parameters
    ----------
    whole
        Of which this one is a part: bytes are counted there as well.
    """

    def __init__(self, whole: Meter | None = None) -> None:
        self._whole = whole
        self._lock = threading.Lock()
        self._began_s = time.time(), time.monotonic()
        self._phase = "starting"
        self._tasks_done = 0
        self._bytes_read = 0
        self._bytes_written = 0
        self._workers: WorkerCounts | None = None

    def enter(self, phase: str) -> None:
        """Say what the run does now."""
        with self._lock:
            self._phase = phase

    def read(self, num_bytes: int) -> None:
        """Count bytes of tensor data handed to a kernel."""
        with self._lock:
            self._bytes_read += num_bytes
        if self._whole is not None:
            self._whole.read(num_bytes)

    def wrote(self, num_bytes: int) -> None:
        """Count bytes of tensor data written."""
        with self._lock:
            self._bytes_written += num_bytes
        if self._whole is not None:
            self._whole.wrote(num_bytes)

    def set_bytes(self, num_read: int, num_written: int) -> None:
        """State the bytes of a run whose workers are other processes."""
        with self._lock:
            self._bytes_read = num_read
            self._bytes_written = num_written

    def set_workers(self, workers: WorkerCounts) -> None:
        """State how the workers fare."""
        with self._lock:
            self._workers = workers

    def finished_task(self) -> None:
        """Count a committed task."""
        with self._lock:
            self._tasks_done += 1

    @property
    def elapsed_s(self) -> float:
        """Seconds since the run began."""
        return time.monotonic() - self._began_s[1]

    def session(self, engine: str, cpu_s: float) -> Session:
        """Return what there is to be kept of the run as it stands.

        Parameters
        ----------
        engine
            What runs it.
        cpu_s
            CPU time that it took.
        """
        now = self.snapshot()
        workers = now.workers or WorkerCounts()
        return Session(
            began_s=self._began_s[0],
            engine=engine,
            elapsed_s=self.elapsed_s,
            cpu_s=cpu_s,
            bytes_read=now.bytes_read,
            bytes_written=now.bytes_written,
            workers_lost=workers.workers_lost,
            tasks_retried=workers.tasks_retried,
            stragglers=workers.stragglers,
        )

    def snapshot(self) -> Snapshot:
        """Return the counts of this moment."""
        with self._lock:
            return Snapshot(
                self._phase,
                self._tasks_done,
                self._bytes_read,
                self._bytes_written,
                self._workers,
            )


class TaskMeter:
    """Thread-safe count of what one task reads, which is part of what the run does."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._lock = threading.Lock()
        self.bytes_read = 0

    def read(self, num_bytes: int) -> None:
        """Count bytes of tensor data handed to a kernel."""
        self._meter.read(num_bytes)
        with self._lock:
            self.bytes_read += num_bytes


def peak_rss_bytes() -> int:
    """Return the peak resident set of this process, in bytes."""
    # Not getrusage where it can be helped: exec keeps its peak, so that a process would count what
    # the one it was forked from (a test run, a notebook) held at that moment.
    with contextlib.suppress(OSError):
        if peak := high_water_bytes("self"):
            return peak
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def high_water_bytes(process: int | str) -> int:
    """Return the peak resident set of a process by its number, in bytes; 0 once it has ended.

    Raises
    ------
    OSError
        If there is no such process, or the system is not Linux.
    """
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    return 0
