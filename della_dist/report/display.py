"""Shows a run: on a terminal with its workers, elsewhere as a line now and then. All on stderr."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from della_dist.report.pace import Pace
from della_dist.report.progress import Goal, Snapshot
from della_dist.report.progress_text import progress_line
from della_dist.report.text import note_lines, terminal_width

if TYPE_CHECKING:
    from rich.console import Console

#: Seconds between looks at the counts.
REFRESH_S = 0.25
#: Seconds between lines where the output is not a terminal.
LINE_EVERY_S = 10.0


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
        console = None
        if sys.stderr.isatty():
            from della_dist.report.progress_bar import terminal

            console = terminal()
        show = self._show_lines if console is None else partial(self._show_bar, console)
        self._thread = threading.Thread(target=show, args=(goal, snapshot), daemon=True)
        self._thread.start()

    def _show_lines(self, goal: Goal, snapshot: Callable[[], Snapshot]) -> None:
        pace = Pace()
        while not self._stop.wait(self._line_every_s):
            now = snapshot()
            pace.add(now)
            sys.stderr.write(f"{progress_line(goal, now, pace)}\n")
            sys.stderr.flush()

    def _show_bar(self, console: Console, goal: Goal, snapshot: Callable[[], Snapshot]) -> None:
        from della_dist.report.progress_bar import bar_of, live

        pace = Pace()
        with live(console) as shown, self._lines_above(console):
            while not self._stop.wait(self._refresh_s):
                now = snapshot()
                pace.add(now)
                shown.update(bar_of(goal, now, pace, console), refresh=True)

    @contextlib.contextmanager
    def _lines_above(self, console: Console) -> Iterator[None]:
        with self._lock:
            self._print = lambda line: console.print(line, markup=False, highlight=False)
        try:
            yield
        finally:
            with self._lock:
                self._print = None
