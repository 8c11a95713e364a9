"""Check the bytes of one shard against the manifest."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from blake3 import blake3

from della_dist.storage.manifest import TensorRecord
from della_dist.storage.store import Reader, Store, U8Array

#: Bytes hashed at a time.
STEP_BYTES = 4 << 20
#: Steps that are read ahead of the one that is hashed.
STEPS_AHEAD = 6


def file_sha256(store: Store, name: str) -> str:
    """Return the SHA-256 of a file, read step by step."""
    digest = hashlib.sha256()
    with store.open_reader(name) as reader:
        for _, data in _steps(reader, reader.stat.size_bytes):
            digest.update(data.data)
    return digest.hexdigest()


def check_shard(
    store: Store,
    shard: Mapping[str, Any],
    tensors: Sequence[TensorRecord],
    step_bytes: int = STEP_BYTES,
) -> list[str]:
    """Return what is different about a shard, a line each.

    Parameters
    ----------
    store
        Of the output.
    shard
        Its record in the manifest: ``name``, ``size_bytes``, ``sha256``.
    tensors
        The records of the tensors in it; a damaged tensor is named.
    step_bytes
        How much is hashed at a time.
    """
    name, size = shard["name"], shard["size_bytes"]
    if not store.exists(name):
        return [f"shard {name} is missing"]
    with store.open_reader(name) as reader, ThreadPoolExecutor(1) as pool:
        now = reader.stat.size_bytes
        damaged: list[str] = []
        whole = hashlib.sha256()
        parts = _Parts(tensors)
        for start, data in _steps(reader, now, step_bytes):
            # The digest of the whole goes on beside those of the tensors: each takes a core.
            hashed = pool.submit(whole.update, data.data)
            parts.update(start, data)
            hashed.result()
        if now != size:
            return [f"shard {name} has {now} bytes, not {size}"]
        damaged = [f"tensor {t.name} in shard {name} was changed" for t in parts.changed()]
        # A damaged tensor explains a damaged shard; otherwise it is the header.
        if not damaged and whole.hexdigest() != shard["sha256"]:
            return [f"shard {name} was changed outside its tensors (its header)"]
        return damaged


def _steps(
    reader: Reader, size: int, step_bytes: int = STEP_BYTES
) -> Iterator[tuple[int, U8Array]]:
    """Yield the object step by step, reading ahead."""
    ahead: deque[tuple[int, int]] = deque()
    starts = iter(range(0, size, step_bytes))
    while True:
        while len(ahead) <= STEPS_AHEAD and (start := next(starts, None)) is not None:
            ahead.append((start, min(start + step_bytes, size)))
            reader.prefetch(*ahead[-1])
        if not ahead:
            return
        start, stop = ahead.popleft()
        yield start, reader.view(start, stop)
        reader.release(start, stop)


class _Parts:
    """Digests of the tensors of a shard, whose bytes come in order."""

    def __init__(self, tensors: Sequence[TensorRecord]) -> None:
        self._tensors = sorted(tensors, key=lambda t: (t.start, t.stop))
        self._digests = [blake3() for _ in tensors]
        self._first = 0

    def update(self, start: int, data: U8Array) -> None:
        """Take the bytes of the shard from `start` on."""
        stop = start + data.nbytes
        for i in range(self._first, len(self._tensors)):
            tensor = self._tensors[i]
            if tensor.start >= stop:
                return
            first, last = max(start, tensor.start), min(stop, tensor.stop)
            if first < last:
                self._digests[i].update(data[first - start : last - start].data)
            if tensor.stop <= stop:
                self._first = i + 1

    def changed(self) -> list[TensorRecord]:
        """Return the tensors whose digest is another."""
        pairs = zip(self._tensors, self._digests, strict=True)
        return [tensor for tensor, digest in pairs if digest.hexdigest() != tensor.blake3]
