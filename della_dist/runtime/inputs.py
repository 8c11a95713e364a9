"""Open the checkpoints of a configuration, and read their tensors block by block."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import TracebackType

from della_dist.config import MergeConfig
from della_dist.errors import InputError, refused_as
from della_dist.locations import is_url, place
from della_dist.ops.blocks import MAX_RANKED_ELEMENTS, row_view
from della_dist.plan.build import MergePlan, build_plan
from della_dist.runtime.companions import companion_files
from della_dist.specs import CheckpointIndex, TensorEntry, num_elements
from della_dist.storage.checkpoint import open_checkpoint
from della_dist.storage.opening import open_store
from della_dist.storage.readahead import ReadAhead, RemoteReader, Want
from della_dist.storage.remote import REQUEST_BYTES, RemoteStore
from della_dist.storage.store import ObjectStat, Reader, Store, U8Array

#: Input shards that one task keeps mapped; each takes a file descriptor.
MAX_OPEN_SHARDS = 64


def open_plan(config: MergeConfig, *, shard_bytes: int | None = None) -> MergePlan:
    """Read the headers of every checkpoint that `config` names, check them, and plan the merge.

    Reads no tensor data.

    Raises
    ------
    InputError
        If a checkpoint is malformed, is given twice, or does not fit the others.
    ConfigError
        If parameters are out of bounds for some tensor.
    """
    locations = [m.model for m in config.models]
    if config.base_model is not None and config.has_base:
        locations.insert(0, config.base_model)
    _refuse_repeated(locations)
    if any(map(is_url, locations)):  # each takes a few round trips
        with ThreadPoolExecutor(len(locations)) as pool:
            indexes = list(pool.map(open_checkpoint, locations))
    else:
        indexes = [open_checkpoint(location) for location in locations]
    base = indexes.pop(0) if config.has_base else None
    plan = build_plan(config, base, tuple(indexes), shard_bytes=shard_bytes)
    _refuse_unrankable(plan)
    with refused_as(InputError, f"checkpoint {plan.reference.location}"):
        companions = {f.name: hashlib.sha256(f.data).hexdigest() for f in companion_files(plan)}
    return replace(plan, companions=companions)


def _refuse_unrankable(plan: MergePlan) -> None:
    for shard in plan.shards:
        for tensor in shard.tensors:
            if num_elements(tensor.shape) <= MAX_RANKED_ELEMENTS:
                continue
            if plan.action(tensor.name) == "merge":
                view = row_view(plan.recipe(tensor))
                if view.ranked and view.num_cols > MAX_RANKED_ELEMENTS:
                    raise InputError(
                        f"tensor {tensor.name} of {plan.reference.location} has "
                        f"{view.num_cols} elements that are to be ranked together; at most "
                        f"{MAX_RANKED_ELEMENTS} can be. Use `granularity: row`, or another method."
                    )


def _refuse_repeated(locations: list[str]) -> None:
    seen: dict[str, str] = {}
    for location in locations:
        real = place(location, follow_links=True)
        if real in seen:
            raise InputError(
                f"{location} and {seen[real]} are the same checkpoint. Merging a checkpoint with "
                "itself counts it twice: name each once, and give it a larger weight instead."
            )
        seen[real] = location


class InputStores:
    """The stores of the inputs of a process, opened when first needed. Thread-safe.

    Parameters
    ----------
    connections
        Requests at once of each remote store.
    """

    def __init__(self, connections: int) -> None:
        self._connections = connections
        self._lock = threading.Lock()
        self._stores: dict[str, Store] = {}

    def get(self, location: str) -> Store:
        """Return the store of a checkpoint."""
        with self._lock:
            if location not in self._stores:
                self._stores[location] = open_store(location, self._connections)
            return self._stores[location]


class InputReaders:
    """Readers of the shards of the inputs, opened when first read. One instance a task.

    A shard whose size or version is not the one it was planned with is an `InputError`: the file
    was changed since, and what was committed rests on its old content.

    Parameters
    ----------
    stores
        Where the checkpoints are.
    on_read
        Told the bytes of every view.
    read_ahead_bytes
        Of remote inputs, of this task.
    """

    def __init__(
        self, stores: InputStores, on_read: Callable[[int], None], read_ahead_bytes: int
    ) -> None:
        self._stores = stores
        self._on_read = on_read
        self._lock = threading.Lock()
        self._readers: dict[tuple[str, int], Reader] = {}
        self.ahead = ReadAhead(REQUEST_BYTES, read_ahead_bytes)

    def __enter__(self) -> InputReaders:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.ahead.close()
        for reader in self._readers.values():
            reader.close()
        self._readers.clear()

    def open(self, checkpoint: CheckpointIndex, entry: TensorEntry) -> Reader:
        """Return the reader of the shard that holds a tensor."""
        key = (checkpoint.location, entry.shard)
        with self._lock:
            reader = self._readers.get(key)
            if reader is None:
                store = self._stores.get(checkpoint.location)
                reader = self._readers[key] = self._open(store, checkpoint, entry)
                if len(self._readers) > MAX_OPEN_SHARDS:
                    # Not closed: tensors may still be read from it, and the last of them frees it.
                    self._readers.pop(next(iter(self._readers)))
        return reader

    def _open(self, store: Store, checkpoint: CheckpointIndex, entry: TensorEntry) -> Reader:
        shard = checkpoint.shards[entry.shard]
        planned = ObjectStat(shard.size_bytes, shard.version)
        if isinstance(store, RemoteStore):  # every request states the version it wants
            return store.open_reader(shard.name, planned, self.ahead)
        if store.stat(shard.name) != planned:
            raise InputError(
                f"{checkpoint.location}/{shard.name} was changed while the merge was running. "
                "Inputs must stay as they are until it is done; merge again with --restart."
            )
        return store.open_reader(shard.name)

    def source(self, checkpoint: CheckpointIndex, name: str, itemsize: int) -> TensorSource:
        """Return the bytes of one tensor."""
        entry = checkpoint.tensors[name]
        return TensorSource(self.open(checkpoint, entry), entry, itemsize, self._on_read)


class TensorSource:
    """The bytes of one tensor of one input, addressed by element."""

    __slots__ = ("_itemsize", "_on_read", "_reader", "_start")

    def __init__(
        self,
        reader: Reader,
        entry: TensorEntry,
        itemsize: int,
        on_read: Callable[[int], None],
    ) -> None:
        self._reader = reader
        self._start = entry.start
        self._itemsize = itemsize
        self._on_read = on_read

    def _range(self, start: int, stop: int) -> tuple[int, int]:
        return self._start + start * self._itemsize, self._start + stop * self._itemsize

    def want(self, start: int, stop: int) -> Want | None:
        """Return what reading elements `start` to `stop` asks of a remote store; None if local."""
        if isinstance(self._reader, RemoteReader):
            return self._reader, *self._range(start, stop)
        return None

    def prefetch(self, start: int, stop: int) -> None:
        """Ask for elements `start` to `stop` to be read in the background."""
        self._reader.prefetch(*self._range(start, stop))

    def view(self, start: int, stop: int) -> U8Array:
        """Return the bytes of elements `start` to `stop`, without copying them."""
        first, last = self._range(start, stop)
        self._on_read(last - first)
        return self._reader.view(first, last)

    def release(self, start: int, stop: int) -> None:
        """Give the memory of elements `start` to `stop` back; views of them stay valid."""
        self._reader.release(*self._range(start, stop))


def any_remote(plan: MergePlan) -> bool:
    """Return whether some input of `plan` is read from a remote store."""
    return any(is_url(checkpoint.location) for checkpoint in plan.inputs)
