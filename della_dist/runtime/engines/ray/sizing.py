"""How many actors of which size a cluster is asked for."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from della_dist.errors import ConfigError
from della_dist.runtime.options import RunOptions

#: Cores of an actor where the user does not say.
DEFAULT_THREADS = 8
#: Interpreter and libraries of an actor, beside its buffers; for placement only.
BASELINE_BYTES = 512 << 20

log = logging.getLogger("della_dist.run")


@dataclass(frozen=True, slots=True)
class PoolShape:
    """What the pool consists of."""

    num_workers: int
    threads: int
    uses_gpu: bool


def pool_shape(
    options: RunOptions, num_tasks: int, nodes: Sequence[Mapping[str, float]]
) -> PoolShape:
    """Return how many actors of which size to ask for.

    Parameters
    ----------
    options
        What the user says.
    num_tasks
        More actors than tasks are of no use.
    nodes
        The resources of every node that is alive, as Ray calls them: ``CPU``, ``GPU``, ``memory``.

    Raises
    ------
    ConfigError
        If none has room for an actor, and the user does not say how many to wait for.
    """
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    uses_gpu = options.device == "cuda" or (options.device == "auto" and gpus > 0)
    threads = options.threads or _default_threads(nodes, uses_gpu=uses_gpu)
    need = {"CPU": threads, "memory": options.memory_bytes + BASELINE_BYTES, "GPU": int(uses_gpu)}
    fits = sum(min(int(n.get(name, 0) // need[name]) for name in need if need[name]) for n in nodes)
    if fits == 0:
        missing = (
            f"the Ray cluster has no node with {threads} CPU cores, {need['memory'] >> 20} MiB of "
            f"memory{' and a GPU' if uses_gpu else ''}, which a worker takes"
        )
        if options.workers is None:
            raise ConfigError(
                f"{missing}. Give fewer --threads or less --memory, or say how many workers to "
                "wait for (--workers)."
            )
        log.warning("%s: waiting for one", missing)
    # An autoscaler may bring what is not there yet.
    return PoolShape(max(1, min(options.workers or fits, num_tasks)), threads, uses_gpu)


def _default_threads(nodes: Sequence[Mapping[str, float]], *, uses_gpu: bool) -> int:
    """Return the cores of an actor: no more than the largest node has, or leave every GPU some."""
    cores = [(int(node.get("CPU", 0)), int(node.get("GPU", 0))) for node in nodes]
    if uses_gpu and any(gpus for _, gpus in cores):
        share = min(cpus // gpus for cpus, gpus in cores if gpus)
    else:
        share = max((cpus for cpus, _ in cores), default=1)
    return max(1, min(DEFAULT_THREADS, share))
