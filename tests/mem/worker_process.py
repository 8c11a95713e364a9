"""Merges a configuration in this process as an actor of the Ray engine would: no cluster needed.

python -m tests.mem.worker_process CONFIG OUT MEMORY_BYTES
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

from della_dist.config import load_config
from della_dist.planning.memory import MemoryBudget
from della_dist.runtime.budget import IN_FLIGHT, connections, with_remote
from della_dist.runtime.companions.carried import companion_files
from della_dist.runtime.engines.ray.worker import MergeWorker, TaskFailure, WorkerSetup
from della_dist.runtime.open_plan import open_plan
from della_dist.runtime.output.commit import Output
from della_dist.runtime.output.existing import open_output

THREADS = 2


def main(config: str, out: str, memory_bytes: int) -> None:
    """Merge every shard, as many at once as an actor is given, and print the digest."""
    plan = open_plan(load_config(config))
    output = open_output(out, plan, restart=False)
    assert isinstance(output, Output)
    budget = with_remote(MemoryBudget(memory_bytes, IN_FLIGHT, THREADS), plan, out)
    output.begin()
    worker = MergeWorker(
        WorkerSetup(plan, out, output.lease_token, "cpu", budget, connections(budget))
    )
    with ThreadPoolExecutor(IN_FLIGHT) as calls:
        for result in calls.map(lambda index: worker.merge(index, 1), output.remaining):
            if isinstance(result, TaskFailure):
                raise result.error
            output.commit(result.record)
    print(output.finish(companion_files(plan)))
    output.close()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
