"""Stages as the plans of what reads them see them: inputs that the same run makes.

Where one is not made yet, the plan of it knows its headers and its small files, and some of what
its tensors will have in common.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias

from della_dist.planning.content import Content
from della_dist.specs.checkpoint import CheckpointIndex, TensorEntry
from della_dist.storage.opening import open_store
from della_dist.storage.store import Store


@dataclass(frozen=True, slots=True)
class Planned:
    """What answers for a stage until it is made."""

    store: Store
    """Has its small files."""
    equal: Callable[[TensorEntry, TensorEntry], bool]
    """Tells whether two of its tensors will have the same bytes, as far as that is known."""
    forget: Callable[[], None]
    """Lets go of small files that were made for those who asked."""


@dataclass(frozen=True, slots=True)
class Stage:
    """The output of a stage."""

    checkpoint: CheckpointIndex
    records: tuple[Mapping[str, Any], ...]
    """What `MergePlan.stages` says of it, after what it says of those behind it."""
    planned: Planned | None = None
    """None: it is made."""


#: By location.
Stages: TypeAlias = Mapping[str, Stage]
NO_STAGES: Stages = MappingProxyType({})


def store_of(location: str, stages: Stages) -> Store:
    """Return the store of an input, a stage or not."""
    stage = stages.get(location)
    return open_store(location) if stage is None or stage.planned is None else stage.planned.store


def records_behind(locations: Iterable[str], stages: Stages) -> tuple[Mapping[str, Any], ...]:
    """Return the records of all stages behind some inputs, each once."""
    found = [record for at in locations if at in stages for record in stages[at].records]
    return tuple({record["name"]: record for record in found}.values())


class StageContent:
    """Answers what `della_dist.planning.content.Content` asks; of stages by their plans."""

    def __init__(self, content: Content, stages: Stages) -> None:
        self._content = content
        self._stages = stages

    def equal(self, checkpoint: CheckpointIndex, a: TensorEntry, b: TensorEntry) -> bool:
        """See `Content.equal`."""
        planned = self._planned(checkpoint)
        if planned is None:
            return self._content.equal(checkpoint, a, b)
        if a.size_bytes != b.size_bytes:
            return False
        return a.place == b.place or planned.equal(a, b)

    def sample(self, checkpoint: CheckpointIndex, entry: TensorEntry) -> str:
        """See `Content.sample`; one answer for all of what is not made, which tells nothing."""
        if self._planned(checkpoint) is None:
            return self._content.sample(checkpoint, entry)
        return ""

    def _planned(self, checkpoint: CheckpointIndex) -> Planned | None:
        stage = self._stages.get(checkpoint.location)
        return None if stage is None else stage.planned
