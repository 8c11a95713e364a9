"""Reading checkpoints from an S3 server, and from a Hub, that add 50 ms to every request.

In turn: a bare loop of concurrent GETs of 8 MiB, through s3fs and through urllib3's threads, and
the reader of the merge (pinned versions, coalesced ranges, read ahead within a budget), which hands
every block of every task to nobody: from S3, and from the Hub. Prints MB/s of each, and the
ratios::

    python -m tests.bench.bench_reading [--rounds 3] [--delay 0.05]
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from della_dist.config import load_config
from della_dist.demo import make_family
from della_dist.ops.cpu.backend import NumbaBackend
from della_dist.planning.build import MergePlan
from della_dist.planning.layout import ShardLayout
from della_dist.planning.memory import MemoryBudget
from della_dist.runtime.budget import DEFAULT_WORKERS, connections, with_remote
from della_dist.runtime.open_plan import open_plan
from della_dist.runtime.task.blocks import TaskBlocks
from della_dist.runtime.task.context import MergeContext
from della_dist.runtime.task.inputs import InputStores
from della_dist.runtime.task.meter import Meter
from della_dist.storage.remote.s3_client import open_filesystem
from tests.bench.bench_merge import FAMILY
from tests.servers.hub import hub_server, set_refs
from tests.servers.moto import s3_environment
from tests.servers.static import static_server

MIB = 1 << 20
RANGE_BYTES = 8 * MIB
CONNECTIONS = 64


def ranges(folder: Path) -> list[tuple[str, int, int]]:
    """Return the ranges of 8 MiB of all shards in a folder, as (bucket/key, start, stop)."""
    return [
        (str(path.relative_to(folder)), start, min(start + RANGE_BYTES, path.stat().st_size))
        for path in sorted(folder.rglob("*.safetensors"))
        for start in range(0, path.stat().st_size, RANGE_BYTES)
    ]


def with_s3fs(wanted: list[tuple[str, int, int]]) -> int:
    """Read with s3fs, as many requests at once as there are connections."""
    filesystem = open_filesystem(CONNECTIONS)
    from fsspec.asyn import sync

    async def all_of_them() -> int:
        free = asyncio.Semaphore(CONNECTIONS)

        async def one(path: str, start: int, stop: int) -> int:
            async with free:
                return len(await filesystem._cat_file(path, start=start, end=stop))

        return sum(await asyncio.gather(*(one(*each) for each in wanted)))

    total: int = sync(filesystem.loop, all_of_them)
    return total


def with_urllib3(endpoint: str, wanted: list[tuple[str, int, int]]) -> int:
    """Read with threads, without S3's client."""
    import urllib3

    with (
        urllib3.PoolManager(maxsize=CONNECTIONS, block=True) as http,
        ThreadPoolExecutor(CONNECTIONS) as threads,
    ):

        def one(each: tuple[str, int, int]) -> int:
            path, start, stop = each
            header = {"Range": f"bytes={start}-{stop - 1}"}
            return len(http.request("GET", f"{endpoint}/{path}", headers=header).data)

        return sum(threads.map(one, wanted))


def with_readers(plan: MergePlan, budget: MemoryBudget, stores: InputStores) -> int:
    """Read as a merge does; return the bytes."""
    meter = Meter()
    with ThreadPoolExecutor(1) as compute:
        context = MergeContext(
            plan,
            NumbaBackend(),
            budget,
            compute,
            meter,
            threading.Event(),
            stores,
        )

        def read(shard: ShardLayout) -> None:
            with context.readers() as readers:
                blocks = TaskBlocks(context, readers)
                blocks.read_ahead(shard.tensors)
                for wants in blocks.wants(shard.tensors):
                    for reader, start, stop in wants:
                        meter.read(reader.view(start, stop).nbytes)
                        reader.release(start, stop)

        with ThreadPoolExecutor(budget.workers) as workers:
            list(workers.map(read, plan.shards))
    return meter.snapshot().bytes_read


def on_hub(hub: Path, folders: list[Path]) -> None:
    """Make every folder a repository of the Hub, ``user/NAME``, without copying it."""
    for folder in folders:
        commit = hashlib.sha1(folder.name.encode()).hexdigest()
        shutil.copytree(folder, hub / "user" / folder.name / commit, copy_function=os.link)
        set_refs(hub, f"user/{folder.name}", main=commit)


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--delay", type=float, default=0.05)
    parser.add_argument("--memory", type=int, default=1024, help="MiB")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        family = make_family(folder / "bucket", **FAMILY)
        config = load_config(family.config_path)
        wanted = ranges(folder)
        folders = [Path(config.base_model or ""), *(Path(expert.model) for expert in config.models)]
        on_hub(folder / "hub", folders)
        with (
            static_server(folder, delay_s=options.delay) as endpoint,
            hub_server(folder / "hub", delay_s=options.delay) as hub,
        ):
            os.environ.update(s3_environment(endpoint), HF_ENDPOINT=hub.endpoint)
            os.environ["HF_HOME"] = str(folder / "hf")
            plan, hub_plan = (
                open_plan(config.with_locations({str(f): prefix + f.name for f in folders}))
                for prefix in ("s3://bucket/", "hf://user/")
            )
            memory = MemoryBudget(options.memory * MIB, DEFAULT_WORKERS, threads=2)
            budget = with_remote(memory, plan, None)
            stores = InputStores(connections(budget))
            readers: dict[str, Callable[[], int]] = {
                "GETs through s3fs": lambda: with_s3fs(wanted),
                "GETs through urllib3": lambda: with_urllib3(endpoint, wanted),
                "the merge's reader": lambda: with_readers(plan, budget, stores),
                "the same from the Hub": lambda: with_readers(hub_plan, budget, stores),
            }
            rates: dict[str, list[float]] = {name: [] for name in readers}
            for round_ in range(options.rounds + 1):
                for way, read in readers.items():
                    started_s = time.monotonic()
                    total = read()
                    if round_:  # the first one connects
                        rates[way].append(total / (time.monotonic() - started_s) / 1e6)
            medians = {name: statistics.median(rate) for name, rate in rates.items()}
            total_mb = sum(stop - start for _, start, stop in wanted) / 1e6
            print(f"{total_mb:.0f} MB, {options.delay * 1000:.0f} ms added to every request")
            for way, rate in medians.items():
                print(f"{way:22} {rate:6.0f} MB/s  {[round(r) for r in rates[way]]}")
            ours = medians["the merge's reader"]
            print(f"ratio to s3fs {ours / medians['GETs through s3fs']:.2f}", end=", ")
            print(f"to urllib3 {ours / medians['GETs through urllib3']:.2f}", end=", ")
            print(f"of the Hub to S3 {medians['the same from the Hub'] / ours:.2f}")


if __name__ == "__main__":
    main()
