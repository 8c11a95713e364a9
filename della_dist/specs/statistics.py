"""What happened to one tensor in a merge."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class ExpertStats:
    """What happened to one expert's part of one tensor."""

    num_nonzero: int
    """Elements whose delta is not zero."""
    num_kept: int
    """Elements whose delta is not zero and survived the drop step."""
    num_elected: int
    """Elements that the elect step let into the sum (all kept ones where nothing is elected)."""
    delta_l2: float
    """Euclidean norm of the delta."""
    delta_max_abs: float


@dataclass(frozen=True, slots=True)
class TensorStats:
    """Statistics of one merged tensor."""

    num_elements: int
    num_conflicts: int
    """Elements at which the surviving contributions have both signs."""
    experts: tuple[ExpertStats, ...] = field(default=())
    energy: float | None = None
    """Of a matrix that is factored, the share of its delta's squared norm that is kept."""
    norm: float | None = None
    """The root of that squared norm."""
