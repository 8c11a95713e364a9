"""An output that is still to be made, seen as an input: what its plan says of it.

Headers are known to the byte, and so are the files beside the weights, each the one that it is
taken from or made of. Of the tensors' bytes it is known which are equal by construction.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from della_dist.planning.build import MergePlan
from della_dist.planning.content import Content
from della_dist.planning.layout import OutputTensor
from della_dist.runtime.companions.made import made_files
from della_dist.runtime.companions.names import is_of_tokenizer
from della_dist.runtime.output.records import run_record
from della_dist.runtime.task.merge import shard_entries
from della_dist.runtime.upstream import Planned, Stage
from della_dist.specs.checkpoint import CheckpointIndex, ShardFile, TensorEntry
from della_dist.specs.sources import (
    Adapted,
    Column,
    Mean,
    MeanRow,
    Merged,
    Rows,
    Same,
    Stored,
    columns,
)
from della_dist.storage.checkpoint import DOCUMENTS
from della_dist.storage.header import build_header
from della_dist.storage.readahead import ReadAhead
from della_dist.storage.store import ObjectStat, Reader, Store, check_key
from della_dist.storage.strict_json import parse_object, plain_object


def planned_stage(
    plan: MergePlan,
    location: str,
    records: tuple[Mapping[str, Any], ...],
    *,
    content: Content,
    store_of: Callable[[str], Store],
) -> Stage:
    """Return the output of `plan` as an input, before it is made.

    Parameters
    ----------
    plan
        Of the stage.
    location
        Where its output is going to be.
    records
        See `Stage`.
    content
        Knows the bytes of the inputs of `plan`.
    store_of
        Returns the store of an input of `plan` by its location.
    """
    shards: list[ShardFile] = []
    tensors: dict[str, TensorEntry] = {}
    by_place: dict[tuple[int, int], OutputTensor] = {}
    for number, shard in enumerate(plan.shards):
        header, entries = build_header(*shard_entries(shard))
        size_bytes = entries[-1].stop if entries else len(header)
        digest = hashlib.sha256(header).hexdigest()
        shards.append(ShardFile(shard.name, size_bytes, version="", header_sha256=digest))
        laid_out = {tensor.name: tensor for tensor in shard.tensors}
        for entry in entries:
            tensors[entry.name] = replace(entry, shard=number)
            by_place[number, entry.start] = laid_out[entry.name]  # of empty ones, the next
    store = PlannedStore(plan, location, store_of)
    files, folders = store.children("")
    documents = {
        name: plain_object(parse_object(store.read(name), allow_constants=True))
        for name in DOCUMENTS
        if name in files
    }

    def equal(a: TensorEntry, b: TensorEntry) -> bool:
        one, other = by_place[a.shard, a.start], by_place[b.shard, b.start]
        return will_be_equal(plan, one, other, content)

    checkpoint = CheckpointIndex(
        location,
        tuple(shards),
        tensors,
        tuple(files),
        documents,
        tuple(folders),
        is_stage=True,
        stage=plan.stage,
    )
    store.forget()
    return Stage(checkpoint, records, Planned(store, equal, store.forget))


def will_be_equal(plan: MergePlan, a: OutputTensor, b: OutputTensor, content: Content) -> bool:
    """Return whether two tensors of an output will have the same bytes, by how they are made.

    Others may come out equal all the same (where every weight is zero): nobody can tell before.
    """
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    twin = plan.twins.get(a.name, a.name)
    if twin == plan.twins.get(b.name, b.name):
        return True
    one, other = plan.source(a), plan.source(b)
    match one, other:
        case Merged(mine), Merged(theirs):
            is_random = mine.settings.drop in ("magprune", "random")
            if is_random or replace(mine, name="") != replace(theirs, name=""):
                return False
            pairs = list(zip(columns(one), columns(other), strict=True))
        case (Stored() | Rows() | Same(), Stored() | Rows() | Same()):
            pairs = [(columns(one)[0], columns(other)[0])]
        case _:
            return False
    return all(_are_equal(plan, mine, theirs, content) for mine, theirs in pairs)


def _are_equal(
    plan: MergePlan,
    a: Column | MeanRow | Mean,
    b: Column | MeanRow | Mean,
    content: Content,
) -> bool:
    """Return whether two inputs of a merge have the same bytes, by what they are made of."""
    match a, b:
        case _ if a.dtype != b.dtype:
            return False
        case Stored(), Stored():
            checkpoint = plan.inputs[a.checkpoint]
            return a.checkpoint == b.checkpoint and content.equal(checkpoint, a.entry, b.entry)
        case MeanRow(), MeanRow():
            same_rows = (a.first, a.count) == (b.first, b.count)
            return same_rows and _are_equal(plan, a.of, b.of, content)
        case Rows(), Rows():
            if (a.shape, a.runs) != (b.shape, b.runs):
                return False
        case Mean(), Mean():
            pass
        case _:
            return isinstance(a, Adapted) and a == b
    pairs = zip(a.sources, b.sources, strict=False)
    return len(a.sources) == len(b.sources) and all(_are_equal(plan, *p, content) for p in pairs)


class PlannedStore:
    """The files of an output that is still to be made; see `della_dist.storage.store.Store`.

    All are listed, and those can be read that are there for other merges to take over: not the
    weights, nor what is written of them in the end.
    """

    is_remote = False

    def __init__(self, plan: MergePlan, location: str, store_of: Callable[[str], Store]) -> None:
        self.location = location
        self._plan = plan
        self._store_of = store_of
        record = run_record(plan, {})
        self._names = sorted({*record.shards, *record.files})
        self._made: dict[str, bytes | None] = {}
        self._lock = threading.Lock()

    def forget(self) -> None:
        """Let go of files that were made."""
        with self._lock:
            self._made.clear()

    def describe(self, key: str) -> str:
        """Return where `key` is going to lie, for messages."""
        return f"{self.location.rstrip('/')}/{key}"

    def stat(self, key: str) -> ObjectStat:
        """Return the size of `key`, which has no version."""
        return ObjectStat(self._plan.companion_bytes[key], "")

    def exists(self, key: str) -> bool:
        """Return whether there is going to be a file `key`."""
        return key in self._names

    def children(self, folder: str) -> tuple[list[str], list[str]]:
        """Return the keys right in `folder`, sorted: of files, and of folders."""
        prefix = f"{folder}/" if folder else ""
        inner = [key.removeprefix(prefix) for key in self._names if key.startswith(prefix)]
        files = [f"{prefix}{key}" for key in inner if "/" not in key]
        folders = {f"{prefix}{key.partition('/')[0]}" for key in inner if "/" in key}
        return files, sorted(folders)

    def list(self, prefix: str = "") -> list[str]:
        """Return the keys that begin with `prefix`, sorted."""
        return [key for key in self._names if key.startswith(prefix)]

    def read(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
        """Return the bytes of `key` from `start` up to `stop` (its end if None), all of them."""
        plan = self._plan
        checkpoint = plan.tokenizer if is_of_tokenizer(check_key(key)) else plan.reference
        source = self._store_of(checkpoint.location)
        with self._lock:
            if key not in self._made:
                made = made_files(plan, checkpoint, source, plan.companion_bytes, self._store_of)
                make = made.get(key)
                self._made[key] = None if make is None else make()
            data = self._made[key]
        return source.read(key, start, stop) if data is None else data[start:stop]

    def open_reader(
        self, key: str, planned: ObjectStat | None = None, ahead: ReadAhead | None = None
    ) -> Reader:
        """Refuse: nothing large is read before it is made."""
        raise AssertionError(f"{self.describe(key)} is not made yet")

    def links(self, keys: Iterable[str]) -> Sequence[str]:
        """Return nothing: an output has no links."""
        return []

    def check(self, key: str) -> None:
        """Do nothing, for the same reason."""

    def sample(self, key: str, size_bytes: int) -> str:
        """Return nothing: there is no content yet."""
        return ""

    def as_seen_here(self, shard: ShardFile) -> ShardFile:
        """Return the shard as it is."""
        return shard

    def refuse_changed(self, shard: ShardFile) -> None:
        """Do nothing: there is nothing that could be changed."""
