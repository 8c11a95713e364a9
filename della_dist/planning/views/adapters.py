"""Models with adapters, seen as checkpoints: what is merged of each tensor is its delta."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from della_dist.errors import InputError
from della_dist.planning.content import Content
from della_dist.planning.facts import model_facts
from della_dist.planning.ties import CAUSAL_HEAD, EMBEDDINGS, HEADS, ends_in, is_top
from della_dist.planning.views.peft import Change, changes
from della_dist.planning.views.peft_targets import config_notes
from della_dist.planning.views.peft_variants import CONFIG_NAME
from della_dist.specs.checkpoint import CheckpointIndex, TensorEntry
from della_dist.specs.dtypes import FLOAT_DTYPES
from della_dist.specs.runs import Runs
from della_dist.specs.sources import Adapted, Column, Dora, Rows, Stored, Term, stored
from della_dist.wording import few, plural

#: Where a tensor lies, whatever it is called (`TensorEntry.place`).
Place: TypeAlias = tuple[object, ...]


@dataclass(frozen=True, slots=True)
class AdaptedModel:
    """A model with adapters, as one of the checkpoints that are merged.

    Its shards are numbered as if those of the model and of the adapters were one checkpoint's.
    """

    index: CheckpointIndex
    """What matching sees; it has no shards of its own."""
    number: int
    """Of `index` among the inputs of the plan."""
    inputs: tuple[int, ...]
    """Numbers of the model and its adapters among the inputs."""
    first_shards: tuple[int, ...]
    """The first shard of each."""
    changed: Mapping[str, tuple[Change, ...]]
    """By tensor of the model, what the adapters do, in their order."""
    name_at: Mapping[Place, str]
    """The tensor of `index` at a place: an embedding, where a head is filled in with it."""
    dtypes: Mapping[str, str]
    """Of tensors that adapters have in the model's place: what the model has there."""
    notes: tuple[str, ...]
    """What a person should know of names that the adapters have for its tensors."""

    def stored(self, entry: TensorEntry) -> Stored | Rows:
        """Return a tensor of `index` as the files have it."""
        i = bisect_right(self.first_shards, entry.shard) - 1
        first = self.first_shards[i]
        if first:  # of an adapter, whose tensors are in one piece
            entry = replace(entry, shard=entry.shard - first)
        return stored(self.inputs[i], entry)

    def column(self, entry: TensorEntry, base: Column | None = None) -> Column:
        """Return what is merged of a tensor of `index`.

        Parameters
        ----------
        entry
            The tensor.
        base
            What it is compared with, if deltas are merged: where that is the tensor of its own
            model, there is a delta alone.
        """
        weight = of = self.stored(entry)
        if entry.dtype not in FLOAT_DTYPES:
            return weight
        changes = self.changes_of(entry)
        rows = [change.rows for change in changes if change.rows is not None]
        if rows:
            of = self._with_rows(entry, weight, rows)
        terms: list[Term] = []
        for change in changes:
            lengths = change.magnitude
            terms += (p if lengths is None else Dora(p, weight, lengths) for p in change.products)
        is_delta = base is not None and of == base
        if not is_delta and not terms:
            return of
        dtype = "F64" if of.dtype == "F64" and not is_delta else "F32"
        return Adapted(self.number, entry.shape, dtype, None if is_delta else of, tuple(terms))

    def changes_of(self, entry: TensorEntry) -> tuple[Change, ...]:
        """Return what adapters do to a tensor of `index`."""
        is_ours = entry.name in self.index.tensors
        name = entry.name if is_ours else self.name_at.get(entry.place, entry.name)
        return self.changed.get(name, ())

    def digest(self) -> str:
        """Return a digest of what the adapters do, their configurations included."""
        own = [(n, e.shard, e.start) for n, e in self.index.tensors.items() if self.is_replaced(e)]
        return hashlib.sha256(
            repr((sorted(own), sorted(self.changed.items()))).encode()
        ).hexdigest()

    def is_replaced(self, entry: TensorEntry) -> bool:
        """Return whether a tensor of `index` is an adapter's, in the place of the model's."""
        return entry.shard >= self.first_shards[1]

    def _with_rows(
        self,
        entry: TensorEntry,
        weight: Stored | Rows,
        rows: Sequence[tuple[Stored, tuple[int, ...]]],
    ) -> Rows:
        """Return a tensor in which adapters have rows of their own; of two, the later one."""
        assert isinstance(weight, Stored)  # an embedding is no part of another tensor
        there: dict[int, tuple[int, int]] = {}
        sources = [weight]
        for theirs, numbers in rows:
            there |= {number: (len(sources), i) for i, number in enumerate(numbers)}
            sources.append(theirs)
        runs = Runs.of(there.get(i, (0, i)) for i in range(entry.shape[0]))
        dtype = entry.dtype
        if any(source.dtype != dtype for source in sources) and dtype != "F64":
            dtype = "F32"
        return Rows(self.number, entry.shape, dtype, tuple(sources), runs)


