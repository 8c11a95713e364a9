"""Merges that nobody here can afford, simulated: how long they take, and what faults cost.

Prints a table, and what it assumes::

    python -m tests.bench.bench_simulator [--rounds 5]
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace

from tests.bench.simulator import Faults, Hardware, Merge, Outcome, simulate


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

#: What a partition of a bucket allows: 5,500 GET a second, of 8 MiB each.
HARDWARE = Hardware(bucket_bytes_per_s=5500 * (8 << 20))

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
Assumed: all checkpoints and the output are BF16, in an object store. A node has
{HARDWARE.workers_per_node} workers, each with {HARDWARE.read_connections} connections to read and
{HARDWARE.write_connections} to write of {HARDWARE.flow_bytes_per_s / 1e6:.0f} MB/s.
A worker moves {HARDWARE.client_bytes_per_s / 1e9:.2f} GB/s at most (its client library), a node
{HARDWARE.network_bytes_per_s * 8 / 1e9:.0f} Gb/s each way, the bucket delivers
{HARDWARE.bucket_bytes_per_s / 1e9:.0f} GB/s. The {HARDWARE.cores} cores of a node (32 vCPU) merge
{HARDWARE.elements_per_core_s / 1e6:.0f} M expert-elements/s each.
An attempt begins with {HARDWARE.requests_in_a_row} requests of {HARDWARE.latency_s * 1e3:.0f} ms in
a row; its pace varies by {NONE.jitter:.0%}.
Nodes die: after {NODES_DIE.node_lifetime_s / 60:.0f} min in the mean; {NODES_DIE.frozen_share:.0%}
of the deaths are only noticed by silence, the others after {NODES_DIE.detection_s:.0f} s.
Preempted: a quarter of the nodes at once, after {NONE.preempted_at_s:.0f} s.
A new node takes {NONE.replacement_s:.0f} s.
Slow nodes: one in eight takes {NONE.slowness:.0f} times as long for everything.
"""

HEADINGS = (
    "merge", "nodes", "faults", "tasks", "TB read", "TB written", "wall time", "GB/s",
    "workers lost", "tasks retried", "stragglers", "utilisation",
)  # fmt: skip


def row(cluster: Cluster, name: str, outcome: Outcome) -> list[str]:
    """Return the cells of a simulation."""
    moved = outcome.bytes_read + outcome.bytes_written
    return [
        cluster.merge.name,
        str(cluster.num_nodes),
        name,
        str(len(outcome.commits)),
        f"{outcome.bytes_read / 1e12:.2f}",
        f"{outcome.bytes_written / 1e12:.2f}",
        f"{outcome.wall_s:.0f} s",
        f"{moved / outcome.wall_s / 1e9:.1f}",
        str(outcome.workers_lost),
        str(outcome.tasks_retried),
        str(outcome.stragglers),
        f"{outcome.utilisation:.0%}",
    ]


def main() -> None:
    """Run the simulations."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="seeds; the median run is shown")
    seeds = range(parser.parse_args().rounds)
    print(ASSUMPTIONS)
    print(f"| {' | '.join(HEADINGS)} |")
    print(f"|{'---|' * len(HEADINGS)}")
    for cluster in CLUSTERS:
        for name, kind in faults(cluster.num_nodes).items():
            outcomes = [
                simulate(cluster.merge, cluster.num_nodes, hardware=HARDWARE, faults=kind, seed=s)
                for s in seeds
            ]
            median = sorted(outcomes, key=lambda o: o.wall_s)[len(outcomes) // 2]
            print(f"| {' | '.join(row(cluster, name, median))} |", flush=True)


if __name__ == "__main__":
    main()
