"""A run on Ray tells Prometheus what it does, through the agent of the driver's node.

Ray has that agent with ``pip install 'ray[default]'``; without, nothing is exported and all else is
as it is (`tests/e2e/test_ray.py`).
"""

from __future__ import annotations

import logging
import re
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("opencensus")
pytest.importorskip("prometheus_client")
pytest.importorskip("opentelemetry.exporter.prometheus")

import ray

from della_dist.report.run_events import ShardFailed, ShardStarted, WorkerWasLost
from della_dist.report.run_log import tell
from della_dist.runtime.engines.ray import pool
from della_dist.runtime.engines.ray.address import answers
from della_dist.runtime.engines.ray.metrics import PHASES, RunMetrics
from tests.merging import config_for, run, save_family
from tests.servers.ray_cluster import RAY_ENVIRONMENT, RayCluster, ray_cluster

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore")]

SAMPLE = re.compile(r"^ray_della_dist_(\w+)\{(.*)\} (\S+)$", re.MULTILINE)


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in RAY_ENVIRONMENT.items():
            patch.setenv(name, value)
        with ray_cluster(1, 2) as cluster:
            yield cluster


def exported(cluster: RayCluster) -> str:
    """Return what Prometheus would be told by the node, once it tells anything."""
    port = cluster.nodes[0].handle.metrics_export_port
    deadline_s = time.monotonic() + 60
    while not answers(f"127.0.0.1:{port}"):
        assert time.monotonic() < deadline_s
        time.sleep(0.2)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        return str(answer.read().decode())


def told(cluster: RayCluster, output: str, totals: dict[str, float]) -> dict[str, float]:
    """Return the values of an output by metric and phase, at the latest once they are `totals`."""
    deadline_s = time.monotonic() + 30
    found: dict[str, float] = {}
    while not totals.items() <= found.items() and time.monotonic() < deadline_s:
        found = {}
        for name, labels, value in SAMPLE.findall(exported(cluster)):
            phase = re.search(r'phase="(\w+)"', labels)
            if f'output="{output}"' in labels and not name.endswith("_bucket"):
                found[f"{name} {phase[1]}" if phase else name] = float(value)
        time.sleep(0.2)
    return found


def check_documented(found: dict[str, float]) -> None:
    text = (Path(__file__).parents[2] / "cluster" / "README.md").read_text()
    for name in found:
        metric = name.partition(" ")[0].removesuffix("_count").removesuffix("_sum")
        assert f"| `ray_della_dist_{metric}` |" in text


def test_what_prometheus_is_told(
    cluster: RayCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported(cluster)  # the agent is there before the run is over
    monkeypatch.setattr(pool, "PROGRESS_S", 0.0)  # which is a short one
    out = tmp_path / "out"
    config = config_for(*save_family(tmp_path / "in"), "della", parameters={"density": 0.4})
    summary = run(
        config,
        out,
        engine="ray",
        address=cluster.address,
        shard_bytes=100_000,
        workers=2,
        threads=1,
        memory_bytes=192 << 20,
    )
    assert summary.num_tasks > 4
    totals: dict[str, float] = {
        "read_bytes_total": summary.bytes_read,
        "written_bytes_total": summary.bytes_written,
        "shards_total": summary.num_tasks,
        "tensors_total": summary.num_tensors,
        "shard_seconds_count": summary.num_tasks,
        **{f"workers {phase}": 0 for phase in PHASES},
    }
    found = told(cluster, str(out), totals)
    assert totals.items() <= found.items()
    seconds = found.keys() - totals.keys() - {"worker_seconds_total waiting"}
    assert seconds == {
        "worker_seconds_total starting",
        "worker_seconds_total merging",
        "shard_seconds_sum",
    }
    assert all(found[name] > 0 for name in seconds)
    check_documented(found)


def test_what_goes_wrong(cluster: RayCluster) -> None:
    exported(cluster)
    ray.init(address=cluster.address, logging_level=logging.ERROR, log_to_driver=False)
    try:
        metrics = RunMetrics("s3://KEY:SECRET@bucket/out")
        metrics.open()
        tell(ShardStarted("a", 1, "worker 0", "first"))
        tell(ShardStarted("a", 2, "worker 1", "straggler"))
        for attempt in (3, 4):
            tell(ShardStarted("a", attempt, "worker 0", "retry"))
        tell(ShardFailed("a", 1, "worker 0", "the disk is full", is_retried=True))
        for _ in range(3):
            tell(WorkerWasLost("worker 0", "killed"))
        metrics.close()
        tell(WorkerWasLost("worker 0", "of another run"))
    finally:
        ray.shutdown()
    totals: dict[str, float] = {
        "retries_total": 2,
        "stragglers_total": 1,
        "failures_total": 1,
        "workers_lost_total": 3,
        **{f"workers {phase}": 0 for phase in PHASES},
    }
    found = told(cluster, "s3://***@bucket/out", totals)
    assert found == totals
    check_documented(found)
