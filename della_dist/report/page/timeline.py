"""Throughput and workers over the time of a run, and how both are found from its record."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from della_dist.report.page.pictures import (
    INK,
    NOTHING,
    ROW_HEIGHT,
    Picture,
    draw_cells,
    draw_scale,
    new_figure,
)
from della_dist.report.text import format_bytes, format_seconds
from della_dist.specs.history import History, ShardRun

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Steps of time that all sessions together have, about.
MOST_STEPS = 120
#: Sessions that are shown; the latest.
MOST_SESSIONS = 24
#: Workers that are shown; the first.
MOST_WORKERS = 1024
#: Inches that their rows have together, at most.
_HEIGHT = 5.0
_MOST_NAMED = 42
#: Columns between two sessions.
_GAP = 3
_READ, _WRITTEN = "#3b82c4", "#d0731a"


@dataclass(frozen=True, slots=True)
class Step:
    """A short time of a session."""

    session: int
    """Index among the sessions."""
    start_s: float
    """Since the session began."""
    stop_s: float


@dataclass(frozen=True, slots=True)
class Timeline(Picture):
    """What was read and written, and what each worker did."""

    steps: Sequence[Step]
    read: Sequence[float]
    """Bytes a second in each step."""
    written: Sequence[float]
    workers: Sequence[str]
    busy: Sequence[Sequence[float]]
    """Shards that a worker was merging, in the mean over each step."""
    pauses: Sequence[tuple[int, float]]
    """Steps before which there was nothing, and for how many seconds."""

    def numbers(self) -> tuple[Sequence[str], Iterable[Sequence[str]]]:
        """Return a row a step."""
        heads = ["session, time", "read a second", "written a second", "shards being merged"]
        return heads, (
            [
                f"{step.session + 1}, {short_time(step.start_s)}",
                format_bytes(self.read[i]),
                format_bytes(self.written[i]),
                f"{sum(row[i] for row in self.busy):.1f}",
            ]
            for i, step in enumerate(self.steps)
        )

    def draw(self) -> Figure:
        """Return the figure."""
        import numpy as np

        columns = self._columns()
        height = min(ROW_HEIGHT * len(self.workers), _HEIGHT)
        figure = new_figure(height + 2.8)
        above, below = figure.subplots(2, sharex=True, height_ratios=[1.3, height + 0.15])
        busy = np.full((len(self.workers), columns[-1] + 1), np.nan)
        busy[:, columns] = self.busy
        highest = max(1.0, float(np.nanmax(busy, initial=0.0)))
        busy[busy == 0] = np.nan
        image = draw_cells(below, busy, self.workers, (0.0, highest), _MOST_NAMED)
        draw_scale(below, image, is_share=False, label="shards being merged; idle is blank")
        self._draw_rates(above, columns)
        self._label(above, below, columns)
        return figure

    def _columns(self) -> list[int]:
        """Return where each step is drawn."""
        starts = {at for at, _ in self.pauses}
        gaps = 0
        columns = []
        for i in range(len(self.steps)):
            gaps += _GAP * (i in starts)
            columns.append(i + gaps)
        return columns

    def _draw_rates(self, axes: Axes, columns: Sequence[int]) -> None:
        import numpy as np
        from matplotlib.ticker import FuncFormatter, MaxNLocator

        edges = np.arange(columns[-1] + 2) - 0.5
        for rates, color, line, label in (
            (self.read, _READ, "-", "read"),
            (self.written, _WRITTEN, (0, (2, 1)), "written"),
        ):
            drawn = np.full(columns[-1] + 1, np.nan)
            drawn[columns] = rates
            axes.stairs(drawn, edges, baseline=None, color=color, linestyle=line, label=label)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{format_bytes(value)}/s"))
        axes.legend(frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 1), borderpad=0)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)

    def _label(self, above: Axes, below: Axes, columns: Sequence[int]) -> None:
        """Name some of the times, and say how long nothing happened."""
        total = sum(step.stop_s - step.start_s for step in self.steps)
        unit, seconds = next(
            (one for one in _UNITS if total < 180 * one[1]), _UNITS[-1]
        )  # as many as are read at a glance
        every = _round(total / seconds / 6)
        ticks: list[float] = []
        labels = []
        for column, step in zip(columns, self.steps, strict=True):
            width = step.stop_s - step.start_s
            mark = math.ceil(step.start_s / seconds / every - 1e-9) * every
            is_free = not ticks or column - ticks[-1] > columns[-1] / 14  # a label is so wide
            if mark * seconds < step.start_s + width - 1e-9 and is_free:
                ticks.append(column - 0.5 + (mark * seconds - step.start_s) / width)
                labels.append(f"{mark:g}")
        below.set_xticks(ticks, labels)
        below.set_xlabel(f"{unit} since the session began")
        below.tick_params(axis="x", which="both", bottom=True)
        said = -math.inf
        for at, pause_s in self.pauses:
            middle = columns[at] - (_GAP + 1) / 2
            for axes in (above, below):
                axes.axvline(middle, color=INK, linewidth=0.8, linestyle=":")
            if middle - said < columns[-1] / 5:
                continue
            said = middle
            above.text(
                middle,
                -0.07,
                f"{_spoken(pause_s)} later",
                transform=above.get_xaxis_transform(),
                ha="center",
                va="top",
                fontsize=7,
            )


_UNITS = (("milliseconds", 1e-3), ("seconds", 1.0), ("minutes", 60.0), ("hours", 3600.0))


def timeline(history: History) -> Timeline | None:
    """Return the picture of a run; None where nothing of it has any duration."""
    shown = range(max(0, len(history.sessions) - MOST_SESSIONS), len(history.sessions))
    length = {i: history.sessions[i].elapsed_s for i in shown}
    total = sum(length.values())
    runs = [run for run in history.shards if run.session in length and run.end_s > run.start_s]
    if not total or not runs:
        return None
    width = total / MOST_STEPS
    steps: list[Step] = []
    firsts: dict[int, int] = {}
    for i in shown:
        firsts[i] = len(steps)
        count = max(1, math.ceil(length[i] / width - 1e-6))
        steps += [
            Step(i, k * width, min((k + 1) * width, length[i]) or width) for k in range(count)
        ]
    named = _named(runs)
    busy = {name: [0.0] * len(steps) for name in named.values()}
    read, written = [0.0] * len(steps), [0.0] * len(steps)
    for run in runs:
        first = firsts[run.session]
        last = firsts.get(run.session + 1, len(steps)) - 1
        at = min(last, first + int(run.start_s / width))
        while at <= last and steps[at].start_s < run.end_s:
            step = steps[at]
            within_s = max(0.0, min(run.end_s, step.stop_s) - max(run.start_s, step.start_s))
            length_s = step.stop_s - step.start_s
            share = within_s / (run.end_s - run.start_s) / length_s
            busy[named[run.session, run.worker]][at] += within_s / length_s
            read[at] += share * run.spent.bytes_read
            written[at] += share * run.bytes_written
            at += 1
    says = "Bytes of tensors read and written a second, and how many shards each worker was merging"
    says += "; those of a shard are spread evenly over the time that it took."
    if len(busy) > MOST_WORKERS:
        says += f" The first {MOST_WORKERS:,} of {len(busy):,} workers."
    if len(shown) < len(history.sessions):
        says += f" Of {len(history.sessions):,} sessions the latest {len(shown)}."
    chosen = list(busy)[:MOST_WORKERS]
    return Timeline(
        "timeline",
        "Throughput and workers over time",
        says,
        steps,
        read,
        written,
        chosen,
        [busy[name] for name in chosen],
        [(firsts[i], pause_before(history, i)) for i in shown if i > shown.start],
    )


def _named(runs: Sequence[ShardRun]) -> dict[tuple[int, str], str]:
    """Return by session and worker what its row is called, in order of the workers' numbers.

    A row is for one number: that of another session may have been on another node.
    """
    numbers = {key: key[1].partition(" ")[0] for key in {(run.session, run.worker) for run in runs}}
    full: dict[str, set[str]] = {}
    for (_, worker), number in numbers.items():
        full.setdefault(number, set()).add(worker)
    keys = sorted(numbers, key=lambda key: (len(numbers[key]), numbers[key], key))
    return {
        key: f"worker {key[1] if len(full[numbers[key]]) == 1 else numbers[key]}" for key in keys
    }


def pause_before(history: History, session: int) -> float:
    """Return for how many seconds nothing happened before a session; 0 of clocks that were set."""
    before, now = history.sessions[session - 1], history.sessions[session]
    return max(0.0, now.began_s - before.began_s - before.elapsed_s)


def short_time(seconds: float) -> str:
    """Return a time of a run, which may be that of a small model."""
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else format_seconds(seconds)


def _spoken(seconds: float) -> str:
    for name, length in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.0f} {name}"
    return f"{seconds:.0f} s" if seconds >= 1 else NOTHING


def _round(value: float) -> float:
    """Return the least of 1, 2 and 5 times a power of ten that is not smaller."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= value)
