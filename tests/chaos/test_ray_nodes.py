"""Nodes of a Ray cluster that die, their workers that live on, and the end of the whole cluster."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from della_dist.report.summary import MergeSummary
from della_dist.runtime.engines.events import Limits
from tests.chaos.figures import num_kills, report
from tests.chaos.monkey import Staged, Workers, is_writing, meanwhile, set_limits, wait_for
from tests.chaos.slow_merge import SlowMerge, num_committed, start_driver
from tests.servers.ray_cluster import RayCluster, RayNode, ray_cluster

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

NUM_KILLS = num_kills(10)
KILLS_A_MERGE = 4


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    """Run three nodes of one core; the driver is on the first."""
    with ray_cluster(3, 1) as cluster:
        yield cluster


def test_kills_of_nodes(cluster: RayCluster, slow_merge: SlowMerge, tmp_path: Path) -> None:
    calm = slow_merge.run(tmp_path / "calm", cluster.address, workers=3)
    rng = random.Random(10)
    kills = 0
    zombies = 0
    summaries: list[MergeSummary] = []
    while kills < NUM_KILLS:
        assert len(summaries) < NUM_KILLS, "hardly anything was hit"
        out = tmp_path / f"out{len(summaries)}"
        workers = Workers(cluster, out)
        allowed = min(NUM_KILLS, kills + KILLS_A_MERGE)

        def act(over: threading.Event, workers: Workers = workers, allowed: int = allowed) -> None:
            nonlocal kills, zombies

            def victims() -> list[Staged]:
                nodes = cluster.nodes[1:]
                return [s for s in workers.staged() if workers.node_of(s.worker) in nodes]

            while kills < allowed and wait_for(victims, over):
                time.sleep(rng.uniform(0, 0.1))
                for victim in victims()[:1]:
                    node = workers.node_of(victim.worker)
                    assert node is not None
                    cluster.kill_raylet(node)
                    kills += 1
                    zombies += victim.worker.is_running()
                    cluster.add_node()

        with meanwhile(act):
            summaries.append(slow_merge.run(out, cluster.address, workers=3))
        slow_merge.check(out, summaries[-1])
    lost = sum(s.workers_lost for s in summaries)
    assert 0 < lost <= kills
    extra_s = sum(s.elapsed_s for s in summaries) - len(summaries) * calm.elapsed_s
    report(
        "node killed (SIGKILL of its raylet)",
        kills=kills,
        workers_that_lived_on=zombies,
        merges=len(summaries),
        workers_lost=lost,
        tasks_retried=sum(s.tasks_retried for s in summaries),
        seconds_a_kill=extra_s / kills,
    )


def test_a_zombie_commits_after_its_replacement(
    cluster: RayCluster, slow_merge: SlowMerge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its run goes on: the shard is replaced by the same bytes, and recorded once."""
    set_limits(monkeypatch, Limits(silence_s=1.5, max_step_s=0.5))
    out = tmp_path / "out"
    workers = Workers(cluster, out)
    frozen: list[RayNode] = []

    def act(over: threading.Event) -> None:
        zombie, node = workers.make_zombie(over)
        frozen.append(node)
        inode = zombie.path.stat().st_ino
        shard = out / zombie.shard
        number = int(zombie.shard.split("-")[1]) - 1
        record = out / f".della/tasks/{number:05d}.json"
        assert wait_for(record.exists, over), "the run was over first"
        assert shard.stat().st_ino != inode
        zombie.worker.resume()
        assert wait_for(lambda: shard.stat().st_ino == inode)
        assert not over.is_set()

    with meanwhile(act):
        summary = slow_merge.run(out, cluster.address, workers=3)
    slow_merge.check(out, summary)
    assert summary.workers_lost >= 1  # on a busy machine others may be silent for 1.5 s too
    report(
        "stopped worker commits after its replacement",
        kills=1,
        workers_that_lived_on=1,
        merges=1,
        workers_lost=summary.workers_lost,
        tasks_retried=summary.tasks_retried,
    )
    cluster.kill_raylet(frozen[0])
    cluster.add_node()


def test_a_zombie_wakes_up_in_the_output_of_another_run(
    cluster: RayCluster, slow_merge: SlowMerge, other_seed: SlowMerge, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    workers = Workers(cluster, out)
    driver = start_driver(slow_merge, out, cluster.address)
    try:
        zombie, frozen = workers.make_zombie(threading.Event())
    finally:
        driver.kill()
        driver.communicate()
    woken: list[bool] = []

    def act(over: threading.Event) -> None:
        """Wake it up as soon as the other run has written the shard that it holds."""
        shard = out / zombie.shard
        assert wait_for(lambda: num_committed(out) and shard.exists(), over)
        zombie.worker.resume()
        woken.append(not over.is_set())

    with meanwhile(act):
        summary = other_seed.run(out, cluster.address, workers=2, restart=True)
    other_seed.check(out, summary)
    assert woken == [True]
    assert wait_for(lambda: not is_writing(zombie))
    other_seed.check(out)
    cluster.kill_raylet(frozen)
    cluster.add_node()


def test_the_whole_cluster_dies(slow_merge: SlowMerge, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with ray_cluster(2, 1, fast_failure_detection=False) as cluster:
        driver = start_driver(slow_merge, out, cluster.address)
        wait_for(lambda: num_committed(out) >= 3)
        died_s = time.monotonic()
        cluster.kill_head()
        for node in list(cluster.nodes):
            cluster.kill_raylet(node)
        _, errors = driver.communicate(timeout=60)
        seconds = time.monotonic() - died_s
    assert driver.returncode == 1, errors
    assert "the Ray cluster is gone" in errors
    assert "it continues" in errors
    assert "Traceback" not in errors
    kept = num_committed(out)
    assert kept >= 3
    with ray_cluster(1, 1) as cluster:
        summary = slow_merge.run(out, cluster.address)
    assert summary.tasks_resumed == kept
    slow_merge.check(out, summary)
    report("whole cluster killed", kills=1, seconds_until_told=seconds)
