"""What is asked of the bytes of the inputs, answered for models with adapters too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from della_dist.planning.content import Content
from della_dist.planning.views.adapters import AdaptedModel
from della_dist.specs.checkpoint import CheckpointIndex, TensorEntry
from della_dist.specs.sources import Rows


class AdaptedContent:
    """Answers what `della_dist.planning.content.Content` asks, of models with adapters too."""

    def __init__(
        self,
        content: Content,
        inputs: Sequence[CheckpointIndex],
        adapted: Mapping[int, AdaptedModel],
    ) -> None:
        self._content = content
        self._inputs = inputs
        self._adapted = {one.index.location: one for one in adapted.values()}

    def equal(self, checkpoint: CheckpointIndex, a: TensorEntry, b: TensorEntry) -> bool:
        """See `Content.equal`."""
        model = self._adapted.get(checkpoint.location)
        if model is None:
            return self._content.equal(checkpoint, a, b)
        mine, theirs = model.stored(a), model.stored(b)
        if model.changes_of(a) != model.changes_of(b) or mine.checkpoint != theirs.checkpoint:
            return False
        if isinstance(mine, Rows) or isinstance(theirs, Rows):
            return mine == theirs
        return self._content.equal(self._inputs[mine.checkpoint], mine.entry, theirs.entry)

    def sample(self, checkpoint: CheckpointIndex, entry: TensorEntry) -> str:
        """See `Content.sample`."""
        model = self._adapted.get(checkpoint.location)
        if model is None:
            return self._content.sample(checkpoint, entry)
        weight = model.stored(entry)
        if isinstance(weight, Rows):
            return f"{weight.checkpoint}:{entry.shard}:{entry.start}"
        sample = self._content.sample(self._inputs[weight.checkpoint], weight.entry)
        return f"{sample} {len(model.changes_of(entry))}"
