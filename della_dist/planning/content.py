"""What planning asks of the bytes of tensors: the few questions that headers do not answer."""

from __future__ import annotations

from typing import Protocol

from della_dist.specs.checkpoint import CheckpointIndex, TensorEntry


class Content(Protocol):
    """Answers questions about the bytes of the inputs."""

    def equal(self, checkpoint: CheckpointIndex, a: TensorEntry, b: TensorEntry) -> bool:
        """Return whether two tensors of one checkpoint have the same bytes."""

    def sample(self, checkpoint: CheckpointIndex, entry: TensorEntry) -> str:
        """Return a digest of the first block of a tensor."""


class Positions:
    """Knows where the bytes lie, and not what they are: the same place, the same bytes."""

    def equal(self, checkpoint: CheckpointIndex, a: TensorEntry, b: TensorEntry) -> bool:
        """See `Content.equal`."""
        return self.sample(checkpoint, a) == self.sample(checkpoint, b)

    def sample(self, checkpoint: CheckpointIndex, entry: TensorEntry) -> str:
        """See `Content.sample`."""
        return f"{checkpoint.location}:{entry.place}"
