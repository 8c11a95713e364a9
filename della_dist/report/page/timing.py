"""When and by whom a merge was made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from html import escape
from typing import Any

from della_dist.report.page.html import figures, table
from della_dist.report.page.timeline import Timeline, pause_before, short_time
from della_dist.report.text import format_bytes
from della_dist.specs.history import History, Session, ShardRun
from della_dist.wording import plural

#: Workers, and shards that took longest, that are listed.
MOST_WORKERS, MOST_SHARDS = 128, 10

_NONE = (
    "There is no record of how it was run: della_run.json is missing, damaged, or that of another "
    "output."
)


def timing_section(
    history: History | None, manifest: Mapping[str, Any], picture: Timeline | None
) -> str:
    """Return the section about the run, as HTML.

    Parameters
    ----------
    history
        None if it is not known.
    manifest
        Of the output.
    picture
        Of throughput and workers, if there is one.
    """
    if history is None or not history.sessions:
        return f"<p>{escape(_NONE)}</p>\n"
    files = [shard["name"] for shard in manifest["shards"]]
    shards = [shard for shard in history.shards if shard.index < len(files)]
    return (
        f"<p>{escape(_summary(history, len(files) - len(shards)))}</p>\n"
        + _sessions(history, shards)
        + (figures([picture]) if picture is not None else "")
        + "<h3>Workers</h3>\n"
        + _workers(shards)
        + "<h3>Shards that took longest</h3>\n"
        + _longest(shards, files)
    )


def _summary(history: History, num_unknown: int) -> str:
    sessions = history.sessions
    took_s = sum(session.elapsed_s for session in sessions)
    cpu_s = sum(session.cpu_s for session in sessions)
    says = f"{short_time(took_s).capitalize()} in {plural(len(sessions), 'session')}"
    pauses_s = sum(pause_before(history, i) for i in range(1, len(sessions)))
    if len(sessions) > 1:
        says += f", with {short_time(pauses_s)} between them"
    cores = f" ({cpu_s / took_s:.1f} cores in the mean)" if took_s else ""
    says += f"; {short_time(cpu_s)} of CPU time{cores}."
    for count, what in (
        (sum(session.workers_lost for session in sessions), "lost worker"),
        (sum(session.tasks_retried for session in sessions), "retried shard"),
        (sum(session.stragglers for session in sessions), "second attempt"),
    ):
        if count:
            says += f" {plural(count, what)}."
    if len(sessions) > 1:
        says += " Of a session that was cut short, this counts until its last shard."
    if num_unknown:
        says += f" Of {plural(num_unknown, 'shard')} nothing is recorded."
    return says


def _sessions(history: History, shards: Sequence[ShardRun]) -> str:
    rows = []
    for i, session in enumerate(history.sessions):
        mine = [shard for shard in shards if shard.session == i]
        rows.append(
            [
                _moment(session),
                session.engine,
                short_time(session.elapsed_s),
                short_time(session.cpu_s),
                f"{len(mine):,}",
                f"{len({shard.worker for shard in mine}):,}",
                format_bytes(session.bytes_read),
                format_bytes(session.bytes_written),
                f"{session.workers_lost:,}",
                f"{session.tasks_retried:,}",
            ]
        )
    heads = ["began (UTC)", "engine", "took", "CPU time", "shards", "workers"]
    heads += ["read", "written", "workers lost", "retried"]
    return table(heads, rows, label="Sessions", texts=2)


def _moment(session: Session) -> str:
    try:
        began = datetime.fromtimestamp(session.began_s, timezone.utc)
    except (OverflowError, ValueError, OSError):
        return "?"
    return began.strftime("%Y-%m-%d %H:%M:%S")


def _workers(shards: Sequence[ShardRun]) -> str:
    mine: dict[tuple[int, str], list[ShardRun]] = {}
    for shard in sorted(shards, key=lambda one: (one.session, one.start_s)):
        mine.setdefault((shard.session, shard.worker), []).append(shard)
    rows = [
        [
            f"worker {worker}",
            f"{session + 1}",
            f"{len(done):,}",
            short_time(sum(one.end_s - one.start_s for one in done)),
            format_bytes(sum(one.spent.bytes_read for one in done)),
            format_bytes(sum(one.bytes_written for one in done)),
        ]
        for (session, worker), done in mine.items()
    ]
    heads = ["worker", "session", "shards", "time for them", "read", "written"]
    more = len(rows) - MOST_WORKERS
    return table(heads, rows[:MOST_WORKERS], label="Workers") + (
        f'<p class="says">And {more:,} more.</p>\n' if more > 0 else ""
    )


def _longest(shards: Sequence[ShardRun], files: Sequence[str]) -> str:
    chosen = sorted(shards, key=lambda one: (one.start_s - one.end_s, one.index))[:MOST_SHARDS]
    rows = [
        [
            files[one.index],
            one.worker,
            short_time(one.end_s - one.start_s),
            short_time(one.spent.merging_s),
            short_time(one.spent.writing_s),
            short_time(one.spent.committing_s),
            format_bytes(one.spent.bytes_read),
            f"{one.attempt}",
        ]
        for one in chosen
    ]
    heads = ["shard", "worker", "took", "reading, merging", "writing", "committing", "read"]
    return table([*heads, "attempt"], rows, label="Shards that took longest", texts=2)
