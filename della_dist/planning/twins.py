"""Parameters that a model stores twice: equal in every input, so equal in the output.

A tied head in a file that stores it, the embedding and the head of DeepSeek's multi-token
prediction layer. A random method would draw other numbers for each, and the output's copies would
drift apart; so all of them are merged as one, the canonical tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from della_dist.planning.content import Content
from della_dist.planning.facts import model_facts
from della_dist.planning.parts import Part
from della_dist.planning.ties import EMBEDDINGS, HEADS, ends_in, is_top
from della_dist.specs.checkpoint import CheckpointIndex

# Biases of heads are stored both in the head and beside it.
_BIASES = ("predictions.bias", "predictions.decoder.bias", "lm_head.bias", "lm_head.decoder.bias")
_SHARED = (*EMBEDDINGS, *HEADS, *_BIASES)


def find_twins(
    checkpoints: Sequence[CheckpointIndex], merged: Iterable[str], content: Content
) -> Mapping[str, str]:
    """Return for every tensor that is another one stored again the name of that one.

    All bytes of them are compared: a head that merely looks like the embedding would take its
    parameters, whatever the filters say.

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
    twins = {}
    for group in groups.values():
        for alike in _alike(group, checkpoints, content):
            twins.update(dict.fromkeys(alike[1:], alike[0]))
    return twins


def twins_beside_layers(
    parts: Sequence[Part],
    checkpoints: Sequence[CheckpointIndex],
    merged: Iterable[str],
    content: Content,
) -> Mapping[str, str]:
    """Return the same of an output of slices, where the same layer twice is two layers.

    What an encoder and a decoder share is of one part (`della_dist.planning.views.stacks`). A text
    has a head of its own wherever it stores one.
    """
    if not model_facts(checkpoints[0]).is_encoder_decoder:
        return {}
    names = [name for name in merged if is_top(name)]
    twins: dict[str, str] = {}
    for part in parts:
        inputs = [column.of(checkpoints) for column in part.columns]
        own = [name for name in names if name in part.reference.tensors]
        twins.update(find_twins(inputs, own, content))
    return twins


def _alike(
    names: list[str], checkpoints: Sequence[CheckpointIndex], content: Content
) -> list[list[str]]:
    """Divide tensors into those that are equal in all checkpoints, the canonical one first."""
    if len(names) == 1:
        return []
    reference = checkpoints[0]
    parts: dict[str, list[list[str]]] = {}
    for name in sorted(names, key=_order):
        # A block of the reference tells nearly all pairs apart.
        similar = parts.setdefault(content.sample(reference, reference.tensors[name]), [])
        for part in similar:
            if all(content.equal(c, c.tensors[part[0]], c.tensors[name]) for c in checkpoints):
                part.append(name)
                break
        else:
            similar.append([name])
    return [part for similar in parts.values() for part in similar]


def _order(name: str) -> tuple[bool, bool, int, str]:
    """Sort the embedding of the model itself first: it is what a tied output has alone."""
    parts = name.split(".")
    is_head = not ends_in(name, EMBEDDINGS)
    return is_head, any(part.isdigit() for part in parts), len(parts), name
