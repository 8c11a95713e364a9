"""What happened to the tensors of a model, added up by layer and by kind.

The kind of a tensor is its name without the number of its layer, ``*`` for every other number, and
without what all kinds begin or end with: ``self_attn.q_proj``, ``mlp.experts.*.gate_proj``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from della_dist.config.layers import layer_of
from della_dist.specs.statistics import ExpertStats
from della_dist.storage.manifest import TensorRecord
from della_dist.storage.tensor_table import Experts

_NUMBER = re.compile(r"(?<=\.)[0-9]+(?=\.|$)")


@dataclass(slots=True)
class ExpertSum:
    """One expert's part of some tensors."""

    elements: int = 0
    squares: float = 0.0
    """Sum of the squared deltas."""
    num_nonzero: int = 0
    num_kept: int = 0
    num_elected: int = 0
    planned: float = 0.0
    """How many of the deltas were to be kept; NaN where only they tell."""
    dot: float = 0.0
    """Of the deltas with the merged ones, where that was measured."""
    dot_squares: float = 0.0
    """Of the deltas there."""
    merged_squares: float = 0.0
    """Of the merged ones there."""

    def add(
        self,
        stats: ExpertStats,
        num_elements: int,
        density: float | None,
        merged_l2: float | None = None,
    ) -> None:
        """Add one tensor; `merged_l2` is the norm of its merged delta, if it was measured."""
        cosine = stats.cosine  # tables of before have none
        if cosine is not None and merged_l2 is not None:
            self.dot += cosine * stats.delta_l2 * merged_l2
            self.dot_squares += stats.delta_l2**2
            self.merged_squares += merged_l2**2
        self.elements += num_elements
        self.squares += stats.delta_l2**2
        self.num_nonzero += stats.num_nonzero
        self.num_kept += stats.num_kept
        self.num_elected += stats.num_elected
        self.planned += (math.nan if density is None else density) * stats.num_nonzero

    @property
    def root_mean_square(self) -> float:
        """The size of a delta; NaN where there is none."""
        return math.sqrt(self.squares / self.elements) if self.elements else math.nan

    @property
    def survived(self) -> float:
        """The cosine of the merged delta with the expert's; NaN where it was not measured."""
        return _share(self.dot, math.sqrt(self.dot_squares) * math.sqrt(self.merged_squares))

    @property
    def kept(self) -> float:
        """The share of the deltas that are not zero that was kept; NaN where all are zero."""
        return _share(self.num_kept, self.num_nonzero)

    @property
    def to_keep(self) -> float:
        """The share of them that was to be kept."""
        return _share(self.planned, self.num_nonzero)

    @property
    def elected(self) -> float:
        """The share of them that entered the sum."""
        return _share(self.num_elected, self.num_nonzero)


@dataclass(slots=True)
class Sum:
    """Some tensors: those of one kind and layer, or more."""

    tensors: int = 0
    elements: int = 0
    """Of those that were merged."""
    num_conflicts: int = 0
    experts: dict[str, ExpertSum] = field(default_factory=dict)

    def add(self, record: TensorRecord, experts: Experts) -> None:
        """Add one tensor."""
        self.tensors += 1
        if record.stats is None:
            return
        num_elements = record.stats.num_elements
        self.elements += num_elements
        self.num_conflicts += record.stats.num_conflicts
        for (name, density), stats in zip(experts, record.stats.experts, strict=True):
            one = self.experts.setdefault(name, ExpertSum())
            one.add(stats, num_elements, density, record.stats.merged_l2)

    @property
    def conflicts(self) -> float:
        """The share of elements at which surviving contributions had both signs."""
        return _share(self.num_conflicts, self.elements)

    def of(self, expert: str) -> ExpertSum:
        """Return an expert's part."""
        return self.experts.get(expert, _NOTHING)


_NOTHING = ExpertSum()


class Grid:
    """All tensors of a model, by kind and layer.

    Parameters
    ----------
    tensors
        With what is planned for their experts.
    """

    def __init__(self, tensors: Iterable[tuple[TensorRecord, Experts]]) -> None:
        self.total = Sum()
        self.cells: dict[tuple[str, int | None], Sum] = {}
        self._by_kind: dict[str, Sum] = {}
        self._by_layer: dict[int | None, Sum] = {}
        for record, experts in tensors:
            kind, layer = place(record.name)
            for one in (
                self.total,
                self.cells.setdefault((kind, layer), Sum()),
                self._by_kind.setdefault(kind, Sum()),
                self._by_layer.setdefault(layer, Sum()),
            ):
                one.add(record, experts)

    @property
    def experts(self) -> list[str]:
        """Their names, in the order in which they are met."""
        return list(self.total.experts)

    @property
    def kinds(self) -> list[str]:
        """Of merged tensors, in the order in which they are met."""
        return [kind for kind, one in self._by_kind.items() if one.elements]

    @property
    def layers(self) -> list[int | None]:
        """In order; last None, of tensors of no layer."""
        merged = [layer for layer, one in self._by_layer.items() if one.elements]
        return sorted(merged, key=lambda layer: (layer is None, layer or 0))

    def by_kind(self, value: Callable[[Sum], float]) -> list[list[float]]:
        """Return a value of each kind (row) in each layer (column); NaN where there is none."""
        return [
            [value(self.cells.get((kind, layer), Sum())) for layer in self.layers]
            for kind in self.kinds
        ]

    def by_expert(self, value: Callable[[ExpertSum], float]) -> list[list[float]]:
        """Return a value of each expert (row) in each layer (column)."""
        return [
            [value(self._by_layer[layer].of(name)) for layer in self.layers]
            for name in self.experts
        ]


def place(name: str) -> tuple[str, int | None]:
    """Return the kind of a tensor, and the number of its layer, if it has one."""
    found = layer_of(name)
    if found is None:
        return name.removesuffix(".weight"), None
    before, layer, rest = found
    rest = _NUMBER.sub("*", rest).removesuffix(".weight")
    before = before.removesuffix(".")
    before = "" if before in ("layers", "model.layers") else before.removesuffix(".layers")
    return f"{before}{rest}".strip(".") or name, layer


def _share(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def span(values: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Return the least and the largest of values that are numbers; zeros where none is."""
    found = [value for row in values for value in row if math.isfinite(value)]
    return (min(found), max(found)) if found else (0.0, 0.0)
