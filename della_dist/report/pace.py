"""How fast a run goes, and when it will be done."""

from __future__ import annotations

import time
from collections import deque

from della_dist.report.progress import Snapshot, WorkerCounts

#: Throughput is that of the last seconds.
WINDOW_S = 10.0
#: The time left follows from what was done in the last seconds, or in the last half of the run.
LEAST_WINDOW_S = 60.0
#: Samples that are kept of the whole run; of more, every other one goes.
MAX_SAMPLES = 1024


class Pace:
    """What was done when, as far as it says how a run will go on.

    The time left is that of the bytes that are left to read and to write, work that counts as such
    included; never less than what the slowest shard that is under way still takes.
    """

    def __init__(self) -> None:
        now_s = time.monotonic()
        self._moved: deque[tuple[float, int]] = deque([(now_s, 0)])
        #: Time, and work done by then. The first is when work began.
        self._done: list[tuple[float, int]] = [(now_s, 0)]
        self._step_s = 0.0
        self._workers: WorkerCounts | None = None

    def add(self, now: Snapshot) -> None:
        """Take in how far the run is at this moment."""
        now_s = time.monotonic()
        self._moved.append((now_s, now.bytes_read + now.bytes_written))
        while len(self._moved) > 2 and now_s - self._moved[0][0] > WINDOW_S:
            self._moved.popleft()
        self._workers = now.workers
        done = 0 if now.workers is None else now.workers.work_done_bytes
        if not done:  # workers are starting: that says nothing of how they will go on
            self._done = [(now_s, 0)]
            return
        if now_s - self._done[-1][0] >= self._step_s:
            self._done.append((now_s, done))
        if len(self._done) > MAX_SAMPLES:
            self._done = self._done[::2]
            self._step_s = max(2 * self._step_s, 1.0)

    @property
    def bytes_per_s(self) -> float:
        """Bytes read and written a second."""
        (first_s, first), (last_s, last) = self._moved[0], self._moved[-1]
        return (last - first) / max(1e-9, last_s - first_s)

    @property
    def left_s(self) -> float | None:
        """Seconds until all is done; None where nobody knows."""
        if self._workers is None:
            return None
        last_s, last = self._done[-1]
        window_s = max(LEAST_WINDOW_S, (last_s - self._done[0][0]) / 2)
        first_s, first = next(s for s in self._done if last_s - s[0] <= window_s)
        if last <= first:
            return None
        left = self._workers.work_bytes - self._workers.work_done_bytes
        return max(left * (last_s - first_s) / (last - first), _slowest_s(self._workers))


def _slowest_s(workers: WorkerCounts) -> float:
    """Return what the slowest shard under way still takes, where that is known."""
    left_s: dict[int, float] = {}
    for worker in workers.workers:
        for shard in worker.shards:  # of two attempts, the first that is done counts
            left_s[shard.index] = min(shard.left_s, left_s.get(shard.index, shard.left_s))
    return max(left_s.values(), default=0.0)
