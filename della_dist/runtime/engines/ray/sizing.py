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

    Where a GPU may be used, one that has a GPU of its own for each that there is; nodes without are
    left alone then. ``auto`` takes cores where there is no GPU, or none has room for an actor.

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
    choices = {"cpu": [False], "cuda": [True], "auto": [True, False] if gpus else [False]}
    for uses_gpu in choices[options.device]:
        threads = options.threads or _default_threads(nodes, uses_gpu=uses_gpu)
        memory = options.memory_bytes + BASELINE_BYTES
        need = {"CPU": threads, "memory": memory, "GPU": int(uses_gpu)}
        fits = sum(_room(node, need) for node in nodes)
        if fits:
            break
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


def _room(node: Mapping[str, float], need: Mapping[str, int]) -> int:
    """Return how many actors a node has room for."""
    return min(int(node.get(name, 0) // count) for name, count in need.items() if count)


def _default_threads(nodes: Sequence[Mapping[str, float]], *, uses_gpu: bool) -> int:
    """Return the cores of an actor: no more than the largest node has, or leave every GPU some."""
    cores = [(int(node.get("CPU", 0)), int(node.get("GPU", 0))) for node in nodes]
    if uses_gpu and any(gpus for _, gpus in cores):
        share = min(cpus // gpus for cpus, gpus in cores if gpus)
    else:
        share = max((cpus for cpus, _ in cores), default=1)
    return max(1, min(DEFAULT_THREADS, share))
