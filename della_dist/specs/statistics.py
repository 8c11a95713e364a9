"""What happened to one tensor in a merge."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class ExpertStats:
    """What happened to one expert's part of one tensor.

    Its delta is the expert less the base, or the expert where there is no base; zero where that is
    not finite.
    """

    num_nonzero: int
    """Elements whose delta is not zero."""
    num_kept: int
    """Elements whose delta is not zero and survived the drop step."""
    num_elected: int
    """Elements that the elect step let into the sum (all kept ones where nothing is elected)."""
    delta_l2: float
    """Euclidean norm of the delta."""
    delta_max_abs: float
    num_nonfinite: int | None = None
    """Elements whose delta is NaN or infinite; None in records of earlier versions."""
    cosine: float | None = None
    """Of the angle between the delta and the merged one (`TensorStats`); None where one of them is
    zero, or was not measured."""


@dataclass(frozen=True, slots=True)
class TensorStats:
    """Statistics of one merged tensor.

    Its merged delta is the output, as it is written, less the base, or the output where there is no
    base: that of an expert which is the output. Of a matrix that is factored it is what factors
    were sought of.
    """

    num_elements: int
    num_conflicts: int
    """Elements at which the surviving contributions have both signs."""
    experts: tuple[ExpertStats, ...] = field(default=())
    energy: float | None = None
    """Of a matrix that is factored, the share of its delta's squared norm that is kept."""
    norm: float | None = None
    """The root of that squared norm."""
    merged_l2: float | None = None
    """Euclidean norm of the merged delta; None where it was not measured."""
    merged_max_abs: float | None = None
