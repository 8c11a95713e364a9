"""What the pool of the ray engine makes of the answers of its actors; without a cluster."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest

pytest.importorskip("ray")

from ray.exceptions import RayActorError, RayError

from della_dist.runtime.engines.ray import pool as ray_engine
from della_dist.runtime.engines.ray.address import Lifeline
from della_dist.runtime.engines.ray.answers import Answers, Call
from della_dist.runtime.engines.ray.pool import RayPool
from della_dist.runtime.engines.ray.worker import TaskSuccess, WorkerProgress
from della_dist.runtime.engines.scheduler import Attempt, Finished, Heard, WorkerLost

pytestmark = pytest.mark.ray


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> RayPool:
    """Return a pool of two actors of which one has died; answers are what they are asked for."""

    def get(ref: Any, timeout: float) -> Any:
        if isinstance(ref, RayError):
            raise ref
        return ref

    fake = mock.Mock(get=get, is_initialized=lambda: True)
    monkeypatch.setattr(ray_engine, "ray", fake)
    pool = RayPool.__new__(RayPool)
    pool._lifeline = Lifeline({}, 1)
    pool._actors = {"0": mock.Mock(), "1": mock.Mock()}
    pool._answers, pool._calls = Answers(lambda _: frozenset()), {}
    return pool


def test_what_a_worker_did_before_its_death_counts(pool: RayPool) -> None:
    record: Any = ("a record",)
    done = TaskSuccess(record, WorkerProgress(1, 1, 1))
    died = [RayActorError(), RayActorError()]
    progress = WorkerProgress(1, 2, 3)
    pool._calls = {
        died[0]: Call("progress", "0"),
        died[1]: Call("merge", "0", Attempt(1, 1)),
        done: Call("merge", "0", Attempt(0, 1)),
        progress: Call("progress", "1"),
    }
    finished, heard, lost = pool._take_in(list(pool._calls))
    assert finished == Finished("0", Attempt(0, 1))
    assert pool.result(Attempt(0, 1)) == record
    assert heard == Heard("1", 3)
    assert isinstance(lost, WorkerLost)
    assert lost.worker == "0"
    # The result makes room for the next task, before the caller hears of the death.
    pool.start("0", Attempt(2, 1))
    assert not pool._calls
