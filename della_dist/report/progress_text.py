"""What is said of a run that is under way."""

from __future__ import annotations

from collections.abc import Sequence

from della_dist.report.pace import Pace
from della_dist.report.progress import Goal, ShardUnderWay, Snapshot, WorkerCounts, WorkerStatus
from della_dist.report.text import format_bytes, format_seconds
from della_dist.wording import few, plural

#: So many workers are shown one by one; of more, the slowest few.
MAX_WORKERS = 8
NUM_SLOWEST = 4
#: Slow workers that a line names.
NUM_NAMED = 2


def progress_line(goal: Goal, now: Snapshot, pace: Pace) -> str:
    """Return a run as one line."""
    parts = [
        f"{now.phase}: {percent(goal, now):.0f} %",
        _shards(goal, now),
        f"{format_bytes(pace.bytes_per_s)}/s",
        time_left(pace),
        *_workers(now.workers, spread=True),
    ]
    return ", ".join(parts) + _slow_ones(now.workers)


def totals(goal: Goal, now: Snapshot, pace: Pace) -> str:
    """Return what is done of a run, and by how many."""
    parts = [
        f"{format_bytes(goal.done_bytes(now))} of {format_bytes(goal.total_bytes)}",
        _shards(goal, now),
        f"{format_bytes(pace.bytes_per_s)}/s",
        *_workers(now.workers, spread=False),
    ]
    return ", ".join(parts)


def percent(goal: Goal, now: Snapshot) -> float:
    """Return how much of the output is written."""
    return 100 * goal.done_bytes(now) / goal.total_bytes


def time_left(pace: Pace) -> str:
    """Return when the run will be done."""
    left_s = pace.left_s
    return "time left unknown" if left_s is None else f"{format_seconds(left_s)} left"


def _shards(goal: Goal, now: Snapshot) -> str:
    return f"{goal.tasks_resumed + now.tasks_done}/{goal.num_tasks} shards"


def _workers(workers: WorkerCounts | None, *, spread: bool) -> list[str]:
    """Return how the workers fare; nothing where there are none."""
    if workers is None:
        return []
    rates = workers.bytes_per_s
    parts = [plural(len(rates), "worker")]
    if spread and any(rates):
        parts[0] += f" ({_spread(workers.workers)})"
    num_slow = sum(worker.is_slow for worker in workers.workers)
    for count, what in (
        (num_slow, "slow"),
        (workers.workers_lost, "lost"),
        (workers.tasks_retried, "retried"),
        (workers.stragglers, "started twice"),
    ):
        if count:
            parts.append(f"{count} {what}")
    return parts


def _spread(workers: Sequence[WorkerStatus]) -> str:
    """Return the rates of workers, from the least to the most."""
    rates = [worker.bytes_per_s for worker in workers]
    slowest, fastest = format_bytes(min(rates)), format_bytes(max(rates))
    return f"{slowest}/s" if slowest == fastest else f"{slowest}/s to {fastest}/s"


def _slow_ones(workers: WorkerCounts | None) -> str:
    """Return who takes unusually long with what, at the end of a line."""
    found = [
        f"{worker.name} has {_shard(shard)}"
        for worker in (() if workers is None else workers.workers)
        for shard in worker.shards
        if shard.is_slow
    ]
    return f"; slow: {few(found, NUM_NAMED, separator=', ')}" if found else ""


def _shard(shard: ShardUnderWay) -> str:
    share = f"{100 * shard.share:.0f} %"
    return f"shard {shard.index + 1} ({share} in {format_seconds(shard.age_s)})"


def worker_lines(
    workers: Sequence[WorkerStatus], num_lines: int, width: int
) -> list[tuple[str, bool]]:
    """Return a line for each worker, or for the slowest few and all others; and which are slow.

    Parameters
    ----------
    workers
        All of them.
    num_lines, width
        That there is room for.
    """
    if len(workers) <= min(num_lines, MAX_WORKERS):
        shown, rest = list(workers), []
    else:
        slowest = sorted(workers, key=_slowest_first)
        count = max(0, min(num_lines - 1, NUM_SLOWEST))
        shown, rest = slowest[:count], slowest[count:]
    rows = [(f"{format_bytes(w.bytes_per_s)}/s", _doing(w), _since(w)) for w in shown]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    room = max(8, width - sum(widths) - 8)
    names = [_cut(worker.name, room) for worker in shown]
    longest = max(map(len, names), default=0)
    lines = [
        (
            f"  {name:<{longest}}  {rate:>{widths[0]}}  {doing:<{widths[1]}}  {since}".rstrip(),
            worker.is_slow,
        )
        for worker, name, (rate, doing, since) in zip(shown, names, rows, strict=True)
    ]
    if rest and num_lines:
        lines.append((f"  {len(rest)} {'more' if shown else 'workers'}: {_spread(rest)}", False))
    return lines


def _slowest_first(worker: WorkerStatus) -> tuple[bool, bool, float, float]:
    oldest_s = max((shard.age_s for shard in worker.shards), default=0.0)
    return not worker.is_slow, not worker.shards, worker.bytes_per_s, -oldest_s


def _doing(worker: WorkerStatus) -> str:
    """Return the shards of a worker: ``shard 3: 31 %, 8: 5 %``."""
    parts = [f"{shard.index + 1}: {100 * shard.share:.0f} %" for shard in worker.shards]
    return f"shard {', '.join(parts)}" if parts else "waits"


def _since(worker: WorkerStatus) -> str:
    """Return how long a worker has had the oldest of its shards."""
    if not worker.shards:
        return ""
    age = format_seconds(max(shard.age_s for shard in worker.shards))
    return f"for {age}, slow" if worker.is_slow else f"for {age}"


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"
