"""Finds the worker processes of a run, and does harm to them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import pytest

from della_dist.runtime.engines.events import Limits
from della_dist.runtime.engines.ray import pool as ray_engine
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

    def make_zombie(self, over: threading.Event) -> tuple[Staged, RayNode]:
        """Stop a worker in the middle of a task, and the raylet of its node.

        The raylet would kill it when it is told to, and a worker that wakes up without one ends
        itself at once. The first node is left alone.
        """
        while not over.is_set():
            for staged in self.staged():
                node = self.node_of(staged.worker)
                if node in self._cluster.nodes[1:]:
                    staged.worker.suspend()
                    wait_for(partial(_is_stopped, staged.worker))
                    if staged.path.exists():
                        assert node is not None
                        self._cluster.freeze_raylet(node)
                        return staged, node
                    staged.worker.resume()  # it was committed just before
        raise AssertionError("the run was over before a worker was hit")


def is_writing(staged: Staged) -> bool:
    """Tell whether a worker lives and has not let go of what it was writing."""
    with suppress(OSError):
        for descriptor in Path(f"/proc/{staged.worker.pid}/fd").iterdir():
            with suppress(OSError):
                if str(descriptor.readlink()).startswith(str(staged.path)):  # or it and "(deleted)"
                    return True
    return False


def _is_stopped(process: psutil.Process) -> bool:
    return bool(process.status() == psutil.STATUS_STOPPED)


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


def set_limits(monkeypatch: pytest.MonkeyPatch, limits: Limits) -> None:
    """Let pools have other limits, and hear of their workers more often."""
    monkeypatch.setattr(ray_engine, "Limits", lambda: limits)
    monkeypatch.setattr(ray_engine, "PROGRESS_S", 0.2)


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
