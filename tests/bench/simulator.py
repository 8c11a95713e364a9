"""A merge on a cluster that nobody has: the real scheduler, with modelled nodes.

Every worker is a process that streams from and to an object store, as fast as
`tests.bench.cluster_model` lets it. Each attempt begins with a few requests that wait for each
other. Nodes die, freeze, are preempted or are slow. Random numbers come from one seeded generator:
a simulation is repeatable.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from della_dist.runtime.budget import IN_FLIGHT
from della_dist.runtime.engines.events import (
    Abort,
    Action,
    AddWorker,
    Attempt,
    Commit,
    Done,
    Event,
    Finished,
    Heard,
    Limits,
    Start,
    Stop,
    Task,
    Tick,
    WorkerLost,
    WorkerReady,
)
from della_dist.runtime.engines.scheduler import Scheduler
from tests.bench.cluster_model import Faults, Hardware, Merge, fair_level

#: How often workers are heard of.
HEARTBEAT_S = 5.0
#: Attempts that have less to write are done: what is left are rounding errors.
ROUNDING_BYTES = 1e-3


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a simulated run took."""

    wall_s: float
    commits: tuple[int, ...]
    """Tasks in the order in which they were committed."""
    bytes_read: float
    """In vain as well, as below."""
    bytes_written: float
    workers_lost: int
    tasks_retried: int
    stragglers: int


@dataclass(slots=True, eq=False)
class _Node:
    name: str
    speed: float = 1.0
    ready_s: float = 0.0
    num_workers: int = 0
    """Running or on their way."""
    alive: bool = True


@dataclass(slots=True, eq=False)
class _Job:
    attempt: Attempt
    speed: float
    left_bytes: float
    """To be written."""
    matrix_bytes_per_s: float
    """What its worker writes of it at most, if it merges no other matrices meanwhile."""
    moving: bool = False
    """Its first requests are answered."""


@dataclass(slots=True, eq=False)
class _Worker:
    name: str
    node: _Node
    moved_bytes: float = 0.0
    jobs: list[_Job] = field(default_factory=list)
    stopped: bool = False

    @property
    def alive(self) -> bool:
        return self.node.alive and not self.stopped

    @property
    def moving(self) -> list[_Job]:
        return [job for job in self.jobs if job.moving]


@dataclass(slots=True, eq=False)
class _Share:
    """What a job can write a second, and its weight where there is not enough for all."""

    worker: _Worker
    job: _Job
    bytes_per_s: float
    weight: float


def _cap(shares: Sequence[_Share], bytes_per_s: float) -> None:
    """Bring shares down to what there is for all of them."""
    level = fair_level(bytes_per_s, [(share.bytes_per_s, share.weight) for share in shares])
    for share in shares:
        share.bytes_per_s = min(share.bytes_per_s, level * share.weight)


