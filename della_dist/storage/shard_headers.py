"""What one file of weights holds: the one function that asks which format it is in."""

from __future__ import annotations

from collections.abc import Sequence

from della_dist.specs.checkpoint import ShardFile, TensorEntry
from della_dist.storage.header import parse_header
from della_dist.storage.opening import DEFAULT_CONNECTIONS
from della_dist.storage.shard_files import is_torch_file
from della_dist.storage.store import Store
from della_dist.storage.torch_files.tensors import parse_torch_file

#: Read of a remote shard at once: most headers fit.
HEAD_BYTES = 256 << 10


def open_shard(store: Store, name: str, number: int = 0) -> tuple[ShardFile, Sequence[TensorEntry]]:
    """Return what one file of weights is, and its tensors; no tensor data is read.

    Parameters
    ----------
    store
        Where it lies.
    name
        Its key; its ending tells the format.
    number
        Goes into the `TensorEntry.shard` of every tensor.

    Raises
    ------
    InputError
        If it is no valid file of its format; where it lies, what is wrong, what to do.
    StorageError
        If it cannot be read.
    """
    store.check(name)
    stat = store.stat(name)
    size_bytes, where = stat.size_bytes, store.describe(name)
    is_torch = is_torch_file(name)
    # A file of torch has its table at its end, and what the table is of at its beginning.
    head_stop = min(size_bytes, HEAD_BYTES) if store.is_remote else 0
    tail_start = max(head_stop, size_bytes - HEAD_BYTES)
    has_tail = store.is_remote and is_torch
    head = store.read(name, 0, head_stop) if head_stop else b""
    tail = store.read(name, tail_start, size_bytes) if has_tail else b""

    def read(start: int, stop: int) -> bytes:
        if stop <= head_stop:
            return head[start:stop]
        if has_tail and start >= tail_start:
            return tail[start - tail_start : stop - tail_start]
        return store.read(name, start, stop)

    if is_torch:
        requests = DEFAULT_CONNECTIONS if store.is_remote else 1
        table = parse_torch_file(read, size_bytes, where=where, shard=number, requests=requests)
        return ShardFile(name, size_bytes, stat.version, table.sha256), table.tensors
    header = parse_header(read, size_bytes, where=where, shard=number)
    return ShardFile(name, size_bytes, stat.version, header.sha256), header.tensors
