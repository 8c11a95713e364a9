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
from della_dist.planning.ties import CAUSAL_HEAD, EMBEDDINGS, HEADS, ends_in
from della_dist.planning.views.peft import CONFIG_NAME, Change, changes
from della_dist.planning.views.products import Product
from della_dist.specs.checkpoint import CheckpointIndex, TensorEntry
from della_dist.specs.dtypes import FLOAT_DTYPES
from della_dist.specs.rows import MAX_WHOLE_COLS
from della_dist.specs.runs import Runs
from della_dist.specs.sources import Adapted, Column, Dora, LowRank, Rows, Stored, stored
from della_dist.wording import plural

#: Where a tensor lies, whatever it is called: shard and first byte.
Place: TypeAlias = tuple[int, int]


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
    changed: Mapping[Place, tuple[tuple[int, Change], ...]]
    """By tensor of the model: which adapter, counted as in `inputs`, and what it does."""
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
        terms: list[LowRank | Dora] = []
        for adapter, change in self.changes_of(entry):
            if change.rows is not None:
                of = self._with_rows(entry, weight, adapter, change.rows)
            terms += [self._term(adapter, product, weight) for product in change.products]
        is_delta = base is not None and of == base
        if not is_delta and not terms:
            return of
        dtype = "F64" if of.dtype == "F64" and not is_delta else "F32"
        return Adapted(self.number, entry.shape, dtype, None if is_delta else of, tuple(terms))

    def changes_of(self, entry: TensorEntry) -> tuple[tuple[int, Change], ...]:
        """Return what adapters do to a tensor of `index`."""
        return self.changed.get(_place(entry), ())

    def digest(self) -> str:
        """Return a digest of what the adapters do, their configurations included."""
        own = [(n, e.shard, e.start) for n, e in self.index.tensors.items() if self._is_own(e)]
        return hashlib.sha256(
            repr((sorted(own), sorted(self.changed.items()))).encode()
        ).hexdigest()

    def _is_own(self, entry: TensorEntry) -> bool:
        return len(self.first_shards) > 1 and entry.shard >= self.first_shards[1]

    def _of(self, adapter: int, entry: TensorEntry) -> Stored:
        return Stored(self.inputs[adapter], entry)

    def _term(self, adapter: int, product: Product, weight: Stored | Rows) -> LowRank | Dora:
        of = LowRank(
            self._of(adapter, product.left),
            self._of(adapter, product.right),
            product.scaling,
            product.groups,
            product.rows,
            product.cols,
            product.rank,
            product.left_strides,
            product.right_strides,
            product.left_start,
            product.right_start,
            product.first_row,
        )
        if product.magnitude is None:
            return of
        return Dora(of, weight, self._of(adapter, product.magnitude))

    def _with_rows(
        self,
        entry: TensorEntry,
        weight: Stored | Rows,
        adapter: int,
        rows: tuple[TensorEntry, tuple[int, ...]],
    ) -> Rows:
        assert isinstance(weight, Stored)  # an embedding is no part of another tensor
        there = {number: i for i, number in enumerate(rows[1])}
        runs = Runs.of((1, there[i]) if i in there else (0, i) for i in range(entry.shape[0]))
        theirs = self._of(adapter, rows[0])
        dtype = entry.dtype
        if dtype not in (theirs.dtype, "F64"):
            dtype = "F32"
        return Rows(self.number, entry.shape, dtype, (weight, theirs), runs)


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
    read = [changes(adapter, seen) for _, adapter in adapters]
    found = [of_adapter for of_adapter, _ in read]
    tensors = dict(seen.tensors)
    for i, of_adapter in enumerate(found, 1):
        of_base: set[str] = set()
        for name, change in of_adapter.items():
            if change.whole is None:
                continue
            alike = _same(seen, seen.tensors[name], content) if change.is_of_base else []
            for one in {name, *(entry.name for entry in alike)}:
                if change.is_of_base and one in of_base:
                    continue  # the parameter that embedding and head are, under both names
                of_base |= {one} if change.is_of_base else set()
                if tensors[one] is not seen.tensors[one]:
                    raise InputError(
                        f"{location}: {one} is there twice as a whole, and only one can take its "
                        "place. Give the adapters as experts of their own."
                    )
                shard = change.whole.shard + first_shards[i]
                tensors[one] = replace(change.whole, name=one, shard=shard)
    _drop_head(tensors, model[1], [adapter for _, adapter in adapters])
    changed: dict[Place, list[tuple[int, Change]]] = {}
    for i, of_adapter in enumerate(found, 1):
        for name, change in of_adapter.items():
            if not change.products and change.rows is None:
                continue
            _refuse_long(adapters[i - 1][1], seen.tensors[name], change)
            alike = _same(seen, seen.tensors[name], content)
            for place in {_place(tensors[one.name]) for one in alike if one.name in tensors}:
                changed.setdefault(place, []).append((i, change))
    return AdaptedModel(
        index=CheckpointIndex(location, (), tensors, (), model[1].documents),
        number=number,
        inputs=(model[0], *(i for i, _ in adapters)),
        first_shards=tuple(first_shards),
        changed={place: tuple(of_place) for place, of_place in changed.items()},
        notes=tuple([note for _, note in read if note is not None]),
    )