class _Simulation:
    def __init__(
        self,
        merge: Merge,
        num_nodes: int,
        hardware: Hardware,
        faults: Faults,
        seed: int,
        in_flight: int,
        limits: Limits | None,
        heartbeat_s: float,
    ) -> None:
        self.heartbeat_s = heartbeat_s
        self.merge = merge
        self.hardware = hardware
        self.faults = faults
        self.random = random.Random(seed)
        self.tasks = merge.tasks()
        self.scheduler = Scheduler(
            [Task(i, task.cost_bytes) for i, task in enumerate(self.tasks)],
            in_flight=in_flight,
            limits=limits,
            num_starting=num_nodes * hardware.workers_per_node,
        )
        self.now_s = 0.0
        self.order = itertools.count()
        self.agenda: list[tuple[float, int, Callable[[], None]]] = []
        self.nodes: list[_Node] = []
        self.workers: dict[str, _Worker] = {}
        self.written = 0.0
        self.commits: list[int] = []
        self.done = False
        for i in range(num_nodes):
            node = self.add_node()
            node.speed = 1 / faults.slowness if i < faults.slow_nodes else 1.0
            for _ in range(hardware.workers_per_node):
                self.add_worker(node, faults.worker_start_s)
        for node in self.nodes[: faults.preempted_nodes]:
            self.at(faults.preempted_at_s, partial(self.die, node))
        self.at(self.heartbeat_s, self.heartbeat)

    def at(self, delay_s: float, what: Callable[[], None]) -> None:
        heapq.heappush(self.agenda, (self.now_s + delay_s, next(self.order), what))

    def run(self) -> None:
        while not self.done:
            rates = self.rates()
            ends_s = [job.left_bytes / rate for _, job, rate in rates]
            step_s = min([*ends_s, self.agenda[0][0] - self.now_s])
            self.now_s += step_s
            for worker, job, rate in rates:
                job.left_bytes -= rate * step_s
                self.written += rate * step_s
                worker.moved_bytes += rate * step_s * (1 + self.merge.read_per_output)
            for worker, job, _ in rates:
                if job.left_bytes < ROUNDING_BYTES and worker.alive and not self.done:
                    worker.jobs.remove(job)
                    self.tell(Finished(worker.name, job.attempt))
            while self.agenda[0][0] <= self.now_s and not self.done:
                heapq.heappop(self.agenda)[2]()

    def rates(self) -> list[tuple[_Worker, _Job, float]]:
        """Return the jobs that move, and what they write a second."""
        hardware, merge = self.hardware, self.merge
        on_nodes: dict[_Node, list[_Share]] = {}
        for worker in self.workers.values():
            if worker.alive and (moving := worker.moving):
                of_worker = hardware.worker_bytes_per_s(merge)
                for job in moving:
                    # One matrix at a time is merged by a worker: each job has its turns.
                    mine = min(of_worker, job.matrix_bytes_per_s) / len(moving)
                    alone = min(hardware.attempt_bytes_per_s, mine)
                    share = alone * job.speed * worker.node.speed
                    on_nodes.setdefault(worker.node, []).append(
                        _Share(worker, job, share, job.speed / len(moving))
                    )
        for node, shares in on_nodes.items():
            _cap(shares, hardware.node_bytes_per_s(merge) * node.speed)
        everything = [share for shares in on_nodes.values() for share in shares]
        _cap(everything, hardware.store_bytes_per_s(merge))
        return [(share.worker, share.job, share.bytes_per_s) for share in everything]

    def tell(self, event: Event) -> None:
        actions = self.scheduler.handle(event, self.now_s)
        for action in actions:
            self.act(action)
        if actions or not isinstance(event, Heard):  # a sign of life alone changes no table
            self.scheduler.validate()

    def act(self, action: Action) -> None:
        match action:
            case Start(name, attempt):
                speed = self.random.lognormvariate(0, self.faults.jitter)
                task = self.tasks[attempt.task]
                matrix_s = self.hardware.matrix_s(task)
                most = task.output_bytes / matrix_s if matrix_s else math.inf
                job = _Job(attempt, speed, task.output_bytes, most)
                self.workers[name].jobs.append(job)
                delay_s = self.hardware.latency_s * self.hardware.requests_in_a_row
                self.at(delay_s, lambda: setattr(job, "moving", True))
            case Commit(attempt):
                self.commits.append(attempt.task)
            case Stop(name):
                worker = self.workers.pop(name)
                worker.stopped = True
                worker.node.num_workers -= 1
            case AddWorker():
                self.replace_worker()
            case Abort(error):
                raise RuntimeError(error)
            case Done():
                self.done = True

    def add_node(self) -> _Node:
        node = _Node(f"node{len(self.nodes)}")
        self.nodes.append(node)
        if self.faults.node_lifetime_s < math.inf:
            lifetime_s = self.random.expovariate(1 / self.faults.node_lifetime_s)
            self.at(lifetime_s, partial(self.die, node))
        return node

    def add_worker(self, node: _Node, delay_s: float) -> None:
        node.num_workers += 1
        worker = _Worker(f"worker{next(self.order)}", node)

        def begin() -> None:
            if node.alive:
                self.workers[worker.name] = worker
                self.tell(WorkerReady(worker.name, node.name))
            else:
                self.tell(WorkerLost(worker.name, "its node is gone"))

        self.at(delay_s, begin)

    def replace_worker(self) -> None:
        """Start a worker where there is room, on a new node if nowhere else."""
        for node in self.nodes:
            if node.alive and node.num_workers < self.hardware.workers_per_node:
                break
        else:
            node = self.add_node()
            node.ready_s = self.now_s + self.faults.replacement_s
        wait_s = max(0.0, node.ready_s - self.now_s)
        self.add_worker(node, wait_s + self.faults.worker_start_s)

    def die(self, node: _Node) -> None:
        if not node.alive:
            return
        node.alive = False
        if self.random.random() < self.faults.frozen_share:
            return
        for worker in self.workers.values():
            if worker.node is node:
                lost = WorkerLost(worker.name, "its node is gone")
                self.at(self.faults.detection_s, partial(self.tell, lost))

    def heartbeat(self) -> None:
        for worker in list(self.workers.values()):
            if worker.alive:
                self.tell(Heard(worker.name, int(worker.moved_bytes)))
        self.tell(Tick())
        self.at(self.heartbeat_s, self.heartbeat)


def simulate(
    merge: Merge,
    num_nodes: int,
    *,
    hardware: Hardware | None = None,
    faults: Faults | None = None,
    seed: int = 0,
    in_flight: int = IN_FLIGHT,
    limits: Limits | None = None,
    heartbeat_s: float = HEARTBEAT_S,
) -> Outcome:
    """Run a merge on nodes of which there are `num_nodes` at the start.

    Parameters
    ----------
    heartbeat_s
        How often workers are heard of: of merges that take hours less often will do.

    Raises
    ------
    RuntimeError
        If the scheduler gives up.
    """
    hardware, faults = hardware or Hardware(), faults or Faults()
    simulation = _Simulation(
        merge, num_nodes, hardware, faults, seed, in_flight, limits, heartbeat_s
    )
    simulation.run()
    return Outcome(
        wall_s=simulation.now_s,
        commits=tuple(simulation.commits),
        bytes_read=simulation.written * merge.read_per_output,
        bytes_written=simulation.written,
        workers_lost=simulation.scheduler.workers_lost,
        tasks_retried=simulation.scheduler.tasks_retried,
        stragglers=simulation.scheduler.stragglers,
    )
