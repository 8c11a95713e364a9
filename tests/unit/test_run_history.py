"""The record of how an output came about: what is kept, and that nothing else is taken for it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from della_dist.specs.history import History, Session, ShardRun, Spent, TaskRun
from della_dist.storage.run_history import dump_history, gathered, load_history, runs_of
from della_dist.storage.sealed import seal

DIGEST = "cd" * 32
SPENT = Spent(bytes_read=100, merging_s=0.5, writing_s=0.25, committing_s=0.125)
FIRST = Session(1000.5, "local", 10.0, 15.0, 300, 150, 0, 0, 0)
SECOND = Session(2000.5, "ray", 4.0, 9.0, 100, 50, 1, 2, 3)


def history(num_shards: int = 3) -> History:
    """Return one of two sessions."""
    shards = tuple(
        ShardRun(i, i % 2, f"{i % 7} on node {i % 3}", 1, i + 0.25, i + 1.5, SPENT, 50)
        for i in range(num_shards)
    )
    return History(DIGEST, (FIRST, SECOND), shards, {"models": [], "pairs": []})


def test_what_is_read_is_what_was_written() -> None:
    assert load_history(dump_history(history())) == history()
    assert load_history(dump_history(replace(history(), check=None))).check is None
    found = runs_of(history())
    assert found[1] == (SPENT, TaskRun(SECOND, "1 on node 1", 1, 1.25, 2.5))


def test_it_grows_by_less_than_the_manifest() -> None:
    """Which has 150 bytes a shard."""
    size = len(dump_history(history(10_000))) - len(dump_history(history(0)))
    assert size < 80 * 10_000


def test_sessions_are_as_they_stood_when_they_were_heard_of_last() -> None:
    def run(session: Session, start_s: float) -> TaskRun:
        return TaskRun(session, "0", 1, start_s, start_s + 1)

    early = replace(FIRST, elapsed_s=4.0, cpu_s=1.0, bytes_read=10)
    now = replace(SECOND, elapsed_s=20.0)
    found = gathered(
        DIGEST,
        [
            (2, 50, SPENT, run(SECOND, 0.0)),
            (0, 50, SPENT, run(FIRST, 8.0)),
            (1, 50, SPENT, run(early, 2.0)),
            (3, 50, None, None),  # of a version that kept nothing
        ],
        now,
        None,
    )
    assert found.sessions == (FIRST, now)
    assert [(shard.index, shard.session) for shard in found.shards] == [(0, 0), (1, 0), (2, 1)]
    assert gathered(DIGEST, [], None, None) == History(DIGEST, (), (), None)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("format_version",), 2),
        (("model_digest",), None),
        (("columns",), ["index"]),
        (("check",), []),
        (("sessions",), {}),
        (("sessions", 0), []),
        (("sessions", 0, "began_s"), "1"),
        (("sessions", 0, "elapsed_s"), -1),
        (("sessions", 0, "cpu_s"), math.nan),
        (("sessions", 0, "cpu_s"), 10**400),
        (("sessions", 0, "engine"), None),
        (("sessions", 0, "other"), 1),
        (("shards",), None),
        (("shards", 0), [1]),
        (("shards", 0), None),
        (("shards", 0, 0), -1),
        (("shards", 0, 0), True),
        (("shards", 0, 1), 2),
        (("shards", 0, 2), 7),
        (("shards", 0, 4), math.inf),
    ],
)
def test_what_is_no_record(where: tuple[str | int, ...], value: Any) -> None:
    content: Any = json.loads(dump_history(history()))
    part = content
    for key in where[:-1]:
        part = part[key]
    part[where[-1]] = value
    with pytest.raises(ValueError, match=r".+"):
        load_history(seal(content))


def test_damaged_record() -> None:
    data = dump_history(history())
    for damage in (b"", b"{}", data[:-2], data.replace(b"ray", b"rax")):
        with pytest.raises(ValueError, match="digest"):
            load_history(damage)
