"""Workers of a Ray cluster that are killed, stopped, slow, or cannot start."""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from della_dist.errors import RunError
from della_dist.report.run_log import JsonLines
from della_dist.report.summary import MergeSummary
from della_dist.runtime.engines.events import Limits
from della_dist.runtime.output.commit import Output
from della_dist.runtime.task.merge import TaskRecord
from tests.chaos.figures import num_kills, report
from tests.chaos.monkey import Workers, meanwhile, set_limits, wait_for
from tests.chaos.slow_merge import SlowMerge, num_committed
from tests.servers.ray_cluster import RayCluster, ray_cluster

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

NUM_KILLS = num_kills(30)
KILLS_A_MERGE = 8


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    """Run two nodes of one core."""
    with ray_cluster(2, 1) as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def commits(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[tuple[str, int]]]:
    """Check that no task of an output is recorded twice."""
    counts: Counter[tuple[str, int]] = Counter()
    commit = Output.commit

    def count(self: Output, record: TaskRecord) -> None:
        counts[self.store.location, record.index] += 1
        commit(self, record)

    monkeypatch.setattr(Output, "commit", count)
    yield counts
    assert set(counts.values()) <= {1}


def test_kills_of_workers(
    cluster: RayCluster,
    slow_merge: SlowMerge,
    tmp_path: Path,
    commits: Counter[tuple[str, int]],
) -> None:
    calm = slow_merge.run(tmp_path / "calm", cluster.address, workers=2)
    slow_merge.check(tmp_path / "calm", calm)
    rng = random.Random(30)
    kills: Counter[str] = Counter()
    summaries: list[MergeSummary] = []
    while kills.total() < NUM_KILLS:
        assert len(summaries) < NUM_KILLS, "hardly anything was hit"
        out = tmp_path / f"out{len(summaries)}"
        workers = Workers(cluster, out)
        allowed = min(NUM_KILLS, kills.total() + KILLS_A_MERGE)

        def act(over: threading.Event, workers: Workers = workers, allowed: int = allowed) -> None:
            while kills.total() < allowed:
                # Never two starts in a row: five of them end the run, as they should.
                kind = "starting" if kills.total() % 3 == 2 else "busy"
                find = workers.starting if kind == "starting" else workers.busy
                if not wait_for(find, over):
                    return
                time.sleep(rng.uniform(0, 0.1))
                victims = find()
                if victims:
                    rng.choice(victims).kill()
                    kills[kind] += 1

        with meanwhile(act):
            summaries.append(slow_merge.run(out, cluster.address, workers=2))
        slow_merge.check(out, summaries[-1])
    lost = sum(s.workers_lost for s in summaries)
    # A worker that dies at the very end is not missed any more, one that dies while starting is
    # not counted, and both kills may hit the same worker.
    assert kills["busy"] - 2 * len(summaries) <= lost <= kills.total()
    assert 0 < sum(s.tasks_retried for s in summaries) <= 2 * lost
    assert len(commits) == (len(summaries) + 1) * calm.num_tasks
    extra_s = sum(s.elapsed_s for s in summaries) - len(summaries) * calm.elapsed_s
    report(
        "worker killed (SIGKILL)",
        kills=kills.total(),
        while_starting=kills["starting"],
        merges=len(summaries),
        workers_lost=lost,
        tasks_retried=sum(s.tasks_retried for s in summaries),
        seconds_a_kill=extra_s / kills.total(),
    )


def events_of(log: Path, summary: MergeSummary) -> dict[str, list[dict[str, Any]]]:
    """Return the events of a whole run by their names; each shard is committed once."""
    events: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in log.read_text().splitlines():
        event = json.loads(line)
        events[event["event"]].append(event)
    committed = events["shard_committed"]
    assert len({e["shard"] for e in committed}) == len(committed) == summary.num_tasks
    begun = {(e["shard"], e["attempt"], e["worker"]) for e in events["shard_started"]}
    assert {(e["shard"], e["attempt"], e["worker"]) for e in committed} <= begun
    (end,) = events["end"]
    assert end["model_digest"] == summary.model_digest
    assert end["tasks_retried"] == summary.tasks_retried
    return events