def with_adapters(
    location: str,
    number: int,
    model: tuple[int, CheckpointIndex],
    adapters: Sequence[tuple[int, CheckpointIndex]],
    content: Content,
) -> AdaptedModel:
    """Return a model with adapters, whose deltas add, as one checkpoint.

    Parameters
    ----------
    location
        What it is called.
    number
        Its own among the inputs of the plan.
    model, adapters
        With their numbers.
    content
        Tells whether a stored head is the embedding.

    Raises
    ------
    InputError
        If they do not fit.
    """
    first_shards, shards = [], 0
    for _, checkpoint in (model, *adapters):
        first_shards.append(shards)
        shards += len(checkpoint.shards)
    seen = _with_head(model[1])
    read = [changes(adapter, i, seen) for i, adapter in adapters]
    found = [of_adapter for of_adapter, _ in read]
    tensors = dict(seen.tensors)
    for i, of_adapter in enumerate(found, 1):
        for name, change in of_adapter.items():
            if change.whole is None:
                continue
            if any(name in of and (of[name].whole or of[name].rows) for of in found[: i - 1]):
                raise InputError(
                    f"{location}: two of its adapters have {name}, or rows of it, in its place. "
                    "Give them as experts of their own."
                )
            _refuse_lost_head(adapters[i - 1][1], model[1], name)
            _refuse_copies(adapters[i - 1][1], seen, seen.tensors[name], content)
            shard = change.whole.shard + first_shards[i]
            tensors[name] = replace(change.whole, name=name, shard=shard)
    wholes = {name for name, entry in tensors.items() if entry is not seen.tensors[name]}
    changed: dict[str, list[Change]] = {}
    for of_adapter in found:
        for name, change in of_adapter.items():
            if not change.products and change.rows is None:
                continue
            if change.rows is not None and name in wholes:
                raise InputError(
                    f"{location}: one of its adapters has {name} in its place, and another rows "
                    "of it. Give them as experts of their own."
                )
            for one in _same(seen, seen.tensors[name], content):
                if one.name == name or one.name not in wholes:
                    changed.setdefault(one.name, []).append(change)
    _drop_head(tensors, model[1], [adapter for _, adapter in adapters])
    return AdaptedModel(
        index=CheckpointIndex(location, (), tensors, (), model[1].documents),
        number=number,
        inputs=(model[0], *(i for i, _ in adapters)),
        first_shards=tuple(first_shards),
        changed={name: tuple(of_name) for name, of_name in changed.items()},
        name_at={entry.place: name for name, entry in reversed(tensors.items())},
        dtypes={name: model[1].tensors[name].dtype for name in wholes if name in model[1].tensors},
        notes=tuple([note for _, note in read if note is not None]),
    )


def _with_head(model: CheckpointIndex) -> CheckpointIndex:
    """Return a model with a head by name, where its embedding is its head."""
    embedding = next((e for n, e in model.tensors.items() if _is_shared(n, EMBEDDINGS)), None)
    facts = model_facts(model)
    if embedding is None or facts.ties_head is False or not facts.has_causal_head:
        return model
    if any(_is_shared(name, HEADS) for name in model.tensors):
        return model
    head = replace(embedding, name=CAUSAL_HEAD)
    return replace(model, tensors={**model.tensors, CAUSAL_HEAD: head})


