"""``della_run.json``: how an output came about, for people; nothing rests on it.

It is no part of what the manifest lists, since no two runs take the same time, and an output
without it is whole. A JSON document that carries a digest of itself: ``sessions``, an object each
(`della_dist.specs.history.Session`); ``columns``, the names of the values in each row of
``shards``; and ``check``. Machines are named by numbers: outputs are published.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from della_dist.specs.history import History, Session, ShardRun, Spent, TaskRun
from della_dist.storage.sealed import seal, unseal

RUN_NAME = "della_run.json"
_FORMAT_VERSION = 1
_COLUMNS = (
    *("index", "session", "worker", "attempt", "start_s", "end_s"),
    *("bytes_read", "bytes_written", "merging_s", "writing_s", "committing_s"),
)

T = TypeVar("T")


def gathered(
    model_digest: str,
    runs: Iterable[tuple[int, int, Spent | None, TaskRun | None]],
    last: Session | None,
    check: Mapping[str, Any] | None,
) -> History:
    """Return the history that the records of shards tell.

    Parameters
    ----------
    model_digest, check
        See `History`.
    runs
        Of each shard its index, its size in bytes, and what its record has.
    last
        The session that completes the output, as it stands now.
    """
    found = [(i, size, spent, run) for i, size, spent, run in runs if spent and run]
    known = [run.session for _, _, _, run in found]
    sessions: dict[float, Session] = {}
    for session in (*known, *([] if last is None else [last])):
        seen = sessions.get(session.began_s)
        if seen is None or seen.elapsed_s <= session.elapsed_s:
            sessions[session.began_s] = session
    order = {began_s: i for i, began_s in enumerate(sorted(sessions))}
    return History(
        model_digest,
        tuple(sessions[began_s] for began_s in order),
        tuple(
            ShardRun(
                index,
                order[run.session.began_s],
                run.worker,
                run.attempt,
                run.start_s,
                run.end_s,
                spent,
                size_bytes,
            )
            for index, size_bytes, spent, run in sorted(found, key=lambda one: one[0])
        ),
        check,
    )


def dump_history(history: History) -> bytes:
    """Return the bytes of ``della_run.json``."""
    return seal(
        {
            "format_version": _FORMAT_VERSION,
            "model_digest": history.model_digest,
            "sessions": [to_json(session) for session in history.sessions],
            "columns": list(_COLUMNS),
            "shards": [_row(shard) for shard in history.shards],
            "check": None if history.check is None else dict(history.check),
        }
    )


def _row(shard: ShardRun) -> list[Any]:
    content = to_json(shard)
    content |= content.pop("spent")
    return [content[column] for column in _COLUMNS]


def load_history(data: bytes) -> History:
    """Return the content of ``della_run.json``.

    Raises
    ------
    ValueError
        If the bytes are not those that `dump_history` made.
    """
    content = unseal(data)
    try:
        if content["format_version"] != _FORMAT_VERSION or content["columns"] != list(_COLUMNS):
            raise ValueError("it is of another version")
        sessions = tuple(session_from_json(one) for one in content["sessions"])
        shards = tuple(_shard(row) for row in content["shards"])
        check = content["check"]
        is_whole = type(content["model_digest"]) is str and (check is None or type(check) is dict)
    except (KeyError, TypeError) as error:
        raise ValueError(f"it is no record of a run: {error}") from error
    if not is_whole or any(shard.session >= len(sessions) for shard in shards):
        raise ValueError("it is no record of a run")
    return History(content["model_digest"], sessions, shards, check)


def _shard(row: Sequence[Any]) -> ShardRun:
    content = dict(zip(_COLUMNS, row, strict=True))
    named = {field.name: content.pop(field.name) for field in dataclasses.fields(Spent)}
    return _checked(ShardRun(**content, spent=spent_from_json(named)))


def to_json(one: Session | Spent | TaskRun | ShardRun) -> dict[str, Any]:
    """Return a part of a history as a JSON-able mapping, times to the millisecond."""

    def rounded(items: list[tuple[str, Any]]) -> dict[str, Any]:
        return {k: round(v, 3) if type(v) is float else v for k, v in items}

    return dataclasses.asdict(one, dict_factory=rounded)


def spent_from_json(content: Mapping[str, Any]) -> Spent:
    """Return what `to_json` made a mapping of; `ValueError`, `TypeError` if it made none."""
    return _checked(Spent(**content))


def session_from_json(content: Mapping[str, Any]) -> Session:
    """Return what `to_json` made a mapping of; errors as `spent_from_json`."""
    return _checked(Session(**content))


def task_run_from_json(content: Mapping[str, Any]) -> TaskRun:
    """Return what `to_json` made a mapping of; errors as `spent_from_json`."""
    named = dict(content)
    session = session_from_json(named.pop("session"))
    return _checked(TaskRun(**named, session=session))


def runs_of(history: History) -> dict[int, tuple[Spent, TaskRun]]:
    """Return by the index of a shard what its record had."""
    return {
        one.index: (
            one.spent,
            TaskRun(history.sessions[one.session], one.worker, one.attempt, one.start_s, one.end_s),
        )
        for one in history.shards
    }


def _checked(one: T) -> T:
    """Return a part of a history all of whose values are of their type.

    Raises
    ------
    ValueError
        If one is not.
    """
    for field in dataclasses.fields(one):  # type: ignore[arg-type]
        value = getattr(one, field.name)
        if field.type == "str":
            is_good = type(value) is str
        elif field.type == "int":
            is_good = type(value) is int and 0 <= value < 1 << 63
        elif field.type == "float":
            is_good = type(value) in (int, float) and 0 <= value < 1e12
        else:
            continue
        if not is_good:
            raise ValueError(f"{field.name} is {value!r:.100}")
    return one
