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


if __name__ == "__main__":
    main()
