"""Tensors that are views of other data, in files of torch: right, but slower to read."""

from __future__ import annotations

from della_dist.specs.checkpoint import CheckpointIndex
from della_dist.wording import listed_tensors


def strided_note(checkpoint: CheckpointIndex) -> str | None:
    """Return what a person should know of a checkpoint's views, if it has any."""
    names = [name for name, entry in checkpoint.tensors.items() if entry.strided is not None]
    if not names:
        return None
    return (
        f"{checkpoint.location}: {listed_tensors(names)} stored as views of other data "
        "(transposed, or a part of each row). They are read in pieces, some of them several times. "
        "Saved again with .contiguous() they would be read faster."
    )
