"""One merge by each method of the table, so that a new method is in every test of all by itself."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

from della_dist.config import MergeConfig
from della_dist.config.methods import METHODS
from della_dist.ops.blocks import Backend
from della_dist.planning.build import MergePlan
from della_dist.planning.memory import MemoryBudget
from della_dist.runtime.task.backend import with_backend
from della_dist.runtime.task.context import MergeContext
from della_dist.runtime.task.inputs import InputStores
from della_dist.runtime.task.merge import digest_tensor
from della_dist.runtime.task.meter import Meter
from tests.merging import config_for

#: What is given of the parameters that a method has: none is without effect.
VALUES: Mapping[str, Any] = {
    "density": 0.4,
    "gamma": 0.05,
    "t": 0.3,
    "select_topk": 0.3,
    "r": 0.5,
    "epsilon": 0.1,
}
#: Where it means something else.
OWN: Mapping[str, Mapping[str, Any]] = {
    "nearswap": {"t": 0.0005},
    "ram": {"epsilon": 0.002},
    "ramplus_tl": {"epsilon": 0.002, "r": 0.5},
}


#: Those that take any number of models.
OF_MANY = [name for name, method in METHODS.items() if method.num_models is None]


def parameters_of(method: str) -> dict[str, Any]:
    """Return parameters of all models alike, with which a method does something."""
    of = METHODS[method]
    names = of.parameters.keys() & of.uses
    given = {name: VALUES[name] for name in sorted(names & VALUES.keys())}
    return {**given, **OWN.get(method, {})}


def config_of(method: str, base: Path, experts: Sequence[Path], **keys: Any) -> MergeConfig:
    """Return a merge of as many of the experts as a method takes, three at most."""
    of = METHODS[method]
    keys = {"parameters": parameters_of(method), "seed": 7, **keys}
    if of.base_among == "first":
        return config_for(base, experts[: (of.num_models or 3) - 1], method, **keys)
    models = list(experts) if of.has_base else [base, *experts]
    return config_for(base if of.has_base else None, models[: of.num_models or 3], method, **keys)


def digests(
    plan: MergePlan, backend: Backend, compute: Executor, memory: MemoryBudget
) -> Iterator[tuple[str, str]]:
    """Merge every tensor with a backend; yield names and digests."""
    memory = with_backend(memory, backend)
    stop, stores = threading.Event(), InputStores(1)
    context = MergeContext(plan, backend, memory, compute, Meter(), stop, stores)
    for shard in plan.shards:
        for tensor in shard.tensors:
            yield tensor.name, digest_tensor(context, tensor)


def number_of(method: str, most: int) -> int:
    """Return how many models besides its base a method takes, of so many."""
    how = METHODS[method]
    # The base is one of the two.
    return 1 if how.base_among == "first" else how.num_models or most


def document_of(
    method: str, base: Path, models: Sequence[object], name: str | None = None, **keys: Any
) -> dict[str, Any]:
    """Return a document of some of the models, the first ones, with weights that differ."""
    how = METHODS[method]
    used = models[: number_of(method, len(models))]
    weighted = "weight" in how.uses
    return {
        **({} if name is None else {"name": name}),
        "merge_method": method,
        **({"base_model": str(base)} if how.has_base or how.base_among == "first" else {}),
        "models": [
            {
                "model": str(model),
                **({"parameters": {"weight": 1 / (1 + m)}} if weighted else {}),
            }
            for m, model in enumerate(used)
        ],
        "parameters": parameters_of(method),
        **keys,
    }
