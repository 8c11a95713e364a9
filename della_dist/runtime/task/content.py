"""The few questions that planning asks of the bytes of the inputs, answered by reading them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from blake3 import blake3

from della_dist.errors import InputError, refused_as
from della_dist.specs.checkpoint import CheckpointIndex, TensorEntry
from della_dist.specs.dtypes import itemsize
from della_dist.storage.opening import DEFAULT_CONNECTIONS
from della_dist.storage.samples import SAMPLE_BYTES
from della_dist.storage.store import Store
from della_dist.storage.strided import gather

#: Bytes of a tensor that are compared at once.
_PIECE_BYTES = 1 << 20


class StoredContent:
    """Reads what `della_dist.planning.content.Content` asks for; a few MiB at a time.

    Parameters
    ----------
    store_of
        Returns the store of a checkpoint's location.
    """

    def __init__(self, store_of: Callable[[str], Store]) -> None:
        self._store_of = store_of

    def equal(self, checkpoint: CheckpointIndex, a: TensorEntry, b: TensorEntry) -> bool:
        """Return whether two tensors have the same bytes; reads up to the first difference."""
        size = a.size_bytes
        if size != b.size_bytes:
            return False
        if a.place == b.place:
            return True
        differs = threading.Event()

        def compare(start: int) -> None:
            stop = min(start + _PIECE_BYTES, size)
            if not differs.is_set() and self._read(checkpoint, a, start, stop) != self._read(
                checkpoint, b, start, stop
            ):
                differs.set()

        with ThreadPoolExecutor(DEFAULT_CONNECTIONS) as pool:  # remote reads take round trips
            for _ in pool.map(compare, range(0, size, _PIECE_BYTES)):
                pass
        return not differs.is_set()

    def sample(self, checkpoint: CheckpointIndex, entry: TensorEntry) -> str:
        """Return a digest of the first block of a tensor."""
        stop = min(entry.size_bytes, SAMPLE_BYTES)
        return blake3(self._read(checkpoint, entry, 0, stop)).hexdigest()

    def _read(
        self, checkpoint: CheckpointIndex, entry: TensorEntry, start: int, stop: int
    ) -> bytes:
        store = self._store_of(checkpoint.location)
        name = checkpoint.shards[entry.shard].name

        def read(first: int, last: int) -> bytes:
            return store.read(name, entry.start + first, entry.start + last)

        with refused_as(InputError, f"checkpoint {checkpoint.location}"):
            if entry.strided is None:
                return read(start, stop)
            size = itemsize(entry.dtype)
            return gather(entry.strided, size, start // size, stop // size, read).tobytes()
