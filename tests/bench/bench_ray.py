"""What the Ray engine costs, and how it scales.

1. A family of 1 B parameters on the local disk: the local engine and Ray with one actor, in turn.
   Time begins when kernels are loaded and the actor is ready.
2. Tasks that only wait: an S3 server that delays every answer by three seconds; 1 and 8 actors
   of one machine. Time begins when the actors are ready::

    python -m tests.bench.bench_ray [--rounds 3] [--skip cost|scaling]
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import ray

from della_dist.config import config_from_mapping, load_config
from della_dist.demo import make_family
from della_dist.planning.build import MergePlan
from della_dist.runtime.engines.drive import drive
from della_dist.runtime.engines.events import Event, WorkerReady
from della_dist.runtime.open_plan import open_plan
from della_dist.runtime.options import RunOptions
from della_dist.runtime.output.commit import Output
from della_dist.runtime.output.existing import open_output
from della_dist.runtime.run import open_pool
from della_dist.runtime.task.meter import Meter
from tests.servers.moto import s3_environment
from tests.servers.ray_cluster import RAY_ENVIRONMENT, ray_cluster
from tests.servers.static import static_server

MIB = 1 << 20
ONE_BILLION: dict[str, Any] = {
    "hidden": 2048,
    "intermediate": 5632,
    "layers": 16,
    "heads": 16,
    "kv_heads": 16,
    "vocab": 32000,
}
SMALL: dict[str, Any] = {
    "hidden": 64,
    "intermediate": 128,
    "layers": 62,
    "heads": 4,
    "kv_heads": 4,
    "vocab": 512,
}
DELAY_S = 3.0


def merging_s(plan: MergePlan, out: Path, options: RunOptions) -> float:
    """Return the seconds of merging with all workers ready."""
    output = open_output(str(out), plan, restart=False)
    assert isinstance(output, Output)
    meter = Meter()
    with open_pool(plan, output, options, meter) as pool:
        output.begin()
        pool.open()
        events: list[Event] = []
        while sum(isinstance(event, WorkerReady) for event in events) < pool.num_starting:
            events += pool.poll(1)
        told, poll = [events], pool.poll

        def poll_anew(timeout_s: float) -> Sequence[Event]:
            return told.pop() if told else poll(timeout_s)

        with mock.patch.object(pool, "open"), mock.patch.object(pool, "poll", poll_anew):
            started_s = time.monotonic()
            drive(plan, output, pool, meter)
            elapsed_s = time.monotonic() - started_s
    output.close()
    shutil.rmtree(out)
    return elapsed_s


def cost(folder: Path, rounds: int) -> None:
    """Print the wall time of both engines on one family."""
    plan = open_plan(load_config(make_family(folder / "family", **ONE_BILLION).config_path))
    seconds: dict[str, list[float]] = {"local": [], "ray": []}
    with ray_cluster(1, 2) as cluster:
        for _ in range(rounds):
            for engine, times in seconds.items():
                address = cluster.address if engine == "ray" else None
                options = RunOptions(
                    engine=engine,  # type: ignore[arg-type]
                    address=address,
                    workers=1 if engine == "ray" else 2,
                    threads=2,
                )
                times.append(merging_s(plan, folder / "out", options))
                ray.shutdown()
    medians = {engine: statistics.median(times) for engine, times in seconds.items()}
    for engine, times in seconds.items():
        print(f"{engine:6} {medians[engine]:6.2f} s  {[round(t, 2) for t in times]}")
    print(f"ray / local {medians['ray'] / medians['local']:.3f}")


def scaling(folder: Path) -> None:
    """Print how the time of waiting tasks falls with the number of actors."""
    family = make_family(folder / "bucket", **SMALL)
    content = load_config(family.config_path).normalized()
    content["base_model"] = f"s3://bucket/{Path(content['base_model']).name}"
    for entry in content["models"]:
        entry["model"] = f"s3://bucket/{Path(entry['model']).name}"
    with static_server(folder, delay_s=DELAY_S) as endpoint:
        os.environ.update(s3_environment(endpoint))
        plan = open_plan(config_from_mapping(content), shard_bytes=86_000)
        one_s = 0.0
        with ray_cluster(1, 8) as cluster:
            for workers in (1, 8):
                options = RunOptions(
                    engine="ray",
                    address=cluster.address,
                    workers=workers,
                    threads=1,
                    memory_bytes=256 * MIB,
                )
                elapsed_s = merging_s(plan, folder / "out", options)
                one_s = one_s or elapsed_s
                efficiency = one_s / workers / elapsed_s
                print(
                    f"{workers} actors: {len(plan.shards)} tasks in {elapsed_s:6.1f} s, "
                    f"efficiency {efficiency:.2f}",
                    flush=True,
                )


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--skip", choices=["cost", "scaling"])
    options = parser.parse_args()
    os.environ.update(RAY_ENVIRONMENT)
    with tempfile.TemporaryDirectory() as name:
        if options.skip != "cost":
            cost(Path(name) / "cost", options.rounds)
        if options.skip != "scaling":
            scaling(Path(name) / "scaling")


if __name__ == "__main__":
    main()