def test_a_stopped_worker_is_replaced(
    cluster: RayCluster, slow_merge: SlowMerge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_limits(monkeypatch, Limits(silence_s=2, max_step_s=0.5))
    out = tmp_path / "out"
    workers = Workers(cluster, out)
    stopped: list[psutil.Process] = []

    def act(over: threading.Event) -> None:
        assert wait_for(lambda: num_committed(out) >= 3 and workers.busy(), over)
        stopped.append(workers.busy()[0])
        stopped[0].suspend()

    log = tmp_path / "log.json"
    with JsonLines(str(log)), meanwhile(act):
        summary = slow_merge.run(out, cluster.address, workers=2)
    slow_merge.check(out, summary)
    events = events_of(log, summary)
    silent = [e for e in events["worker_stopped"] if e["reason"] == "silent for 2 s"]
    assert len(silent) == summary.workers_lost
    assert any(f"pid {stopped[0].pid}" in e["worker"] for e in silent)
    retries = [e for e in events["shard_started"] if e["why"] == "retry"]
    assert 0 < len(retries) <= summary.tasks_retried
    if stopped[0].is_running():
        stopped[0].resume()
        stopped[0].wait(30)
    slow_merge.check(out)
    assert summary.workers_lost >= 1  # a slow machine may make another one silent for as long
    report(
        "worker stopped (SIGSTOP)",
        stops=1,
        merges=1,
        workers_lost=summary.workers_lost,
        tasks_retried=summary.tasks_retried,
    )


def test_a_slow_worker_is_helped_out(
    cluster: RayCluster, slow_merge: SlowMerge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_limits(monkeypatch, Limits(straggler_min_s=1))
    out = tmp_path / "out"
    workers = Workers(cluster, out)

    def act(over: threading.Event) -> None:
        assert wait_for(lambda: num_committed(out) >= 3 and workers.busy(), over)
        slow = workers.busy()[0]
        with suppress(psutil.NoSuchProcess):  # it is ended with the run
            while not over.is_set():
                slow.suspend()
                over.wait(0.5)
                slow.resume()
                over.wait(0.005)

    log = tmp_path / "log.json"
    with JsonLines(str(log)), meanwhile(act):
        summary = slow_merge.run(out, cluster.address, workers=2)
    slow_merge.check(out, summary)
    assert summary.stragglers > 0
    started = events_of(log, summary)["shard_started"]
    assert sum(e["why"] == "straggler" for e in started) == summary.stragglers
    assert summary.workers_lost == 0
    report("worker slowed down 100 times", merges=1, second_attempts=summary.stragglers)


def test_no_worker_can_be_placed(
    cluster: RayCluster, slow_merge: SlowMerge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_limits(monkeypatch, Limits(start_s=3))
    with pytest.raises(RunError, match=r"no worker has been ready for 3 s.*it continues"):
        slow_merge.run(tmp_path / "out", cluster.address, workers=2, threads=64)
    set_limits(monkeypatch, Limits())
    slow_merge.check(tmp_path / "out", slow_merge.run(tmp_path / "out", cluster.address))


def test_no_worker_can_start(cluster: RayCluster, slow_merge: SlowMerge, tmp_path: Path) -> None:
    out = tmp_path / "out"
    cluster.add_node(num_gpus=2)  # which the machine does not have
    try:
        with pytest.raises(RunError, match=r"could be started, \d+ times.*finds no CUDA device"):
            slow_merge.run(out, cluster.address, device="cuda", threads=1)
    finally:
        cluster.remove_node(cluster.nodes[-1])
    slow_merge.check(out, slow_merge.run(out, cluster.address))
