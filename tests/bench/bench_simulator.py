"""Merges that nobody here can afford, simulated: how long they take, and what faults cost.

Prints a table, and what it assumes::

    python -m tests.bench.bench_simulator [--seed N]
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

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

JITTER = 0.1


def faults(num_nodes: int) -> dict[str, Faults]:
    """Return what may go wrong on a cluster."""
    return {
        "none": Faults(jitter=JITTER),
        "nodes die": Faults(jitter=JITTER, node_lifetime_s=900),
        "preempted": Faults(jitter=JITTER, preempted_nodes=num_nodes // 4),
        "slow nodes": Faults(jitter=JITTER, slow_nodes=num_nodes // 8),
    }


ASSUMPTIONS = f"""\
All checkpoints and the output are BF16, in an object store. A node has {HARDWARE.workers_per_node}
workers with {HARDWARE.read_connections} connections for reading and {HARDWARE.write_connections} for
writing, {HARDWARE.flow_bytes_per_s / 1e6:.0f} MB/s each;
a worker moves {HARDWARE.client_bytes_per_s / 1e9:.2f} GB/s at most (its client library), a node
{HARDWARE.network_bytes_per_s * 8 / 1e9:.0f} Gb/s each way, the bucket delivers
{HARDWARE.bucket_bytes_per_s / 1e9:.0f} GB/s. {HARDWARE.cores} cores a node merge
{HARDWARE.elements_per_core_s / 1e6:.0f} M expert-elements/s each.
An attempt begins with {HARDWARE.requests_in_a_row} requests of {HARDWARE.latency_s * 1e3:.0f} ms.
Its pace varies by {JITTER:.0%}.
Nodes die: each after {faults(16)["nodes die"].node_lifetime_s / 60:.0f} min in the mean; a quarter of
them is only noticed by silence. Preempted: a quarter of the nodes at once after
{Faults.preempted_at_s:.0f} s. A new node takes {Faults.replacement_s:.0f} s. Slow: one node in
eight, {Faults.slowness:.0f} times.
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
    parser.add_argument("--seed", type=int, default=0)
    seed = parser.parse_args().seed
    print(ASSUMPTIONS)
    print(f"| {' | '.join(HEADINGS)} |")
    print(f"|{'---|' * len(HEADINGS)}")
    for cluster in CLUSTERS:
        for name, kind in faults(cluster.num_nodes).items():
            outcome = simulate(
                cluster.merge, cluster.num_nodes, hardware=HARDWARE, faults=kind, seed=seed
            )
            print(f"| {' | '.join(row(cluster, name, outcome))} |", flush=True)


if __name__ == "__main__":
    main()
