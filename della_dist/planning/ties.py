"""Output heads and other parameters that a model may share with its embedding.

Whether a head is shared is a matter of the stored bytes, not of ``tie_word_embeddings``: where both
are stored and differ, transformers 5 ties nothing, and where none is stored, the embedding is the
head. What config.json says decides only whether a checkpoint without a head can be meant so.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, replace

from della_dist.errors import InputError
from della_dist.planning.content import Content
from della_dist.planning.facts import model_facts
from della_dist.specs.checkpoint import CheckpointIndex, TensorEntry

# Endings of names, as in `_tied_weights_keys` of the models of transformers 5.24: what is tied ...
HEADS = (
    "lm_head.weight",
    "lm_head.decoder.weight",
    "lm_head.out_proj.weight",
    "predictions.decoder.weight",
    "embed_out.weight",
    "proj_out.weight",
    "output_projection.weight",
    "vocab_projector.weight",
    "head.weight",
)
# ... and what to.
EMBEDDINGS = (
    "embed_tokens.weight",
    "shared.weight",
    "wte.weight",
    "word_embeddings.weight",
    "word_embedding.weight",
    "tok_embeddings.weight",
    "tokens_embed.weight",
    "embed_in.weight",
    "embeddings.weight",
    "embed.weight",
)
# Encoders and decoders have embeddings of their own, unless the model has one for both.
SHARED = ("shared.weight",)
SHARING = (
    "encoder.embed_tokens.weight",
    "decoder.embed_tokens.weight",
    "text_encoder.embed_tokens.weight",
    "text_decoder.embed_tokens.weight",
)

_DEPENDENT = (*HEADS, *SHARING)

#: The name under which a tied head is left out of the output, as transformers saves it.
CAUSAL_HEAD = "lm_head.weight"


@dataclass(frozen=True, slots=True)
class Ties:
    """The checkpoints with the heads that they are meant to have."""

    checkpoints: tuple[CheckpointIndex, ...]
    """In the order given: heads that are the embedding are left out, or filled in with it."""
    left_out: tuple[str, ...] = ()
    """Stored in the reference, tied by its config.json and equal to its embedding, as everywhere:
    unstored in the output, and no more in `checkpoints`."""
    untied: tuple[str, ...] = ()
    """Tensors of their own in the output although the reference's config.json ties them."""
    filled: tuple[tuple[str, str, str], ...] = ()
    """(location, head, embedding) where a checkpoint has no head but its embedding."""
    notes: tuple[str, ...] = ()


def resolve_ties(checkpoints: Sequence[CheckpointIndex], content: Content) -> Ties:
    """Find out which heads are embeddings, by comparing bytes where config.json ties them.

    Parameters
    ----------
    checkpoints
        The reference (the base, or the first expert), then the others.
    content
        Asked only where a head is stored, and a config.json ties it or another checkpoint has none.
    """
    heads = dict.fromkeys(
        name
        for checkpoint in checkpoints
        for name, entry in checkpoint.tensors.items()
        if ends_in(name, _DEPENDENT) and is_top(name) and len(entry.shape) > 1
    )
    ties = Ties(tuple(checkpoints))
    for head in heads:
        ties = _resolve(ties, head, content)
    return ties


