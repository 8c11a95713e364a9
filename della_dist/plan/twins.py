"""Parameters that a model stores twice: equal in every input, so equal in the output.

A tied head in a file that stores it, the embedding and the head of DeepSeek's multi-token
prediction layer. A random method would draw other numbers for each, and the output's copies would
drift apart; so all of them are merged as one, the canonical tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from della_dist.plan.content import Content
from della_dist.plan.ties import EMBEDDINGS, HEADS, ends_in
from della_dist.specs import CheckpointIndex

#: Blocks of a tensor that are compared; the first of them tells nearly all pairs apart.
NUM_BLOCKS = 16

# Biases of heads are stored both in the head and beside it.
_BIASES = ("predictions.bias", "predictions.decoder.bias", "lm_head.bias", "lm_head.decoder.bias")
_SHARED = (*EMBEDDINGS, *HEADS, *_BIASES)


def find_twins(
    checkpoints: Sequence[CheckpointIndex], merged: Iterable[str], content: Content
) -> Mapping[str, str]:
    """Return for every tensor that is another one stored again the name of that one.

    Only samples are compared. That suffices, because every tensor is merged from its own bytes:
    what tensors that merely look equal would share are random words and parameters.

    Parameters
    ----------
    checkpoints
        All inputs, the reference first.
    merged
        Names of the tensors that are merged.
    content
        Asked only where an embedding or head has the shape of another.
    """
    groups: dict[object, list[str]] = {}
    for name in merged:
        if ends_in(name, _SHARED):
            entries = [c.tensors[name] for c in checkpoints]
            kind = (entries[0].shape, *(entry.dtype for entry in entries))
            groups.setdefault(kind, []).append(name)
    alike = [group for group in groups.values() if len(group) > 1]
    for checkpoint, num_blocks in [(checkpoints[0], 1), *((c, NUM_BLOCKS) for c in checkpoints)]:
        alike = [part for g in alike for part in _split(g, checkpoint, num_blocks, content)]
    twins = {}
    for group in alike:
        canonical, *others = sorted(group, key=_order)
        twins.update(dict.fromkeys(others, canonical))
    return twins


def _split(
    group: list[str], checkpoint: CheckpointIndex, num_blocks: int, content: Content
) -> list[list[str]]:
    parts: dict[str, list[str]] = {}
    for name in group:
        sample = content.sample(checkpoint, checkpoint.tensors[name], num_blocks)
        parts.setdefault(sample, []).append(name)
    return [part for part in parts.values() if len(part) > 1]


def _order(name: str) -> tuple[bool, bool, int, str]:
    """Sort the embedding of the model itself first: it is what a tied output has alone."""
    parts = name.split(".")
    is_head = not ends_in(name, EMBEDDINGS)
    return is_head, any(part.isdigit() for part in parts), len(parts), name
