"""What the answers of actors mean that come together."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("ray")

from della_dist.runtime.engines.events import Attempt, Finished, Heard, WorkerLost, WorkerReady
from della_dist.runtime.engines.ray.answers import Answers, Call, Death
from della_dist.runtime.engines.ray.worker import TaskSuccess, WorkerFacts, WorkerProgress


def test_what_a_worker_did_before_its_death_counts() -> None:
    record: Any = ("a record",)
    answers = Answers(lambda node: frozenset({f"node={node}"}))
    events = answers.take(
        [
            (Call("progress", "0"), Death("it was killed")),
            (Call("merge", "0", Attempt(1, 1)), Death("something that follows from it")),
            (Call("merge", "0", Attempt(0, 1)), TaskSuccess(record, WorkerProgress(1, 1, 1, 0.25))),
            (Call("progress", "1"), WorkerProgress(1, 2, 3, 0.5)),
        ]
    )
    assert events == [
        Finished("0", Attempt(0, 1)),
        Heard("1", 3),
        WorkerLost("0", "it was killed"),
    ]
    assert answers.result(Attempt(0, 1)) == record
    assert answers.total_bytes() == (2, 3)
    assert answers.cpu_s() == 0.75


def test_who_a_worker_is() -> None:
    answers = Answers(lambda node: frozenset({f"node={node}"}))
    assert answers.name("0") == "worker 0"
    facts = WorkerFacts(node="n1", host="h", pid=7)
    assert answers.take([(Call("facts", "0"), facts)]) == [
        WorkerReady("0", "n1", frozenset({"node=n1"}))
    ]
    assert answers.name("0") == "worker 0 (h, pid 7)"
    answers.take([(Call("facts", "1"), WorkerFacts(node="n1", host="h", pid=8, gpu="3"))])
    assert answers.name("1") == "worker 1 (h, pid 8, GPU 3)"
