"""What a worker process says of an attempt that failed, and what the run ends with."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from della_dist.errors import DellaDistError, OutputError
from della_dist.report.failures import failure_of
from della_dist.runtime.budget import budget
from della_dist.runtime.engines.ray.worker import MergeWorker, TaskFailure, WorkerSetup
from della_dist.runtime.open_plan import open_plan
from della_dist.runtime.options import RunOptions
from della_dist.runtime.output.commit import Output
from della_dist.storage.opening import open_output_store
from tests.merging import config_for, save_family


def test_a_node_that_does_not_see_the_folder_of_uploads(tmp_path: Path) -> None:
    """Refused by one error, which says what to do; and nothing is made there."""
    base, experts = save_family(tmp_path / "family")
    plan = open_plan(config_for(base, experts))
    out = tmp_path / "not-shared"
    setup = WorkerSetup(plan, str(out), "token", "cpu", budget(RunOptions()), 1, "hf://user/name")
    failure = MergeWorker(setup).merge(0, 1)
    assert isinstance(failure, TaskFailure)
    assert not failure.retryable
    assert isinstance(failure.error, OutputError)
    for word in (str(out), "hf://user/name", "--staging"):
        assert word in str(failure.error)
    assert not out.exists()


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (ZeroDivisionError("division by zero"), 4, "a fault of della-dist"),
        (AssertionError(), 4, "AssertionError (della_dist/"),
        (MemoryError(), 1, "MemoryError"),
        (PermissionError(13, "Permission denied"), 1, "Permission denied"),
    ],
)
def test_status(
    tmp_path: Path, error: Exception, status: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = open_plan(config_for(*save_family(tmp_path, num_experts=1)))
    out = str(tmp_path / "out")
    output = Output(open_output_store(out), plan)
    output.begin()
    worker = MergeWorker(WorkerSetup(plan, out, output.lease_token, "cpu", budget(RunOptions()), 1))

    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr("della_dist.ops.cpu.backend.NumbaBackend.merge", fail)
    failure = worker.merge(0, 1)
    assert isinstance(failure, TaskFailure)
    assert not failure.retryable
    sent: DellaDistError = pickle.loads(pickle.dumps(failure)).error
    found, message = failure_of(sent)
    assert found == sent.exit_code == status
    assert words in message
    output.close()
