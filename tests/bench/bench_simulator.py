"""Merges that nobody here can afford, simulated: how long they take, and what faults cost.

Prints a table, and what it assumes::

    python -m tests.bench.bench_simulator [--rounds 5]
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from della_dist.runtime.budget import IN_FLIGHT
from tests.bench.cluster_model import Faults, Hardware, Merge
from tests.bench.matrix_merges import matrix_merge
from tests.bench.simulator import Outcome, simulate


@dataclass(frozen=True, slots=True)
class Cluster:
    """A merge, and how many nodes it gets."""

    merge: Merge
    num_nodes: int


CLUSTERS = [
    Cluster(Merge("Llama 405B x 4", 405_853_388_800, 4), 16),
    Cluster(Merge("DeepSeek-V3 x 3", 671_026_419_200, 3), 16),
    Cluster(Merge("1 T x 8", 1_000_000_000_000, 8), 64),
]

HARDWARE = Hardware()
#: Seeds, of which the median run is shown.
NUM_ROUNDS = 5


#: Of a GPU, in float64 on tensor cores: https://www.nvidia.com/en-us/data-center/h100/ (SXM) and
#: https://www.nvidia.com/en-us/data-center/h200/ say 67 TFLOP/s; so much of it is assumed.
GPU_PEAK_PER_S = 67e12
GPU_SHARE = 0.7
#: As AWS p5 and p5en: 192 vCPU and 8 GPUs.
GPU_NODE = Hardware(
    workers_per_node=8,
    network_bytes_per_s=100e9 / 8,
    cores=96,
    products_per_gpu_s=GPU_SHARE * GPU_PEAK_PER_S,
)
#: Of merges of whole matrices, which take hours.
MATRIX_HEARTBEAT_S = 30.0

NONE = Faults(jitter=0.1)
NODES_DIE = replace(NONE, node_lifetime_s=900)


def faults(num_nodes: int) -> dict[str, Faults]:
    """Return what may go wrong on a cluster."""
    return {
        "none": NONE,
        "nodes die": NODES_DIE,
        "preempted": replace(NONE, preempted_nodes=num_nodes // 4),
        "slow nodes": replace(NONE, slow_nodes=num_nodes // 8),
    }


ASSUMPTIONS = f"""\
Assumed: all checkpoints and the output are BF16, in S3. A node has {HARDWARE.workers_per_node}
workers with {IN_FLIGHT} shards in flight each. A worker reads by {HARDWARE.read_connections}
connections and writes by {HARDWARE.write_connections} a shard, of
{HARDWARE.flow_bytes_per_s / 1e6:.0f} MB/s each; its S3 client moves
{HARDWARE.client_bytes_per_s / 1e9:.1f} GB/s at most, both directions together. A node has
{HARDWARE.network_bytes_per_s * 8 / 1e9:.0f} Gb/s each way, and {HARDWARE.cores} cores
(32 vCPU) that merge {HARDWARE.elements_per_core_s / 1e6:.0f} M expert-elements/s each.
The inputs together get {HARDWARE.gets_per_s:,} GET/s, the output {HARDWARE.puts_per_s:,} PUT/s,
which S3 documents for one partition; requests are of {HARDWARE.get_bytes >> 20} MiB.
An attempt begins with {HARDWARE.requests_in_a_row} requests of {HARDWARE.latency_s * 1e3:.0f} ms in
a row; its pace varies by {NONE.jitter:.0%}. A worker takes {NONE.worker_start_s:.0f} s to start.
Nodes die: after {NODES_DIE.node_lifetime_s / 60:.0f} min in the mean; {NODES_DIE.frozen_share:.0%}
of the deaths are only noticed by silence, the others after {NODES_DIE.detection_s:.0f} s.
Preempted: a quarter of the nodes at once, after {NONE.preempted_at_s:.0f} s.
A new node takes {NONE.replacement_s:.0f} s.
Slow nodes: one in eight takes {NONE.slowness:.0f} times as long for everything.
"""

MATRIX_ASSUMPTIONS = f"""
wudi, of three experts. Assumed: the nodes above; or nodes of {GPU_NODE.cores} cores with
{GPU_NODE.network_bytes_per_s * 8 / 1e9:.0f} Gb/s each way and {GPU_NODE.workers_per_node} GPUs,
of each of which a worker has one. A core does {HARDWARE.products_per_core_s / 1e9:.1f} GFLOP/s of
products, {HARDWARE.inverses_per_core_s / 1e9:.1f} of inverses, and forms and rounds
{HARDWARE.matrix_elements_per_core_s / 1e6:.1f} M expert-elements/s. A GPU does products alone, at
{GPU_SHARE:.0%} of the {GPU_PEAK_PER_S / 1e12:.0f} TFLOP/s of its float64 tensor cores. Of a
worker's two shards one matrix at a time is merged, on all of its cores. What is held fits.
"""

MATRIX_HEADINGS = (
    "merge", "nodes", "GPUs", "faults", "tasks", "operations", "TB read", "GiB held",
    "longest task", "inverses", "wall time",
)  # fmt: skip
HEADINGS = (
    "merge", "nodes", "faults", "tasks", "TB read", "TB written", "wall time", "GB/s",
    "workers lost", "tasks retried", "stragglers",
)  # fmt: skip


def run(cluster: Cluster, name: str, seed: int) -> Outcome | None:
    """Return what a run took; None if the scheduler gave up."""
    kind = faults(cluster.num_nodes)[name]
    try:
        return simulate(cluster.merge, cluster.num_nodes, hardware=HARDWARE, faults=kind, seed=seed)
    except RuntimeError:
        return None


def row(cluster: Cluster, name: str, outcomes: Sequence[Outcome | None]) -> list[str]:
    """Return the cells of the median run; those that gave up took longest."""
    walls_s = [math.inf if outcome is None else outcome.wall_s for outcome in outcomes]
    median = outcomes[sorted(range(len(outcomes)), key=walls_s.__getitem__)[len(outcomes) // 2]]
    cells = [cluster.merge.name, str(cluster.num_nodes), name]
    if median is None:
        return [*cells, "gave up", *[""] * (len(HEADINGS) - len(cells) - 1)]
    moved = median.bytes_read + median.bytes_written
    return [
        *cells,
        str(len(median.commits)),
        f"{median.bytes_read / 1e12:.2f}",
        f"{median.bytes_written / 1e12:.2f}",
        f"{median.wall_s:.0f} s",
        f"{moved / median.wall_s / 1e9:.1f}",
        str(median.workers_lost),
        str(median.tasks_retried),
        str(median.stragglers),
    ]


@dataclass(frozen=True, slots=True)
class MatrixCluster:
    """A merge of whole matrices, and what it gets."""

    size: str
    """Of the model."""
    num_nodes: int
    hardware: Hardware = HARDWARE
    faults: str = "none"


MATRIX_CLUSTERS = [
    MatrixCluster("8B", 1),
    MatrixCluster("70B", 4),
    MatrixCluster("70B", 4, faults="nodes die"),
    MatrixCluster("405B", 16),
    MatrixCluster("8B", 1, GPU_NODE),
    MatrixCluster("70B", 1, GPU_NODE),
    MatrixCluster("70B", 1, GPU_NODE, "nodes die"),
    MatrixCluster("405B", 4, GPU_NODE),
]


def matrix_row(cluster: MatrixCluster, num_rounds: int) -> list[str]:
    """Return the cells of a merge of whole matrices."""
    made, hardware = matrix_merge(cluster.size), cluster.hardware
    tasks = made.merge.tasks()
    kind = faults(cluster.num_nodes)[cluster.faults]
    walls_s = sorted(_wall_s(made.merge, cluster, kind, seed) for seed in range(num_rounds))
    wall_s = walls_s[num_rounds // 2]
    total_s = math.fsum(map(hardware.matrix_s, tasks))
    inverses_s = math.fsum(map(hardware.inverses_s, tasks))
    on_gpus = hardware.products_per_gpu_s is not None
    threads = hardware.cores // hardware.workers_per_node
    return [
        made.merge.name,
        str(cluster.num_nodes),
        str(cluster.num_nodes * hardware.workers_per_node) if on_gpus else "",
        cluster.faults,
        str(len(tasks)),
        f"{sum(task.products + task.inverses for task in tasks):.1e}",
        f"{made.merge.output_bytes * made.merge.read_per_output / 1e12:.2f}",
        "" if on_gpus else f"{made.largest.held_bytes(threads) / 2**30:.0f}",
        _duration(max(map(hardware.matrix_s, tasks))),
        f"{inverses_s / total_s:.0%}",
        "gave up" if wall_s == math.inf else _duration(wall_s),
    ]


def _wall_s(merge: Merge, cluster: MatrixCluster, kind: Faults, seed: int) -> float:
    """Return how long a run took; infinity if the scheduler gave up."""
    try:
        return simulate(
            merge,
            cluster.num_nodes,
            hardware=cluster.hardware,
            faults=kind,
            seed=seed,
            heartbeat_s=MATRIX_HEARTBEAT_S,
        ).wall_s
    except RuntimeError:
        return math.inf


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 3600:.2g} h"


def table_line(cells: Iterable[str]) -> str:
    """Return a line of a table."""
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Run the simulations."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=NUM_ROUNDS, help="the median run is shown")
    num_rounds = parser.parse_args().rounds
    print(ASSUMPTIONS)
    print(table_line(HEADINGS))
    print(f"|{'---|' * len(HEADINGS)}")
    notes = []
    for cluster in CLUSTERS:
        for name in faults(cluster.num_nodes):
            outcomes = [run(cluster, name, seed) for seed in range(num_rounds)]
            print(table_line(row(cluster, name, outcomes)), flush=True)
            if gave_up := outcomes.count(None):
                notes.append(f"{cluster.merge.name}, {name}: {gave_up} of {num_rounds} gave up.")
    if notes:
        print("", *notes, sep="\n")
    print(MATRIX_ASSUMPTIONS)
    print(table_line(MATRIX_HEADINGS))
    print(f"|{'---|' * len(MATRIX_HEADINGS)}")
    for wanted in MATRIX_CLUSTERS:
        print(table_line(matrix_row(wanted, num_rounds)), flush=True)


if __name__ == "__main__":
    main()
