"""The simulator agrees with what can be computed by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from della_dist.planning.layout import GIB
from della_dist.planning.projection import OPERATIONS_PER_S_A_THREAD
from della_dist.runtime.budget import IN_FLIGHT
from della_dist.runtime.engines.events import Limits
from tests.bench.bench_simulator import (
    CLUSTERS,
    GPU_NODE,
    HEADINGS,
    MATRIX_CLUSTERS,
    MATRIX_HEADINGS,
    NUM_ROUNDS,
    matrix_row,
    row,
    run,
    table_line,
)
from tests.bench.cluster_model import Faults, Hardware, Merge, Shard, fair_level
from tests.bench.matrix_merges import LLAMAS, matrix_merge
from tests.bench.simulator import simulate
from tests.cluster_files import read

#: 64 shards of 1 GiB; 256 GiB read, so that 320 GiB are moved.
MERGE = Merge("x", 32 * GIB, 3)
CLIENT_BYTES_PER_S = 1 * GIB
#: Only the client library is slow.
HARDWARE = Hardware(
    workers_per_node=1,
    network_bytes_per_s=math.inf,
    client_bytes_per_s=CLIENT_BYTES_PER_S,
    flow_bytes_per_s=math.inf,
    gets_per_s=math.inf,
    puts_per_s=math.inf,
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
        (replace(HARDWARE, gets_per_s=32, get_bytes=GIB // 128), 1024),
        (replace(HARDWARE, puts_per_s=8, put_bytes=GIB // 128), 1024),
        (replace(HARDWARE, flow_bytes_per_s=GIB / 160, read_connections=16), 2560),
        (replace(HARDWARE, flow_bytes_per_s=GIB / 64, write_connections=2), 1024),
        (replace(HARDWARE, cores=2, elements_per_core_s=GIB / 20), 960),
    ],
    ids=["client", "network", "GETs", "PUTs", "reading", "writing", "computing"],
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


def test_more_nodes_do_not_help_where_the_store_is_the_limit() -> None:
    hardware = replace(HARDWARE, gets_per_s=128, get_bytes=GIB // 128)
    assert wall_s(hardware, 8) == wall_s(hardware, 16) == pytest.approx(256)


@pytest.mark.parametrize(
    ("capacity", "demands", "shares"),
    [
        (10, [(2, 1), (3, 1), (5, 1)], [2, 3, 5]),
        (9, [(2, 1), (3, 1), (5, 1)], [2, 3, 4]),
        (6, [(1, 1), (3, 1), (5, 1)], [1, 2.5, 2.5]),
        (6, [(9, 1), (9, 2)], [2, 4]),
        (6, [(1, 1), (9, 2), (9, 3)], [1, 2, 3]),
        (math.inf, [(9, 1)], [9]),
        (1, [], []),
    ],
)
def test_what_one_leaves_goes_to_the_others(
    capacity: float, demands: list[tuple[float, float]], shares: list[float]
) -> None:
    level = fair_level(capacity, demands)
    assert [min(demand, level * weight) for demand, weight in demands] == shares


def test_a_slow_node_leaves_its_share_of_the_store_to_the_others() -> None:
    # At full speed both nodes together could use twice what the store delivers.
    hardware = replace(HARDWARE, gets_per_s=102.4, get_bytes=GIB // 128)
    assert wall_s(hardware, 2) == pytest.approx(320)
    # The slow one moves a quarter of what it could: the other gets the rest, up to its own limit.
    faults = replace(NO_FAULTS, slow_nodes=1)
    assert 319 < wall_s(hardware, 2, faults) < 320 + 5 * 4 * 2


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


def test_readme_has_what_the_benchmark_prints() -> None:
    lines = read("README.md").splitlines()
    assert table_line(HEADINGS) in lines
    cluster = CLUSTERS[0]
    for name in ("none", "slow nodes"):
        outcomes = [run(cluster, name, seed) for seed in range(NUM_ROUNDS)]
        assert table_line(row(cluster, name, outcomes)) in lines


@pytest.mark.parametrize(
    ("size", "num_parameters"), [("8B", 8_030_261_248), ("70B", 70_553_706_496)]
)
def test_matrices_of_real_models(size: str, num_parameters: int) -> None:
    """As many parameters as their files have; all matrices count, the embeddings' among them."""
    hidden, intermediate, layers, vocab, kv_rows = LLAMAS[size]
    made = matrix_merge(size)
    assert made.merge.num_parameters == num_parameters
    shards = made.merge.tasks()
    # Queries and outputs, gates and what goes up, the embedding and the head: as wide as they are.
    rows = layers * (2 * hidden + 2 * intermediate) + 2 * vocab
    products = 2 * 7 * rows * hidden**2
    inverses = (4 * layers + 2) * hidden**3
    # Of keys and values, and of what goes down, all experts have fewer rows than columns.
    for count, height, width in ((2, kv_rows, hidden), (1, hidden, intermediate)):
        stacked = 3 * height
        assert stacked < width
        products += layers * count * (stacked + 2 * height) * stacked * width
        inverses += layers * count * (stacked + 2 * height) * stacked**2
    assert sum(shard.products for shard in shards) == products
    assert sum(shard.inverses for shard in shards) == inverses
    # Once for the largest deltas, once for the Gram matrices, once to merge; vectors once.
    assert made.merge.reads == pytest.approx(3, rel=1e-3)


def test_no_shard_of_whole_matrices_is_taken_for_hung() -> None:
    """Not on a single slow thread, which has several shards at once."""
    limits = Limits()
    for shard in matrix_merge("405B").merge.tasks():
        allowed_s = limits.deadline_base_s + shard.cost_bytes / limits.slowest_bytes_per_s
        takes_s = (shard.products + shard.inverses) / OPERATIONS_PER_S_A_THREAD
        assert allowed_s > 5 * IN_FLIGHT * takes_s


def test_matrices_set_the_pace_of_the_worker_that_has_them() -> None:
    hardware = replace(
        HARDWARE,
        workers_per_node=2,
        cores=8,
        client_bytes_per_s=math.inf,
        products_per_core_s=10,
        inverses_per_core_s=5,
        matrix_elements_per_core_s=1,
    )
    shard = Shard(GIB, 1000 * GIB, products=8000, inverses=1000, matrix_elements=400)
    merge = Merge("x", 4 * GIB, 3, shards=(shard,) * 8)
    # 200 s of products, 50 s of inverses, 100 s of elements: a shard on the four cores of a worker.
    assert hardware.matrix_s(shard) == 350
    found = simulate(merge, 1, hardware=hardware, faults=NO_FAULTS)
    assert found.wall_s == pytest.approx(8 * 350 / 2)
    # One large shard is no faster for the workers that have nothing to do.
    lone = Merge("x", 4 * GIB, 3, shards=(replace(shard, products=80_000),))
    found = simulate(lone, 4, hardware=hardware, faults=NO_FAULTS)
    assert found.wall_s == pytest.approx(2150)
    on_gpus = replace(hardware, products_per_gpu_s=80)
    assert on_gpus.matrix_s(shard) == 100 + 50 + 100


def test_readme_has_what_the_benchmark_prints_of_matrices() -> None:
    lines = read("README.md").splitlines()
    assert table_line(MATRIX_HEADINGS) in lines
    quick = [cluster for cluster in MATRIX_CLUSTERS if cluster.size == "8B"]
    assert {cluster.hardware is GPU_NODE for cluster in quick} == {True, False}
    for cluster in quick:
        assert table_line(matrix_row(cluster, NUM_ROUNDS)) in lines
