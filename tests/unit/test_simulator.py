"""The simulator agrees with what can be computed by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from della_dist.plan.layout import GIB
from tests.bench.simulator import Faults, Hardware, Merge, simulate

#: 64 shards of 1 GiB; 256 GiB read, so that 320 GiB are moved.
MERGE = Merge("x", 32 * GIB, 3)
CLIENT_BYTES_PER_S = 1 * GIB
#: Only the client library is slow.
HARDWARE = Hardware(
    workers_per_node=1,
    network_bytes_per_s=math.inf,
    client_bytes_per_s=CLIENT_BYTES_PER_S,
    flow_bytes_per_s=math.inf,
    elements_per_core_s=math.inf,
    latency_s=0,
)
NO_FAULTS = Faults(worker_start_s=0)


def wall_s(hardware: Hardware, num_nodes: int = 1, faults: Faults = NO_FAULTS) -> float:
    return simulate(MERGE, num_nodes, hardware=hardware, faults=faults).wall_s


def test_shards() -> None:
    assert MERGE.shard_bytes() == [GIB] * 64
    odd = Merge("odd", 405_853_388_801, 4)
    assert sum(odd.shard_bytes()) == odd.output_bytes
    assert max(odd.shard_bytes()) <= 5 * GIB


@pytest.mark.parametrize(
    ("hardware", "expected_s"),
    [
        (HARDWARE, 320),
        (replace(HARDWARE, network_bytes_per_s=GIB / 2), 512),
        (replace(HARDWARE, bucket_bytes_per_s=GIB / 4), 1024),
        (replace(HARDWARE, flow_bytes_per_s=GIB / 160, write_connections=16), 2560),
        (replace(HARDWARE, flow_bytes_per_s=GIB / 64, write_connections=4), 1024),
        (replace(HARDWARE, cores=2, elements_per_core_s=GIB / 20), 960),
    ],
    ids=["client", "network", "bucket", "reading", "writing", "computing"],
)
def test_one_node_takes_what_its_slowest_part_takes(hardware: Hardware, expected_s: float) -> None:
    assert wall_s(hardware) == pytest.approx(expected_s)


def test_the_network_is_shared_by_the_workers_of_a_node() -> None:
    hardware = replace(HARDWARE, workers_per_node=4)
    assert wall_s(hardware) == pytest.approx(320 / 4)
    hardware = replace(hardware, network_bytes_per_s=GIB)
    assert wall_s(hardware) == pytest.approx(256)


@pytest.mark.parametrize("num_nodes", [2, 4, 16, 32])
def test_n_nodes_are_n_times_as_fast(num_nodes: int) -> None:
    assert wall_s(HARDWARE, num_nodes) == pytest.approx(320 / num_nodes)
    outcome = simulate(MERGE, num_nodes, hardware=HARDWARE, faults=NO_FAULTS)
    assert outcome.utilisation == pytest.approx(1)


def test_more_nodes_do_not_help_where_the_bucket_is_the_limit() -> None:
    hardware = replace(HARDWARE, bucket_bytes_per_s=GIB)
    assert wall_s(hardware, 8) == wall_s(hardware, 16) == pytest.approx(256)


def test_latency_comes_on_top() -> None:
    hardware = replace(HARDWARE, latency_s=0.1, requests_in_a_row=10)
    # Two attempts that share a worker begin and end together where nothing tells them apart.
    assert wall_s(hardware) == pytest.approx(320 + 32)
    one = simulate(MERGE, 1, hardware=hardware, faults=NO_FAULTS, in_flight=1)
    assert one.wall_s == pytest.approx(320 + 64)


def test_half_of_two_nodes_slow() -> None:
    # What the fast one does is not held up: 4/5 of the tasks are its own.
    faults = replace(NO_FAULTS, slow_nodes=1)
    assert 320 * 4 / 5 <= wall_s(HARDWARE, 2, faults) < 320 * 4 / 5 + 2 * 5 * 4


@pytest.mark.parametrize("seed", range(5))
def test_every_task_is_committed_once_whatever_fails(seed: int) -> None:
    faults = Faults(
        node_lifetime_s=150,
        replacement_s=20,
        preempted_nodes=1,
        preempted_at_s=8,
        slow_nodes=1,
        jitter=0.2,
    )
    outcome = simulate(MERGE, 8, hardware=HARDWARE, faults=faults, seed=seed)
    assert sorted(outcome.commits) == list(range(64))
    assert outcome.workers_lost >= 1
    assert outcome.tasks_retried >= 1
    assert outcome.bytes_written >= MERGE.output_bytes - 1
    assert outcome == simulate(MERGE, 8, hardware=HARDWARE, faults=faults, seed=seed)


def test_dead_nodes_that_nobody_reports() -> None:
    faults = replace(NO_FAULTS, preempted_nodes=1, preempted_at_s=32, frozen_share=1)
    outcome = simulate(MERGE, 2, hardware=HARDWARE, faults=faults)
    assert (outcome.workers_lost, outcome.tasks_retried) == (1, 2)
    # Heard of at 30 s, stopped at 90 s, replaced at 270 s; what was done since 30 s is lost. One
    # node does 240 s of the 260 s of work that are left then, and two share the rest.
    assert outcome.wall_s == pytest.approx(270 + 20 / 2)
