"""Progress of a run on a terminal, or as occasional lines elsewhere. Written to stderr."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from della_dist.report.text import format_bytes, format_seconds, note_lines, terminal_width
from della_dist.wording import plural

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

#: Seconds between looks at the counts.
REFRESH_S = 0.2
#: Seconds between lines where the output is not a terminal.
LINE_EVERY_S = 10.0
#: Throughput is that of the last seconds.
WINDOW_S = 10.0


@dataclass(frozen=True, slots=True)
class WorkerCounts:
    """The workers of a run at one moment."""

    bytes_per_s: tuple[float, ...] = ()
    """Of every worker that is alive: read and written."""
    workers_lost: int = 0
    tasks_retried: int = 0
    stragglers: int = 0
    """Tasks that were started a second time because the first attempt took long."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A run at one moment."""

    phase: str
    """``starting``, ``loading kernels``, ``merging``, and last ``finishing``."""
    tasks_done: int
    bytes_read: int
    bytes_written: int
    workers: WorkerCounts | None = None
    """None until the first have begun."""


@dataclass(frozen=True, slots=True)
class Goal:
    """What the run has to do, beginning with what an earlier one left done."""

    num_tasks: int
    tasks_resumed: int
    bytes_to_write: int
    """Still to be written by this run."""
    bytes_resumed: int = 0
    """Written by earlier ones."""
    notes: tuple[str, ...] = ()
    """What a person should know before it starts."""
    stage: str = ""
    """Which merge of several this is."""

    @property
    def total_bytes(self) -> int:
        """All that the output will have; at least 1, to be divided by."""
        return max(1, self.bytes_resumed + self.bytes_to_write)

    def done_bytes(self, now: Snapshot) -> int:
        """Return how much of that is written; a task that is repeated counts once."""
        return min(self.total_bytes, self.bytes_resumed + now.bytes_written)


#: Called once before the work starts, with what there is to do and a look at what is done.
Watch: TypeAlias = Callable[[Goal, Callable[[], Snapshot]], None]