def separate_heads(checkpoints: Sequence[CheckpointIndex]) -> Ties | None:
    """Return the checkpoints with a head each, where a head is to be no embedding of the output.

    That is so where embedding and head are made of different checkpoints. None if the head is
    nobody's embedding, so that nothing is to be done.

    Raises
    ------
    InputError
        If a checkpoint has a tied head whose name is not known.
    """
    changed: dict[str, CheckpointIndex] = {}
    filled, untied = [], []
    for checkpoint in checkpoints:
        facts = model_facts(checkpoint)
        if facts.ties_head and facts.has_causal_head is False:
            raise InputError(
                f"{checkpoint.location} ties its head to its embedding, and is no causal language "
                "model: slices whose ends are other models would lose its head. Let the first and "
                "the last slice have the same sources, or merge whole models."
            )
        embedding = next(iter(_embeddings_of(checkpoint)), None)
        stored = any(ends_in(name, HEADS) and is_top(name) for name in checkpoint.tensors)
        is_tied = facts.ties_head is not False and bool(facts.has_causal_head or facts.ties_head)
        if stored:
            untied += [CAUSAL_HEAD] if facts.ties_head else []
        elif embedding is not None and is_tied:
            tensors = {**checkpoint.tensors, CAUSAL_HEAD: replace(embedding, name=CAUSAL_HEAD)}
            changed[checkpoint.location] = replace(checkpoint, tensors=tensors)
            filled.append((checkpoint.location, CAUSAL_HEAD, embedding.name))
    if not filled and not untied:
        return None
    note = (
        f"{CAUSAL_HEAD}: a tensor of its own in the output, whose embedding is made of other "
        "checkpoints than its head. Where a checkpoint ties them, its embedding is its head."
    )
    ties = Ties(tuple(checkpoints), untied=(CAUSAL_HEAD,), filled=tuple(filled))
    return _changed(ties, changed, note)


def _embeddings_of(checkpoint: CheckpointIndex) -> list[TensorEntry]:
    """Return the embeddings of the words of a checkpoint, the likeliest first."""
    found = [
        entry
        for name, entry in checkpoint.tensors.items()
        if len(entry.shape) == 2 and ends_in(name, EMBEDDINGS) and is_top(name)
    ]
    return sorted(found, key=lambda entry: (-entry.shape[0], entry.name))


def _resolve(ties: Ties, head: str, content: Content) -> Ties:
    """Return `ties` with what one head is in every checkpoint."""
    reference = ties.checkpoints[0]
    holders = [c for c in ties.checkpoints if head in c.tensors]
    lacking = [c for c in ties.checkpoints if head not in c.tensors]
    shape = holders[0].tensors[head].shape
    known = _known(holders, head, shape, content)
    sources = {c.location: _source(c, head, shape, known) for c in ties.checkpoints}
    is_own_everywhere = not lacking and not model_facts(reference).ties_head
    if is_own_everywhere or not any(sources.values()):
        return ties
    fillable = [c for c in lacking if sources[c.location] and model_facts(c).ties_head is not False]
    is_left_out = head == CAUSAL_HEAD and head in reference.tensors and _leaves_out(reference)
    if not is_left_out and len(fillable) < len(lacking):
        return ties  # missing, or extra: for matching to say
    different = _first_different(holders, head, sources, content)
    if different is None and (is_left_out or head not in reference.tensors):
        return _unstored(ties, holders, head)
    if len(fillable) < len(lacking):
        return ties
    ties = _filled(ties, fillable, head, sources)
    if different is not None and (model_facts(reference).ties_head or reference in fillable):
        note = (
            f"{head}: of {different.location} it differs from the embedding (their bytes were "
            f"compared), although {reference.location} ties them. It is a tensor of its own in the "
            "output."
        )
        ties = replace(ties, untied=(*ties.untied, head), notes=(*ties.notes, note))
    return ties  # equal everywhere, but stored in the reference: stays stored, and equal (twins)


def _unstored(ties: Ties, holders: Sequence[CheckpointIndex], head: str) -> Ties:
    """Return `ties` without a head that equals the embedding wherever it is stored."""
    if head in ties.checkpoints[0].tensors:
        note = (
            f"{head}: tied to the embedding by config.json, stays tied and unstored (its bytes "
            "were compared with the embedding's)."
        )
        ties = replace(ties, left_out=(*ties.left_out, head))
    else:
        note = (
            f"{head}: stored by {', '.join(c.location for c in holders)}, and equal to the "
            f"embedding; {ties.checkpoints[0].location} does not store it. Stays tied and unstored."
        )
    without = {
        c.location: replace(c, tensors={n: e for n, e in c.tensors.items() if n != head})
        for c in holders
    }
    return _changed(ties, without, note)


