"""The validated plan of a merge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from della_dist.config import MergeConfig, layer_fraction
from della_dist.plan.layout import (
    OutputTensor,
    ShardLayout,
    default_shard_bytes,
    lay_out,
)
from della_dist.plan.matching import Action, Matching, match_tensors
from della_dist.specs import CheckpointIndex, TensorRecipe


@dataclass(frozen=True, slots=True)
class MergePlan:
    """Everything that is decided before the first tensor is read."""

    config: MergeConfig
    base: CheckpointIndex | None
    """None where the method has no base (``linear``)."""
    experts: tuple[CheckpointIndex, ...]
    matching: Matching
    shard_bytes: int
    shards: tuple[ShardLayout, ...]
    """One task each."""
    layers: Mapping[str, float]
    """Tensor name -> place in the depth of the model, 0 to 1, at which gradients are read."""
    companions: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of every file beside the weights that the output takes over, by name."""

    @property
    def reference(self) -> CheckpointIndex:
        """The checkpoint whose names, shapes and companion files the output takes over."""
        return self.base if self.base is not None else self.experts[0]

    @property
    def inputs(self) -> tuple[CheckpointIndex, ...]:
        """All checkpoints that are read: the base, if any, then the experts."""
        return self.experts if self.base is None else (self.base, *self.experts)

    @property
    def stage(self) -> int:
        """How many merges lie one after another behind the inputs; 0 where none is a merge."""
        return 1 + max((c.stage for c in self.inputs if c.stage is not None), default=-1)

    @property
    def num_tensors(self) -> int:
        """Tensors of the output."""
        return sum(len(shard.tensors) for shard in self.shards)

    @property
    def output_bytes(self) -> int:
        """Bytes of tensor data of the output, without headers."""
        return sum(shard.size_bytes for shard in self.shards)

    @property
    def input_bytes(self) -> int:
        """Bytes of tensor data that one pass over all inputs reads."""
        total = 0
        for name, action in self.matching.actions.items():
            sources = self.inputs if action != "buffer" else (self.reference,)
            for checkpoint in sources:
                entry = checkpoint.tensors[name]
                total += entry.stop - entry.start
        return total

    @property
    def expert_elements(self) -> int:
        """Elements to merge, counted once an expert."""
        merged = (
            self.reference.tensors[name]
            for name, action in self.matching.actions.items()
            if action == "merge"
        )
        one = sum((e.stop - e.start) // _itemsize(e.dtype) for e in merged)
        return one * len(self.experts)

    def action(self, name: str) -> Action:
        """Return what becomes of a tensor."""
        return self.matching.actions[name]

    def recipe(self, tensor: OutputTensor) -> TensorRecipe:
        """Return how a tensor is merged."""
        return TensorRecipe(
            name=tensor.name,
            shape=tensor.shape,
            base_dtype=None if self.base is None else self.base.tensors[tensor.name].dtype,
            expert_dtypes=tuple(e.tensors[tensor.name].dtype for e in self.experts),
            out_dtype=tensor.dtype,
            settings=self.config.settings_for(tensor.name, self.layers[tensor.name]),
            stage=self.stage,
        )

    def notes(self) -> tuple[str, ...]:
        """Return what a person should know of this plan, a line each."""
        notes = list(self.config.notes())
        if self.matching.tied_left_out:
            names = ", ".join(self.matching.tied_left_out)
            notes.append(f"{names}: tied to the embedding by config.json, stays tied and unstored.")
        for location, count in self.matching.extra_left_out:
            notes.append(f"{location}: {count} tensors that only it has are left out.")
        merges = [c.location for c in self.inputs if c.stage is not None]
        if merges and self.config.method.drop in ("magprune", "random"):
            verb = "is itself a merge" if len(merges) == 1 else "are themselves merges"
            notes.append(
                f"{', '.join(merges)} {verb} of della-dist: random words of stage {self.stage} "
                "are drawn."
            )
        return tuple(notes)


def _itemsize(dtype: str) -> int:
    return {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}[dtype]


def build_plan(
    config: MergeConfig,
    base: CheckpointIndex | None,
    experts: tuple[CheckpointIndex, ...],
    *,
    shard_bytes: int | None = None,
) -> MergePlan:
    """Check everything that headers can tell, and plan the merge.

    Parameters
    ----------
    config
        The validated configuration.
    base, experts
        Headers of the checkpoints, the experts in the order of the configuration.
    shard_bytes
        Data bytes of an output shard at most; None for `default_shard_bytes`.

    Raises
    ------
    InputError
        If the checkpoints do not fit together.
    ConfigError
        If the parameters of some tensor are out of bounds.
    """
    reference, others = (base, experts) if base is not None else (experts[0], experts[1:])
    matching = match_tensors(reference, others, ignore_extra=config.extra_tensors == "ignore")
    names = matching.actions
    tensors = []
    for name, action in names.items():
        entry = reference.tensors[name]
        dtype = config.output_dtype or entry.dtype if action == "merge" else entry.dtype
        tensors.append(OutputTensor(name, dtype, entry.shape))
    if shard_bytes is None:
        shard_bytes = default_shard_bytes(sum(t.size_bytes for t in tensors))
    plan = MergePlan(
        config=config,
        base=base,
        experts=experts,
        matching=matching,
        shard_bytes=shard_bytes,
        shards=lay_out(tensors, shard_bytes),
        layers=layer_fraction(names),
    )
    for name, action in names.items():
        if action == "merge":  # raises here, before any work, if a gradient leaves its bounds
            config.settings_for(name, plan.layers[name])
    return plan
