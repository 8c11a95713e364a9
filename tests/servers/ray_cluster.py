"""Ray clusters of several nodes on one machine, each node with a raylet of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import psutil

# Ray 2.60 otherwise writes a token file into the home folder, and reports its use.
RAY_ENVIRONMENT = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
# A killed raylet is noticed after 0.9 s instead of 14.6 s, a frozen one after about 11 s, not
# 64.7 s; one that a busy machine keeps waiting must not be taken for dead.
FAST_FAILURE_DETECTION = {
    "health_check_initial_delay_ms": 500,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 5000,
    "health_check_failure_threshold": 2,
}
OBJECT_STORE_BYTES = 80 * 2**20


@dataclass(frozen=True)
class RayNode:
    """A node of a cluster."""

    node_id: str
    raylet: psutil.Process
    handle: Any

    def worker_pids(self) -> list[int]:
        """Return the pids of the workers that its raylet has now."""
        return [p.pid for p in self._workers()]

    def _workers(self) -> list[psutil.Process]:
        return [p for p in self.raylet.children() if p.name().startswith(("ray::", "python"))]


class RayCluster:
    """A running cluster; `nodes[0]` is the head."""

    def __init__(self, cluster: Any, num_cpus: int) -> None:
        self._cluster = cluster
        self._num_cpus = num_cpus
        # All processes ever seen, because the workers of a killed raylet live on as orphans.
        self._known: set[psutil.Process] = set()
        #: Those whose raylet was not killed.
        self.nodes: list[RayNode] = []

    @property
    def address(self) -> str:
        """What drivers connect to."""
        return str(self._cluster.address)

    def start_head(self, system_config: Mapping[str, int] | None) -> RayNode:
        """Start the first node, without the dashboard."""
        # Ray writes the session's folder into the mapping it is given.
        config = None if system_config is None else dict(system_config)
        return self._start({}, self._num_cpus, _system_config=config, include_dashboard=False)

    def _start(self, labels: Mapping[str, str], num_cpus: int, **how: Any) -> RayNode:
        # Nodes put a handler of theirs in the place of the test's, which threads may not do.
        with mock.patch("ray._private.utils.set_sigterm_handler"):
            handle = self._cluster.add_node(
                num_cpus=num_cpus,
                object_store_memory=OBJECT_STORE_BYTES,
                labels=dict(labels),
                **how,
            )
        (raylet,) = handle.all_processes["raylet"]
        node = RayNode(handle.node_id, psutil.Process(raylet.process.pid), handle)
        self.nodes.append(node)
        return node

    def add_node(
        self,
        labels: Mapping[str, str] | None = None,
        num_gpus: int = 0,
        num_cpus: int | None = None,
    ) -> RayNode:
        """Start another node and wait until it belongs to the cluster."""
        num_cpus = self._num_cpus if num_cpus is None else num_cpus
        # Told the address of a dashboard, it does not look it up by the connection of this process,
        # which a driver in another thread may just be closing.
        return self._start(labels or {}, num_cpus, num_gpus=num_gpus, webui="none")

    def remove_node(self, node: RayNode) -> None:
        """Take a node away, in peace."""
        self._remember()
        self._cluster.remove_node(node.handle)
        self.nodes.remove(node)

    def kill_raylet(self, node: RayNode) -> None:
        """Kill a node's raylet with SIGKILL; its workers live on for a while (Ray: about 20 s)."""
        self._remember()
        node.handle.kill_raylet(check_alive=False)
        self.nodes.remove(node)

    def kill_head(self) -> None:
        """Kill the process that knows the cluster (Ray: the GCS) with SIGKILL."""
        self._remember()
        self.nodes[0].handle.kill_gcs_server(check_alive=False)

    def freeze_raylet(self, node: RayNode) -> None:
        """Stop a node's raylet with SIGSTOP."""
        node.raylet.suspend()

    def pids(self) -> set[int]:
        """Return the pids of all processes of the cluster, also of those that ended."""
        self._remember()
        return {p.pid for p in self._known}

    def _remember(self) -> None:
        for node in self.nodes:
            for infos in node.handle.all_processes.values():
                for info in infos:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process = psutil.Process(info.process.pid)
                        self._known |= {process, *process.children(recursive=True)}

    def close(self) -> None:
        """End all that the cluster started, and nothing else."""
        # A stopped raylet starts no more workers, so that none escapes.
        for node in self.nodes:
            with contextlib.suppress(psutil.NoSuchProcess):
                node.raylet.suspend()
        self._remember()
        for process in self._known:
            # psutil compares start times: a pid that the system gave away again is left alone.
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(self._known, timeout=5)
        self._cluster.shutdown()


@contextmanager
def ray_cluster(
    num_nodes: int, cpus_each: int, *, fast_failure_detection: bool = True
) -> Iterator[RayCluster]:
    """Run a Ray cluster; `ray.init(address=cluster.address)` connects to it.

    The head takes about 4 s to start and each other node 1 to 2 s; three take 570 MiB. A driver
    that is still connected at the end is disconnected.
    """
    import ray
    from ray.cluster_utils import Cluster

    # Sockets lie in this folder, and their paths may have 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))
    (folder / "ray").mkdir()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with mock.patch.dict(os.environ, {**RAY_ENVIRONMENT, "RAY_TMPDIR": str(folder)}):
            cluster = RayCluster(Cluster(initialize_head=False), cpus_each)
            try:
                cluster.start_head(FAST_FAILURE_DETECTION if fast_failure_detection else None)
                for _ in range(num_nodes - 1):
                    cluster.add_node()
                yield cluster
            finally:
                ray.shutdown()
                cluster.close()
    finally:
        signal.signal(signal.SIGTERM, handler)  # drivers put one of theirs in its place
        shutil.rmtree(folder)
