"""What the output's tensors are made of: parts, in which the same checkpoints merge in one way.

A merge of whole models has one part. One of slices has one for every slice, and for the tensors
that belong to no layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from della_dist.config import MergeConfig, layer_fraction
from della_dist.planning.views.adapters import AdaptedModel
from della_dist.planning.views.vocabulary import Alignment
from della_dist.specs.checkpoint import CheckpointIndex, TensorEntry
from della_dist.specs.recipe import MergeSettings
from della_dist.specs.sources import Column as SourceColumn
from della_dist.specs.sources import Rows, Stored, stored


@dataclass(frozen=True, slots=True)
class Column:
    """The tensors of one checkpoint as a part of the output sees them."""

    checkpoint: int
    """Index into the inputs of the plan."""
    tensors: Mapping[str, TensorEntry]
    """By the names that they have in the output."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Those that have another one in the checkpoint: layers that got another number."""

    def of(self, checkpoints: Sequence[CheckpointIndex]) -> CheckpointIndex:
        """Return a checkpoint that has these tensors alone, under these names."""
        return replace(checkpoints[self.checkpoint], tensors=self.tensors)


@dataclass(frozen=True, slots=True)
class Part:
    """Tensors of the output that the same checkpoints are merged into in the same way."""

    config: MergeConfig
    """Its models are the experts, its settings those of this part."""
    columns: tuple[Column, ...]
    """The reference first, whose names and shapes the output has: the base, if the method has one.
    The last ones are the experts."""
    layers: Mapping[str, float]
    """Tensor name -> place in the depth, 0 to 1, at which gradients are read."""
    alignment: Alignment | None = None
    """What becomes of rows of tokens, where the checkpoints have different ones."""
    adapted: Mapping[int, AdaptedModel] = field(default_factory=dict)
    """Which of the inputs of the plan are models with adapters."""

    @property
    def experts(self) -> tuple[Column, ...]:
        """The columns that are merged into the base, or with each other."""
        return self.columns[-len(self.config.models) :]

    def settings(self, name: str) -> MergeSettings:
        """Return how the tensor `name` of the output is merged."""
        own = None
        if any(column.names for column in self.experts):
            own = [column.names.get(name, name) for column in self.experts]
        return self.config.settings_for(name, self.layers[name], own)

    def names_in_experts(self) -> Iterator[str]:
        """Yield what the tensors are called in the experts."""
        for column in self.experts:
            yield from (column.names.get(name, name) for name in column.tensors)

    @property
    def reference(self) -> Column:
        """The column that tensors are taken from which are not merged."""
        return self.columns[0]

    def form(self, name: str) -> TensorEntry:
        """Return the tensor whose shape, and dtype if none is given, the output's has."""
        entry = self.reference.tensors[name]
        model = self.adapted.get(self.reference.checkpoint)
        return entry if model is None else replace(entry, dtype=model.dtypes.get(name, entry.dtype))

    def source(self, column: Column, name: str, base: SourceColumn | None = None) -> SourceColumn:
        """Return the tensor `name` of a column; its delta, where that is one to `base`."""
        if self.alignment is not None and self.alignment.has(name):
            return self.alignment.column(column.checkpoint, name)
        entry = column.tensors[name]
        model = self.adapted.get(column.checkpoint)
        return stored(column.checkpoint, entry) if model is None else model.column(entry, base)

    def stored(self, column: Column, name: str) -> Stored | Rows:
        """Return the tensor `name` of a column as the files have it."""
        entry = column.tensors[name]
        model = self.adapted.get(column.checkpoint)
        return stored(column.checkpoint, entry) if model is None else model.stored(entry)

    def sources(self, name: str) -> tuple[SourceColumn, ...]:
        """Return the tensor `name` of every column."""
        first = self.source(self.columns[0], name)
        base = first if self.config.has_base else None
        return (first, *[self.source(column, name, base) for column in self.columns[1:]])


def whole_models(config: MergeConfig, checkpoints: Sequence[CheckpointIndex]) -> Part:
    """Return the part that is everything.

    Parameters
    ----------
    checkpoints
        The inputs; the reference first, the experts last.
    """
    columns = tuple(Column(i, c.tensors) for i, c in enumerate(checkpoints))
    if config.method.passes_through:
        columns = columns[-1:]  # another reference has nothing to do with the tensors
    return Part(config, columns, layer_fraction(columns[0].tensors))
