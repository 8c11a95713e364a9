"""Read the tensors of the inputs block by block."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from della_dist.errors import InputError, StorageError
from della_dist.locations import is_url
from della_dist.planning.build import MergePlan
from della_dist.specs.checkpoint import CheckpointIndex, ShardFile, TensorEntry
from della_dist.specs.dtypes import itemsize
from della_dist.specs.sources import Stored
from della_dist.storage.opening import is_here, open_store
from della_dist.storage.readahead import ReadAhead, RemoteReader, Want
from della_dist.storage.remote.files import REQUEST_BYTES
from della_dist.storage.store import ObjectStat, Reader, Store, U8Array
from della_dist.storage.strided import gather

#: Input shards that one task keeps mapped, beside those of blocks that are being merged.
MAX_OPEN_SHARDS = 64


class InputStores:
    """The stores of the inputs of a process, opened when first needed. Thread-safe.

    Parameters
    ----------
    connections
        Requests at once of each remote store.
    planned_elsewhere
        Whether another machine may have made the plan: its files may be copies of the files here,
        which then have other times.
    """

    def __init__(self, connections: int, *, planned_elsewhere: bool = False) -> None:
        self._connections = connections
        self._planned_elsewhere = planned_elsewhere
        self._lock = threading.Lock()
        self._stores: dict[str, Store] = {}
        self._seen: dict[tuple[str, str], ShardFile] = {}

    def get(self, location: str) -> Store:
        """Return the store of a checkpoint."""
        with self._lock:
            if location not in self._stores:
                self._stores[location] = open_store(location, self._connections)
            return self._stores[location]

    def shard(self, store: Store, checkpoint: CheckpointIndex, number: int) -> ShardFile:
        """Return a shard as this process must find it from now on.

        Raises
        ------
        InputChangedError
            If it is not the one that was planned.
        """
        if not self._planned_elsewhere:
            return checkpoint.shards[number]
        key = (checkpoint.location, checkpoint.shards[number].name)
        with self._lock:
            if key not in self._seen:
                self._seen[key] = store.as_seen_here(checkpoint.shards[number])
            return self._seen[key]


class InputReaders:
    """Readers of the shards of the inputs, opened when first read. One instance a task.

    Local shards are looked at once more when it is left, after the last read of the task: the file
    that was planned must have lain there all the time. Since the time of its last change only goes
    forward, one look finds a change before, between and after all passes over it. That is also done
    when the task failed by what it read, which the change may explain. (A remote store is told with
    every request which version is wanted.)

    Parameters
    ----------
    inputs
        The checkpoints.
    stores
        Where they are.
    on_read
        Told the bytes of every view.
    read_ahead_bytes
        Of remote inputs, of this task.

    Raises
    ------
    InputChangedError
        When a shard is opened, and on leaving, if it is not the one that was planned.
    """

    def __init__(
        self,
        inputs: Sequence[CheckpointIndex],
        stores: InputStores,
        on_read: Callable[[int], None],
        read_ahead_bytes: int,
    ) -> None:
        self._inputs = inputs
        self._stores = stores
        self._on_read = on_read
        self._lock = threading.Lock()
        self._readers: dict[tuple[str, str], Reader] = {}
        self._opened: dict[tuple[str, str], tuple[Store, ShardFile]] = {}
        self.ahead = ReadAhead(REQUEST_BYTES, read_ahead_bytes)

    def __enter__(self) -> InputReaders:
        return self

    def __exit__(self, kind: object, exc: object, trace: object) -> None:
        self.ahead.close()
        for reader in self._readers.values():
            reader.close()
        self._readers.clear()
        if exc is None or isinstance(exc, InputError | StorageError):
            self.refuse_changed()

    def refuse_changed(self) -> None:
        """Raise `InputChangedError` if a shard that was opened is no longer the planned one."""
        for store, shard in list(self._opened.values()):
            store.refuse_changed(shard)

    def open(self, checkpoint: CheckpointIndex, entry: TensorEntry) -> Reader:
        """Return the reader of the shard that holds a tensor."""
        # A folder may hold a model and an adapter, whose files are numbered alike.
        key = (checkpoint.location, checkpoint.shards[entry.shard].name)
        with self._lock:
            reader = self._readers.get(key)
            if reader is None:
                reader = self._readers[key] = self._open(checkpoint, entry.shard)
                if len(self._readers) > MAX_OPEN_SHARDS:
                    # Not closed: tensors may still be read from it, and the last of them frees it.
                    self._readers.pop(next(iter(self._readers)))
        return reader

    def _open(self, checkpoint: CheckpointIndex, number: int) -> Reader:
        store = self._stores.get(checkpoint.location)
        shard = self._stores.shard(store, checkpoint, number)
        self._opened[checkpoint.location, shard.name] = store, shard
        planned = ObjectStat(shard.size_bytes, shard.version)
        reader = store.open_reader(shard.name, planned, self.ahead)
        if reader.stat != planned:
            store.refuse_changed(shard)
        return reader

    def bytes_of(self, leaf: Stored) -> TensorBytes:
        """Return the bytes of a stored tensor."""
        entry = leaf.entry
        reader = self.open(self._inputs[leaf.checkpoint], entry)
        size = itemsize(entry.dtype)
        kind = TensorBytes if entry.strided is None else StridedBytes
        return kind(reader, entry, size, self._on_read)


class TensorBytes:
    """The bytes of one tensor of one input, addressed by element."""

    __slots__ = ("_entry", "_itemsize", "_on_read", "_reader", "_start")

    def __init__(
        self,
        reader: Reader,
        entry: TensorEntry,
        itemsize: int,
        on_read: Callable[[int], None],
    ) -> None:
        self._reader = reader
        self._entry = entry
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


class StridedBytes(TensorBytes):
    """The same of a view whose elements do not follow each other: a block of it is a copy."""

    __slots__ = ()

    def want(self, start: int, stop: int) -> None:
        """Return None: what is read of it is read piece by piece, by whoever asks for a view."""
        return

    def prefetch(self, start: int, stop: int) -> None:
        """Do nothing, for the same reason."""
        return

    def view(self, start: int, stop: int) -> U8Array:
        """Return the bytes of elements `start` to `stop`, gathered."""
        strided = self._entry.strided
        assert strided is not None
        self._on_read((stop - start) * self._itemsize)
        return gather(strided, self._itemsize, start, stop, self._read, self._let_go)

    def release(self, start: int, stop: int) -> None:
        """Do nothing: nothing is held."""
        return

    def _read(self, first: int, last: int) -> U8Array:
        return self._reader.view(self._start + first, self._start + last)

    def _let_go(self, first: int, last: int) -> None:
        self._reader.release(self._start + first, self._start + last)


def any_remote(plan: MergePlan) -> bool:
    """Return whether some input of `plan` lies in a remote store."""
    return any(is_url(checkpoint.location) for checkpoint in plan.inputs)


def any_read_remotely(plan: MergePlan) -> bool:
    """Return whether this machine reads some input from a remote store: no cache here has it."""
    return any(
        not is_here(checkpoint.location, (shard.name for shard in checkpoint.shards))
        for checkpoint in plan.inputs
    )