class ProgressDisplay:
    """Shows a run until it is left. Use as a context manager, and call `watch` when it starts.

    Parameters
    ----------
    quiet
        Whether nothing is shown.
    line_every_s, refresh_s
        How often a line is written where there is no terminal, and the bar drawn where there is.
    """

    def __init__(
        self, *, quiet: bool, line_every_s: float = LINE_EVERY_S, refresh_s: float = REFRESH_S
    ) -> None:
        self._quiet = quiet
        self._line_every_s = line_every_s
        self._refresh_s = refresh_s
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._print: Callable[[str], None] | None = None
        """How a line gets above the bar, while there is one."""

    def __enter__(self) -> ProgressDisplay:
        return self

    def say(self, line: str) -> None:
        """Show a line for good, above whatever moves."""
        if self._quiet:
            return
        with self._lock:
            if self._print is not None:
                self._print(line)
            else:
                sys.stderr.write(f"{line}\n")
                sys.stderr.flush()

    def __exit__(self, *_: object) -> None:
        self._end()

    def _end(self) -> None:
        """Show no more of what is shown."""
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._thread = None
            self._stop.clear()

    def watch(self, goal: Goal, snapshot: Callable[[], Snapshot]) -> None:
        """Show the run described by `goal`, looking at it through `snapshot` from time to time.

        Of several merges, each is shown in the place of the one before.
        """
        if self._quiet:
            return
        self._end()
        if goal.stage:
            sys.stderr.write(f"{goal.stage}\n")
        if goal.tasks_resumed:
            sys.stderr.write(
                f"continuing: {goal.tasks_resumed} of {goal.num_tasks} shards are done already\n"
            )
        for line in note_lines(goal.notes, terminal_width(sys.stderr)):
            sys.stderr.write(f"{line}\n")
        show = self._show_bar if sys.stderr.isatty() else self._show_lines
        self._thread = threading.Thread(target=show, args=(goal, snapshot), daemon=True)
        self._thread.start()

    def _show_lines(self, goal: Goal, snapshot: Callable[[], Snapshot]) -> None:
        rate = _Rate()
        while not self._stop.wait(self._line_every_s):
            now = snapshot()
            rate.add(now.bytes_read + now.bytes_written, now.bytes_written)
            percent = 100 * goal.done_bytes(now) / goal.total_bytes
            done = goal.tasks_resumed + now.tasks_done
            sys.stderr.write(
                f"{now.phase}: {percent:.0f} %, {done}/{goal.num_tasks} shards, "
                f"{format_bytes(rate.bytes_per_s)}/s, {_left(goal, now, rate)}"
                f"{_workers(now.workers, ', ')}\n"
            )
            sys.stderr.flush()

    def _show_bar(self, goal: Goal, snapshot: Callable[[], Snapshot]) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        rate = _Rate()
        progress = Progress(
            TextColumn("{task.description:<15}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("{task.fields[detail]}"),
            console=Console(stderr=True),
            auto_refresh=False,
            transient=True,
        )
        with progress, self._lines_above(progress):
            done = goal.done_bytes(snapshot())
            bar = progress.add_task("starting", total=goal.total_bytes, completed=done, detail="")
            while not self._stop.wait(self._refresh_s):
                self._refresh(progress, bar, goal, snapshot(), rate)

    @contextlib.contextmanager
    def _lines_above(self, progress: RichProgress) -> Iterator[None]:
        with self._lock:
            self._print = lambda line: progress.console.print(line, markup=False, highlight=False)
        try:
            yield
        finally:
            with self._lock:
                self._print = None

    @staticmethod
    def _refresh(
        progress: RichProgress, bar: TaskID, goal: Goal, now: Snapshot, rate: _Rate
    ) -> None:
        rate.add(now.bytes_read + now.bytes_written, now.bytes_written)
        done = goal.tasks_resumed + now.tasks_done
        progress.update(
            bar,
            description=now.phase,
            completed=goal.done_bytes(now),
            detail=f"{done}/{goal.num_tasks} shards  {format_bytes(rate.bytes_per_s)}/s  "
            f"{_left(goal, now, rate)}{_workers(now.workers, '  ')}",
        )
        progress.refresh()


class _Rate:
    """Throughput over the last seconds."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int, int]] = deque([(time.monotonic(), 0, 0)])

    def add(self, moved_bytes: int, written_bytes: int) -> None:
        now_s = time.monotonic()
        self._samples.append((now_s, moved_bytes, written_bytes))
        while len(self._samples) > 2 and now_s - self._samples[0][0] > WINDOW_S:
            self._samples.popleft()

    def _per_s(self, index: int) -> float:
        first, last = self._samples[0], self._samples[-1]
        return (last[index] - first[index]) / max(1e-9, last[0] - first[0])

    @property
    def bytes_per_s(self) -> float:
        """Bytes read and written a second."""
        return self._per_s(1)

    @property
    def written_per_s(self) -> float:
        """Bytes written a second."""
        return self._per_s(2)


def _left(goal: Goal, now: Snapshot, rate: _Rate) -> str:
    if rate.written_per_s <= 0:
        return "time left unknown"
    return f"{format_seconds((goal.bytes_to_write - now.bytes_written) / rate.written_per_s)} left"


def _workers(workers: WorkerCounts | None, separator: str) -> str:
    """Return how the workers fare, after a separator; nothing where there are none."""
    if workers is None:
        return ""
    rates = workers.bytes_per_s
    parts = [plural(len(rates), "worker")]
    if any(rates):
        slowest, fastest = format_bytes(min(rates)), format_bytes(max(rates))
        parts[0] += f" ({slowest}/s" + (f" to {fastest}/s)" if len(rates) > 1 else ")")
    for count, what in (
        (workers.workers_lost, "lost"),
        (workers.tasks_retried, "retried"),
        (workers.stragglers, "slow"),
    ):
        if count:
            parts.append(f"{count} {what}")
    return separator + ", ".join(parts)
