"""Merges of matrices as a whole for the simulator, planned from the shapes of real models.

Which tensors are merged as a whole, how they are laid out over shards, what is read how often and
the operations of each are what `della_dist` plans; nothing of it is computed a second time here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from della_dist.config import config_from_mapping
from della_dist.planning.build import MergePlan, build_plan
from della_dist.planning.layout import ShardLayout
from della_dist.planning.projection import operations_of, task_cost
from della_dist.specs.balancing import Balancing, balancing
from della_dist.specs.checkpoint import CheckpointIndex, TensorEntry
from della_dist.specs.dtypes import num_elements
from della_dist.specs.reading import bytes_to_read
from della_dist.specs.sources import Balanced
from tests.bench.cluster_model import Merge, Shard
from tests.sparse import Shapes, llama_shapes

#: Of the models' ``config.json``: hidden_size, intermediate_size, num_hidden_layers, vocab_size,
#: and rows of k_proj and v_proj, num_key_value_heads * head_dim.
LLAMAS: Mapping[str, tuple[int, int, int, int, int]] = {
    "8B": (4096, 14336, 32, 128256, 1024),
    "70B": (8192, 28672, 80, 128256, 1024),
    "405B": (16384, 53248, 126, 128256, 1024),
}


@dataclass(frozen=True, slots=True)
class MatrixMerge:
    """A merge, and what it needs."""

    merge: Merge
    plan: MergePlan
    largest: Balancing
    """The matrix that holds most."""


def matrix_merge(size: str, method: str = "wudi", num_experts: int = 3) -> MatrixMerge:
    """Return a merge of Llama-3.1 models in BF16, whose head is stored beside the embedding."""
    shapes = llama_shapes(*LLAMAS[size])
    models = [_index(f"expert{m}", shapes) for m in range(num_experts)]
    config = config_from_mapping(
        {
            "merge_method": method,
            "base_model": "base",
            "models": [{"model": model.location} for model in models],
        }
    )
    plan = build_plan(config, _index("base", shapes), tuple(models))
    read = sum(bytes_to_read(plan.source(t))[0] for s in plan.shards for t in s.tensors)
    merge = Merge(
        name=f"Llama 3.1 {size} x {num_experts}",
        num_parameters=sum(map(num_elements, shapes.values())),
        num_experts=num_experts,
        reads=read / plan.output_bytes / (num_experts + 1),
        shards=tuple(_shard(plan, layout) for layout in plan.shards),
    )
    matrices = [one for layout in plan.shards for one in _whole(plan, layout)]
    return MatrixMerge(merge, plan, max(matrices, key=lambda how: how.held_bytes(1)))


def _shard(plan: MergePlan, layout: ShardLayout) -> Shard:
    operations = sum(sum(operations_of(plan.source(tensor))) for tensor in layout.tensors)
    products = sum(how.device_operations for how in _whole(plan, layout))
    elements = sum(num_elements(tensor.shape) for tensor in layout.tensors)
    return Shard(
        output_bytes=layout.size_bytes,
        cost_bytes=task_cost(plan, layout),
        products=products,
        inverses=operations - products,
        matrix_elements=elements * len(plan.experts),
    )


def _whole(plan: MergePlan, layout: ShardLayout) -> list[Balancing]:
    """Return how those tensors of a shard are merged that are merged as a whole."""
    sources = (plan.source(tensor) for tensor in layout.tensors)
    return [balancing(source) for source in sources if isinstance(source, Balanced)]


def _index(location: str, shapes: Shapes) -> CheckpointIndex:
    """Return a checkpoint of one file that nobody has."""
    tensors, start = {}, 8
    for name, shape in shapes.items():
        stop = start + 2 * num_elements(shape)
        tensors[name] = TensorEntry(name, "BF16", shape, 0, start, stop)
        start = stop
    return CheckpointIndex(location, (), tensors, ())
