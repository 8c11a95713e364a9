"""Finds the worker processes of a run, and does harm to them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.servers.ray_cluster import RayCluster, RayNode

POLL_S = 0.005
# One thread for all: what Ray starts in a thread dies with it (PR_SET_PDEATHSIG).
_thread = futures.ThreadPoolExecutor(1)


@dataclass(frozen=True)
class Staged:
    """A shard that a worker is writing."""

    path: Path
    shard: str
    worker: psutil.Process


class Workers:
    """The actors that work on one output, as the operating system sees them."""

    def __init__(self, cluster: RayCluster, out: Path) -> None:
        self._cluster = cluster
        self._staging = out / ".della" / "tmp"

    def staged(self) -> list[Staged]:
        """Return what is being written by workers that live."""
        found = []
        for path in self._staging.glob("model-*.safetensors.*"):
            shard, _, rest = path.name.partition(".safetensors.")
            with suppress(psutil.NoSuchProcess):
                worker = psutil.Process(int(rest.partition(".")[0]))
                if worker.status() != psutil.STATUS_ZOMBIE:
                    found.append(Staged(path, f"{shard}.safetensors", worker))
        return found

    def busy(self) -> list[psutil.Process]:
        """Return the workers in the middle of a task."""
        return list({staged.worker for staged in self.staged()})

    def starting(self) -> list[psutil.Process]:
        """Return the workers whose constructor runs."""
        found = []
        for node in list(self._cluster.nodes):
            with suppress(psutil.NoSuchProcess):
                found += [p for p in node.raylet.children() if _title(p) == "ray::_Actor.__init__"]
        return found

    def node_of(self, worker: psutil.Process) -> RayNode | None:
        """Return the node of a worker, None if its raylet is dead."""
        for node in list(self._cluster.nodes):
            with suppress(psutil.NoSuchProcess):
                if worker.pid in node.worker_pids():
                    return node
        return None

    def make_zombie(self, over: threading.Event) -> Staged:
        """Kill a node other than the first, and stop its worker in the middle of a task.

        In this order: a stopped process that loses its parent is ended by the system.
        """
        nodes = self._cluster.nodes[1:]
        while not over.is_set():
            for staged in self.staged():
                if self.node_of(staged.worker) in nodes:
                    node = self.node_of(staged.worker)
                    assert node is not None
                    self._cluster.kill_raylet(node)
                    return self._stop_in_task(staged.worker)
        raise AssertionError("the run was over before a worker was hit")

    def _stop_in_task(self, worker: psutil.Process) -> Staged:
        while True:
            for staged in self.staged():
                if staged.worker == worker:
                    worker.suspend()
                    wait_for(lambda: worker.status() == psutil.STATUS_STOPPED)
                    if staged.path.exists():
                        return staged
                    worker.resume()  # it was committed just before


def _title(process: psutil.Process) -> str:
    try:
        return str((process.cmdline() or [""])[0])
    except psutil.Error:
        return ""


def wait_for(condition: Callable[[], object], over: threading.Event | None = None) -> bool:
    """Wait until something holds (True) or `over` is set (False)."""
    deadline_s = time.monotonic() + 60
    while not condition():
        if over is not None and over.is_set():
            return False
        assert time.monotonic() < deadline_s, "waited for a minute in vain"
        time.sleep(POLL_S)
    return True


@contextmanager
def meanwhile(act: Callable[[threading.Event], None]) -> Iterator[None]:
    """Run `act` in a thread beside the block; it is told when the block has ended."""
    over = threading.Event()
    acting = _thread.submit(act, over)
    try:
        yield
    finally:
        over.set()
        futures.wait([acting])
    acting.result()
