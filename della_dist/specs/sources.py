"""What an output tensor is made of: a small immutable expression over stored tensors.

Planning asks it what is read; the runtime opens what it names; the kernels see blocks of raw bytes.
A kind of source that is not handled somewhere is an error of mypy there, not a silent default.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from della_dist.specs.checkpoint import TensorEntry
from della_dist.specs.passes import least_passes, most_passes
from della_dist.specs.recipe import TensorRecipe


@dataclass(frozen=True, slots=True)
class Stored:
    """Bytes as a file has them."""

    checkpoint: int
    """Index into the inputs of the plan, the reference first."""
    entry: TensorEntry

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor's data."""
        return self.entry.stop - self.entry.start


@dataclass(frozen=True, slots=True)
class Same:
    """The first of several that are to hold equal bytes: integers, which are not merged."""

    sources: tuple[Stored, ...]


@dataclass(frozen=True, slots=True)
class Merged:
    """What the recipe makes of the base, if it has one, and of the experts."""

    recipe: TensorRecipe
    base: Stored | None
    experts: tuple[Stored, ...]


Source: TypeAlias = Stored | Same | Merged


def leaves(source: Source) -> tuple[Stored, ...]:
    """Return every stored tensor that `source` reads, in its order."""
    match source:
        case Stored():
            return (source,)
        case Same(sources):
            return sources
        case Merged(_, base, experts):
            return experts if base is None else (base, *experts)


def passes(source: Source) -> tuple[int, int]:
    """Return how often `source` is read: at least and at most, as its values decide."""
    match source:
        case Stored() | Same():
            return 1, 1
        case Merged(recipe):
            return least_passes(recipe), most_passes(recipe)


def bytes_of_a_pass(source: Source) -> int:
    """Return the bytes that one pass over `source` reads."""
    return sum([leaf.entry.stop - leaf.entry.start for leaf in leaves(source)])


def bytes_to_read(source: Source) -> tuple[int, int]:
    """Return the bytes that are read of `source`, at least and at most (see `passes`)."""
    least, most = passes(source)
    size = bytes_of_a_pass(source)
    return least * size, most * size