def _with_head(model: CheckpointIndex) -> CheckpointIndex:
    """Return a model with a head by name, where its embedding is its head."""
    embedding = next((e for n, e in model.tensors.items() if _is_shared(n, EMBEDDINGS)), None)
    if embedding is None or not model_facts(model).ties_head:
        return model
    if any(_is_shared(name, HEADS) for name in model.tensors):
        return model
    return replace(
        model, tensors={**model.tensors, CAUSAL_HEAD: replace(embedding, name=CAUSAL_HEAD)}
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
    if is_tied or _place(embedding) == _place(tensors[CAUSAL_HEAD]):
        del tensors[CAUSAL_HEAD]


def _same(model: CheckpointIndex, entry: TensorEntry, content: Content) -> list[TensorEntry]:
    """Return the tensors that are one parameter of a model, of which `entry` is one.

    PEFT merges into the parameter: where a head is tied to the embedding, into both.
    """
    shared = (*HEADS, *EMBEDDINGS)
    if not _is_shared(entry.name, shared) or not model_facts(model).ties_head:
        return [entry]
    return [
        other
        for name, other in model.tensors.items()
        if other is entry
        or (
            _is_shared(name, shared)
            and (other.dtype, other.shape) == (entry.dtype, entry.shape)
            and content.equal(model, entry, other)
        )
    ]


def _place(entry: TensorEntry) -> Place:
    return entry.shard, entry.start


def _is_shared(name: str, endings: tuple[str, ...]) -> bool:
    return ends_in(name, endings) and not any(part.isdigit() for part in name.split("."))


def _refuse_long(adapter: CheckpointIndex, entry: TensorEntry, change: Change) -> None:
    for product in change.products:
        if product.magnitude is not None and product.cols > MAX_WHOLE_COLS:
            raise InputError(
                f"adapter {adapter.location}: rows of {entry.name} have {product.cols} elements, "
                f"and DoRA is known here for at most {MAX_WHOLE_COLS}."
            )


def adapter_notes(
    models: Iterable[AdaptedModel], inputs: Sequence[CheckpointIndex]
) -> Iterator[str]:
    """Yield what a person should know of models with adapters, a line each."""
    for model in models:
        base = inputs[model.inputs[0]]
        entries = model.index.tensors.values()
        whole = sum(model.stored(entry).checkpoint != model.inputs[0] for entry in entries)
        changed = sum(bool(model.changes_of(entry)) for entry in entries)
        yield from model.notes
        replaced = f" and takes the place of {whole}" if whole else ""
        yield (
            f"{model.index.location}: LoRA on {base.location}, changes {changed} of "
            f"{plural(len(entries), 'tensor')}{replaced}."
        )
        for number in model.inputs[1:]:
            stated = inputs[number].documents[CONFIG_NAME].get("base_model_name_or_path")
            name = str(stated or "").rstrip("/").rpartition("/")[2]
            if name and name not in base.location:
                yield (
                    f"{inputs[number].location} says that it was trained on {stated}; it is "
                    f"taken for one of {base.location}."
                )
