"""A run that is under way, on a terminal: the bar, and below it the workers."""

from __future__ import annotations

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from della_dist.report.pace import Pace
from della_dist.report.progress import Goal, Snapshot
from della_dist.report.progress_text import percent, time_left, totals, worker_lines

#: Lines of the terminal that the workers leave free: the bar, the totals, and some of what was
#: said before.
_OTHER_LINES = 6


def terminal() -> Console | None:
    """Return the terminal that stderr is; None where nothing can move there.

    Rich goes by ``TERM``, ``NO_COLOR``, ``FORCE_COLOR``, and others.
    """
    console = Console(stderr=True)
    return console if console.is_interactive else None


def live(console: Console) -> Live:
    """Return what draws on a terminal, and leaves nothing behind."""
    return Live(console=console, auto_refresh=False, transient=True)


def bar_of(goal: Goal, now: Snapshot, pace: Pace, console: Console) -> RenderableType:
    """Return what is drawn of a run."""
    bar = Table.grid(padding=(0, 2, 0, 0), expand=True)
    for how in ({"no_wrap": True}, {"ratio": 1}, {"no_wrap": True}, {"no_wrap": True}):
        bar.add_column(**how)
    share = percent(goal, now)
    bar.add_row(now.phase, ProgressBar(completed=share), f"{share:.0f} %", time_left(pace))
    drawn: list[RenderableType] = [bar, Text(totals(goal, now, pace))]
    if now.workers is not None:
        room = max(0, console.height - _OTHER_LINES)
        lines = worker_lines(now.workers.workers, room, console.width)
        drawn += [
            Text(line, style="yellow" if is_slow else "", no_wrap=True, overflow="ellipsis")
            for line, is_slow in lines
        ]
    return Group(*drawn)
