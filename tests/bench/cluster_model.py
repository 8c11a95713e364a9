"""What the simulator assumes: the merge, the nodes with their way to the store, and the faults.

Reading, computing and writing overlap, so that the slowest of them sets the pace of an attempt.
Limits are those of an attempt, of its worker, of their node and of the store; what one attempt
cannot use of a limit goes to the others.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass

from della_dist.planning.layout import default_shard_bytes
from della_dist.runtime.budget import MAX_CONNECTIONS
from della_dist.storage.remote.files import REQUEST_BYTES
from della_dist.storage.remote.upload import MIN_PART_BYTES, UPLOADS_IN_FLIGHT


@dataclass(frozen=True, slots=True)
class Shard:
    """One task: what it writes, what the scheduler is told, and its work on whole matrices."""

    output_bytes: int
    cost_bytes: int
    products: int = 0
    """Operations in float64 that the device does."""
    inverses: int = 0
    """Those that the CPU does, whatever the device."""
    matrix_elements: int = 0
    """Expert-elements of what is merged as a whole, to be formed and rounded one by one."""


@dataclass(frozen=True, slots=True)
class Merge:
    """What is merged."""

    name: str
    num_parameters: int
    num_experts: int
    bytes_per_parameter: int = 2
    reads: float = 1.0
    """How often everything is read, in the mean."""
    shards: tuple[Shard, ...] = ()
    """None: so many even ones as the layout makes."""

    @property
    def output_bytes(self) -> int:
        """Bytes that are written; each time, as many are read from the base and every expert."""
        return self.num_parameters * self.bytes_per_parameter

    @property
    def read_per_output(self) -> float:
        """Bytes read a byte written."""
        return (self.num_experts + 1) * self.reads

    @property
    def elements_per_output(self) -> float:
        """Expert-elements a byte written."""
        return self.num_experts / self.bytes_per_parameter

    def tasks(self) -> tuple[Shard, ...]:
        """Return the shards."""
        moved = 1 + self.num_experts + 1
        return self.shards or tuple(Shard(size, size * moved) for size in self.shard_bytes())

    def shard_bytes(self) -> list[int]:
        """Return the sizes of even shards, as the layout makes them."""
        count = -(-self.output_bytes // default_shard_bytes(self.output_bytes))
        ends = [self.output_bytes * i // count for i in range(count + 1)]
        return [stop - start for start, stop in itertools.pairwise(ends)]


@dataclass(frozen=True, slots=True)
class Hardware:
    """A node, and its way to the store."""

    workers_per_node: int = 4
    network_bytes_per_s: float = 25e9 / 8
    """Of a node, in each direction."""
    client_bytes_per_s: float = 1.2e9
    """What the S3 client of one process moves, both directions together."""
    flow_bytes_per_s: float = 85e6
    """Of one connection."""
    read_connections: int = MAX_CONNECTIONS
    """Of a worker."""
    write_connections: int = UPLOADS_IN_FLIGHT
    """Of a shard: its parts that are uploaded at once."""
    gets_per_s: float = 5500
    """Of all nodes together, `get_bytes` each. This and the next are what S3 documents for one
    partition: https://docs.aws.amazon.com/AmazonS3/latest/userguide/optimizing-performance.html"""
    puts_per_s: float = 3500
    """Of all nodes together, `put_bytes` each."""
    get_bytes: int = REQUEST_BYTES
    put_bytes: int = MIN_PART_BYTES
    latency_s: float = 0.03
    """Of a request."""
    requests_in_a_row: int = 10
    """Of an attempt, that nothing overlaps with."""
    cores: int = 16
    elements_per_core_s: float = 342e6
    """Expert-elements that the kernel merges."""
    products_per_core_s: float = 47e9
    """Operations of products in float64, and the next of inverses: `tests/bench/README.md`."""
    inverses_per_core_s: float = 20.5e9
    matrix_elements_per_core_s: float = 16.5e6
    """Expert-elements of what is merged as a whole, beside products and inverses."""
    products_per_gpu_s: float | None = None
    """Of the GPU that each worker has; None: products are the cores' as well."""

    @property
    def attempt_bytes_per_s(self) -> float:
        """What an attempt writes at most."""
        return self.write_connections * self.flow_bytes_per_s

    def matrix_s(self, shard: Shard) -> float:
        """Return how long a worker computes at the matrices of a shard, one after another."""
        cores = self.cores / self.workers_per_node
        products = self.products_per_gpu_s or cores * self.products_per_core_s
        elements_s = shard.matrix_elements / (cores * self.matrix_elements_per_core_s)
        return shard.products / products + self.inverses_s(shard) + elements_s

    def inverses_s(self, shard: Shard) -> float:
        """Return how much of that inverses take."""
        return shard.inverses / (self.cores / self.workers_per_node * self.inverses_per_core_s)

    def worker_bytes_per_s(self, merge: Merge) -> float:
        """Return what a worker writes at most, whatever runs beside it."""
        return min(
            self.read_connections * self.flow_bytes_per_s / merge.read_per_output,
            self.client_bytes_per_s / (1 + merge.read_per_output),
        )

    def node_bytes_per_s(self, merge: Merge) -> float:
        """Return what the workers of a node write at most."""
        return min(
            self.network_bytes_per_s / merge.read_per_output,
            self.network_bytes_per_s,
            self.cores * self.elements_per_core_s / merge.elements_per_output,
        )

    def store_bytes_per_s(self, merge: Merge) -> float:
        """Return what all nodes write at most."""
        return min(
            self.gets_per_s * self.get_bytes / merge.read_per_output,
            self.puts_per_s * self.put_bytes,
        )


@dataclass(frozen=True, slots=True)
class Faults:
    """What goes wrong."""

    node_lifetime_s: float = math.inf
    """Mean; nodes die at any time alike."""
    frozen_share: float = 0.25
    """Of the deaths: nobody reports them, and only silence tells."""
    detection_s: float = 15.0
    """Until a death is reported otherwise."""
    preempted_nodes: int = 0
    """All at once, at `preempted_at_s`."""
    preempted_at_s: float = 60.0
    replacement_s: float = 180.0
    """Until a new node is there."""
    worker_start_s: float = 5.0
    slow_nodes: int = 0
    slowness: float = 4.0
    """Times that a slow node takes what others take."""
    jitter: float = 0.0
    """Standard deviation of the logarithm of an attempt's pace, and of its share of a limit."""


def fair_level(capacity: float, demands: Iterable[tuple[float, float]]) -> float:
    """Return how much a weight of one gets of a capacity that is shared fairly.

    Parameters
    ----------
    capacity
        What there is.
    demands
        What somebody can use at most, and the weight of their share: they get the least of that
        and of the level times their weight. What they leave goes to the others.

    Returns
    -------
    float
        Infinity where there is enough for all.
    """
    demands = sorted(demands, key=lambda one: one[0] / one[1])
    weights = math.fsum(weight for _, weight in demands)
    for demand, weight in demands:
        if demand * weights > capacity * weight:
            return capacity / weights
        capacity -= demand
        weights -= weight
    return math.inf