def _filled(
    ties: Ties,
    checkpoints: Sequence[CheckpointIndex],
    head: str,
    sources: dict[str, TensorEntry | None],
) -> Ties:
    """Return `ties` with the embedding as the head of `checkpoints`."""
    changed, notes, filled = {}, [], []
    for checkpoint in checkpoints:
        source, location = sources[checkpoint.location], checkpoint.location
        assert source is not None
        tensors = {**checkpoint.tensors, head: replace(source, name=head)}
        changed[location] = replace(checkpoint, tensors=tensors)
        notes.append(f"{location} stores no {head}: its embedding ({source.name}) is its head.")
        filled.append((location, head, source.name))
    return replace(_changed(ties, changed, *notes), filled=(*ties.filled, *filled))


def _leaves_out(reference: CheckpointIndex) -> bool:
    """Tell whether a model without a head loads as tied whichever key its architecture takes."""
    model = model_facts(reference)
    return bool(model.text_tie if model.tie is None else model.tie)


def _first_different(
    holders: Sequence[CheckpointIndex],
    head: str,
    sources: dict[str, TensorEntry | None],
    content: Content,
) -> CheckpointIndex | None:
    """Return the first checkpoint whose head is not its embedding."""
    for checkpoint in holders:
        source, entry = sources[checkpoint.location], checkpoint.tensors[head]
        if (
            source is None
            or source.dtype != entry.dtype
            or not content.equal(checkpoint, entry, source)
        ):
            return checkpoint
    return None


def _known(
    holders: Sequence[CheckpointIndex], head: str, shape: tuple[int, ...], content: Content
) -> Container[str]:
    """Return the names of embeddings that `head` may be tied to.

    An embedding of another name is another model's. Of several, the stored heads tell.
    """
    names = [entry.name for entry in _embeddings(holders[0], head, shape)]
    equal = {
        name
        for name in names
        if len(names) > 1
        for c in holders
        if (entry := c.tensors.get(name)) is not None
        and (entry.dtype, entry.shape) == (c.tensors[head].dtype, shape)
        and content.equal(c, c.tensors[head], entry)
    }
    return equal or set(names)


def _source(
    checkpoint: CheckpointIndex, head: str, shape: tuple[int, ...], known: Container[str]
) -> TensorEntry | None:
    """Return the embedding that `head` would be tied to, of those whose names are `known`."""
    found = _embeddings(checkpoint, head, shape)
    return next((entry for entry in found if entry.name in known), None)


def _embeddings(
    checkpoint: CheckpointIndex, head: str, shape: tuple[int, ...]
) -> list[TensorEntry]:
    """Return what could be the embedding of `head`, the most likely first."""
    ends = SHARED if ends_in(head, SHARING) else EMBEDDINGS
    parts = head.split(".")

    def order(entry: TensorEntry) -> tuple[int, int, str]:
        theirs = entry.name.split(".")
        common = 0
        while common < min(len(parts), len(theirs)) and parts[common] == theirs[common]:
            common += 1
        return -common, len(theirs), entry.name

    found = (
        entry
        for name, entry in checkpoint.tensors.items()
        if entry.shape == shape and ends_in(name, ends) and is_top(name)
    )
    return sorted(found, key=order)


def ends_in(name: str, endings: tuple[str, ...]) -> bool:
    """Tell whether the last parts of a dotted name are one of `endings`."""
    return name.endswith(endings) and f".{name}".endswith(tuple(f".{e}" for e in endings))


def is_top(name: str) -> bool:
    """Tell whether a tensor belongs to no layer (those of multi-token prediction do)."""
    return not any(part.isdigit() for part in name.split("."))


def _changed(ties: Ties, changed: dict[str, CheckpointIndex], *notes: str) -> Ties:
    checkpoints = tuple(changed.get(c.location, c) for c in ties.checkpoints)
    return replace(ties, checkpoints=checkpoints, notes=(*ties.notes, *notes))
