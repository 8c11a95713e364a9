"""The cluster of several raylets loses nodes as asked, and leaves nothing behind."""

from __future__ import annotations

import signal
import time

import psutil
import pytest

from tests.servers.ray_cluster import ray_cluster


@pytest.mark.ray
@pytest.mark.slow
def test_a_cluster_loses_a_node_and_gains_one() -> None:
    ray = pytest.importorskip("ray")
    strategies = pytest.importorskip("ray.util.scheduling_strategies")
    handler = signal.getsignal(signal.SIGTERM)
    with ray_cluster(2, 1) as cluster:
        ray.init(address=cluster.address, log_to_driver=False)
        there = cluster.nodes[1]
        added = cluster.add_node(labels={"zone": "b"})
        labels = {n["NodeID"]: n["Labels"] for n in ray.nodes() if n["Alive"]}
        assert len(labels) == 3
        assert labels[added.node_id]["zone"] == "b"

        class Sleeper:
            def node_id(self) -> str:
                return str(ray.get_runtime_context().get_node_id())

            def sleep(self) -> None:
                time.sleep(60)

        on_it = strategies.NodeAffinitySchedulingStrategy(there.node_id, soft=False)
        actor = ray.remote(num_cpus=1, scheduling_strategy=on_it)(Sleeper).remote()
        assert ray.get(actor.node_id.remote()) == there.node_id
        assert there.worker_pids()
        pending = actor.sleep.remote()
        killed_s = time.monotonic()
        cluster.kill_raylet(there)
        with pytest.raises(ray.exceptions.RayActorError):
            ray.get(pending, timeout=30)
        assert time.monotonic() - killed_s < 10
        pids = cluster.pids()
    assert not [p for p in pids if psutil.pid_exists(p)]
    assert signal.getsignal(signal.SIGTERM) == handler