def _refuse_lost_head(adapter: CheckpointIndex, model: CheckpointIndex, name: str) -> None:
    """Refuse another embedding for a model whose head it is, and whose head has another name."""
    facts = model_facts(model)
    is_tied = facts.ties_head is not False and facts.has_masked_head and not facts.has_causal_head
    if not is_tied or not _is_shared(name, EMBEDDINGS):
        return
    if any(_is_shared(one, HEADS) for one in model.tensors):
        return
    raise InputError(
        f"adapter {adapter.location} has another {name}, and the head of {model.location} is that "
        "embedding: it would be lost. Merge the adapter into its model first (peft's "
        "merge_and_unload)."
    )


def _refuse_copies(
    adapter: CheckpointIndex, model: CheckpointIndex, entry: TensorEntry, content: Content
) -> None:
    """Refuse another embedding for one of several stacks that share it, and have it each.

    PEFT gives it to the module of that name alone; which one the stacks then look at hangs on the
    model's code.
    """
    if not ends_in(entry.name, EMBEDDINGS):
        return
    named = [other for name, other in model.tensors.items() if ends_in(name, EMBEDDINGS)]
    copies = [other.name for other in _equal(model, entry, named, content) if other is not entry]
    if copies:
        raise InputError(
            f"adapter {adapter.location} has another {entry.name}, and {model.location} has that "
            f"embedding again as {few(copies)}: whether it is meant for them, too, is not known. "
            "Merge the adapter into its model first (peft's merge_and_unload)."
        )


def _drop_head(
    tensors: dict[str, TensorEntry], model: CheckpointIndex, adapters: Sequence[CheckpointIndex]
) -> None:
    """Leave the head to the embedding again, where it still is one.

    PEFT trains a copy of the embedding (`modules_to_save`), and the head stays what it was, unless
    it is told to tie them.
    """
    if CAUSAL_HEAD not in tensors or CAUSAL_HEAD in model.tensors:
        return
    embedding = next(e for n, e in tensors.items() if _is_shared(n, EMBEDDINGS))
    is_tied = any(a.documents[CONFIG_NAME].get("ensure_weight_tying") for a in adapters)
    if is_tied or embedding.place == tensors[CAUSAL_HEAD].place:
        del tensors[CAUSAL_HEAD]


def _same(model: CheckpointIndex, entry: TensorEntry, content: Content) -> list[TensorEntry]:
    """Return the tensors that are one parameter of a model, of which `entry` is one.

    PEFT merges into the parameter: where a head is tied to the embedding, into both.
    """
    shared = (*HEADS, *EMBEDDINGS)
    if not _is_shared(entry.name, shared) or model_facts(model).ties_head is False:
        return [entry]
    named = [other for name, other in model.tensors.items() if _is_shared(name, shared)]
    return _equal(model, entry, named, content)


def _equal(
    model: CheckpointIndex, entry: TensorEntry, others: Iterable[TensorEntry], content: Content
) -> list[TensorEntry]:
    """Return which tensors of a model are `entry`, or have its bytes."""
    return [
        other
        for other in others
        if other is entry
        or (
            (other.dtype, other.shape) == (entry.dtype, entry.shape)
            and content.equal(model, entry, other)
        )
    ]


def _is_shared(name: str, endings: tuple[str, ...]) -> bool:
    return ends_in(name, endings) and is_top(name)


def adapter_notes(
    models: Iterable[AdaptedModel], inputs: Sequence[CheckpointIndex]
) -> Iterator[str]:
    """Yield what a person should know of models with adapters, a line each."""
    for model in models:
        base = inputs[model.inputs[0]]
        entries = model.index.tensors.values()
        whole = sum(map(model.is_replaced, entries))
        changed = sum(bool(model.changes_of(entry)) for entry in entries)
        yield from model.notes
        replaced = f" and takes the place of {whole}" if whole else ""
        yield (
            f"{model.index.location}: LoRA on {base.location}, changes {changed} of "
            f"{plural(len(entries), 'tensor')}{replaced}."
        )
        for number in model.inputs[1:]:
            one = inputs[number]
            yield from config_notes(one.location, one.documents[CONFIG_NAME], one.tensors)
            stated = inputs[number].documents[CONFIG_NAME].get("base_model_name_or_path")
            name = str(stated or "").rstrip("/").rpartition("/")[2]
            if name and name not in base.location:
                yield (
                    f"{inputs[number].location} says that it was trained on {stated}; it is "
                    f"taken for one of {base.location}."
                )
