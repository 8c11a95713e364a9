"""Drivers of a Ray cluster that are killed, told to end, or meet on one output."""

from __future__ import annotations

import json
import random
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from della_dist.storage.local.store import LocalStore
from tests.chaos.figures import num_kills, report
from tests.chaos.monkey import wait_for
from tests.chaos.slow_merge import SlowMerge, committed, num_committed, start_driver
from tests.servers.ray_cluster import RayCluster, ray_cluster

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

NUM_KILLS = num_kills(10)
KILLS_A_MERGE = min(5, NUM_KILLS)


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    """Run two nodes of one core."""
    with ray_cluster(2, 1) as cluster:
        yield cluster


def finish(driver: subprocess.Popen[str]) -> dict[str, Any]:
    output, errors = driver.communicate(timeout=120)
    assert driver.returncode == 0, errors
    summary = json.loads(output)
    assert isinstance(summary, dict)
    return summary


def end(driver: subprocess.Popen[str], how: signal.Signals) -> str:
    driver.send_signal(how)
    _, errors = driver.communicate(timeout=60)
    return errors


def has_begun(out: Path, num_wanted: int) -> bool:
    return (out / ".della/plan.json").exists() and num_committed(out) >= num_wanted


def shards_of(out: Path, records: list[str]) -> dict[str, tuple[int, int]]:
    """Return the identity of the shard of every record: another file would have another."""
    found = {}
    for record in records:
        name = json.loads((out / ".della/tasks" / record).read_text())["name"]
        stat = (out / name).stat()
        found[name] = (stat.st_ino, stat.st_mtime_ns)
    return found


def test_kills_of_drivers(cluster: RayCluster, slow_merge: SlowMerge, tmp_path: Path) -> None:
    calm = finish(start_driver(slow_merge, tmp_path / "calm", cluster.address))
    rng = random.Random(11)
    kills = merges = 0
    seconds = 0.0
    while kills < NUM_KILLS:
        out = tmp_path / f"out{merges}"
        merges += 1
        started_s = time.monotonic()
        kept: dict[str, tuple[int, int]] = {}
        for _ in range(KILLS_A_MERGE):
            if 2 * len(kept) > slow_merge.summary.num_tasks:
                break  # it might end before the next kill
            driver = start_driver(slow_merge, out, cluster.address)
            wanted = len(kept) + rng.randint(0, 3)
            wait_for(partial(has_begun, out, wanted))
            time.sleep(rng.uniform(0, 0.2))
            end(driver, signal.SIGKILL)
            assert driver.returncode == -signal.SIGKILL
            kills += 1
            now = shards_of(out, committed(out))
            assert now.items() >= kept.items()
            kept = now
        summary = finish(start_driver(slow_merge, out, cluster.address))
        seconds += time.monotonic() - started_s - calm["elapsed_s"]
        assert summary["tasks_resumed"] == len(kept)
        for name, identity in kept.items():
            stat = (out / name).stat()
            assert (stat.st_ino, stat.st_mtime_ns) == identity, f"{name} was done again"
        slow_merge.check(out)
    report("driver killed (SIGKILL)", kills=kills, merges=merges, seconds_a_kill=seconds / kills)


@pytest.mark.parametrize("where", ["cluster", "local"])
def test_a_driver_is_told_to_end(
    cluster: RayCluster, slow_merge: SlowMerge, tmp_path: Path, where: str
) -> None:
    out = tmp_path / "out"
    address = cluster.address if where == "cluster" else "local"
    driver = start_driver(slow_merge, out, address)
    wait_for(lambda: num_committed(out) >= 3)
    errors = end(driver, signal.SIGTERM)
    assert driver.returncode == 1, errors
    assert errors.strip().endswith("della-dist: interrupted; the same command continues.")
    assert "Traceback" not in errors
    assert "SIGTERM received" not in errors
    LocalStore(out).lock("a test").release()
    kept = num_committed(out)
    assert finish(start_driver(slow_merge, out, cluster.address))["tasks_resumed"] == kept
    slow_merge.check(out)


def test_two_drivers_on_one_output(
    cluster: RayCluster, slow_merge: SlowMerge, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    first = start_driver(slow_merge, out, cluster.address)
    wait_for(lambda: num_committed(out) >= 1)
    second = start_driver(slow_merge, out, cluster.address)
    _, errors = second.communicate(timeout=60)
    assert second.returncode == 2, errors
    assert re.search(rf"written by another run \(pid {first.pid} on .*; since \d+ s\)", errors)
    assert "Traceback" not in errors
    end(first, signal.SIGKILL)
    kept = num_committed(out)
    assert finish(start_driver(slow_merge, out, cluster.address))["tasks_resumed"] == kept
    slow_merge.check(out)


def test_two_drivers_at_once(cluster: RayCluster, slow_merge: SlowMerge, tmp_path: Path) -> None:
    out = tmp_path / "out"
    drivers = [start_driver(slow_merge, out, cluster.address) for _ in range(2)]
    errors = [driver.communicate(timeout=120)[1] for driver in drivers]
    assert sorted(driver.returncode for driver in drivers) == [0, 2], errors
    slow_merge.check(out)
