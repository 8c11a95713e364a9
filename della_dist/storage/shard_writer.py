"""Output shards: safetensors files written from beginning to end, and hashed on the way."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from blake3 import blake3

from della_dist.specs.checkpoint import TensorEntry
from della_dist.storage.header import build_header
from della_dist.storage.samples import SampleHasher
from della_dist.storage.store import Bytes, OutputStore, Writer, as_bytes


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """One committed shard: what the manifest says of it."""

    name: str
    size_bytes: int
    sha256: str
    """Of the whole file."""
    tensors: Mapping[str, str]
    """BLAKE3 of each tensor's bytes, in file order."""
    sample: str
    """Digest of a few blocks of the file (`della_dist.storage.samples`)."""
    version: str
    """Of the object that was committed (`ObjectStat.version`)."""


class ShardWriter:
    """Writes one shard: `begin`, then the data of every tensor in the order of `tensors`, `finish`.

    Memory: the header; data is passed on as it comes. Use from one thread at a time.

    Parameters
    ----------
    store : OutputStore
        Where to.
    key : str
        Name of the shard.
    entries : sequence of (name, dtype, shape)
        All its tensors, in any order.
    metadata : mapping of str to str
        For the header.
    """

    __slots__ = (
        "_digests",
        "_file_hash",
        "_header",
        "_key",
        "_sample",
        "_store",
        "_tensor_hash",
        "_writer",
        "num_written",
        "size_bytes",
        "tensors",
    )

    def __init__(
        self,
        store: OutputStore,
        key: str,
        entries: Sequence[tuple[str, str, tuple[int, ...]]],
        metadata: Mapping[str, str],
    ) -> None:
        self._store = store
        self._key = key
        self._header, self.tensors = build_header(entries, metadata)
        self.size_bytes = self.tensors[-1].stop if self.tensors else len(self._header)
        self.num_written = 0
        self._digests: dict[str, str] = {}
        self._file_hash = hashlib.sha256()
        self._tensor_hash = blake3()
        self._sample = SampleHasher(self.size_bytes)
        self._writer: Writer | None = None

    def begin(self) -> tuple[TensorEntry, ...]:
        """Reserve the file, write its header and return the tensors in the order to write them.

        Raises
        ------
        StorageError
            If there is no room for the whole shard, or it cannot be created.
        """
        self._writer = self._store.create(self._key, self.size_bytes)
        self._writer.write(self._header)
        self._file_hash.update(self._header)
        self._sample.update(self._header)
        self.num_written = len(self._header)
        self._end_tensors()
        return self.tensors

    def write(self, buffer: Bytes) -> None:
        """Append `buffer`: the next bytes of the current tensor, or of several.

        Raises
        ------
        StorageError
            If the disk is full or fails. The caller aborts.
        AssertionError
            If the shard has no room for that many bytes.
        """
        if self._writer is None:
            raise AssertionError("write before begin, or after finish")
        data = as_bytes(buffer)
        if self.num_written + data.nbytes > self.size_bytes:
            raise AssertionError(f"{self._key}: more than {self.size_bytes} bytes")
        self._writer.write(data)
        self._file_hash.update(data)
        self._sample.update(data)
        self._hash_tensors(data)

    def finish(self) -> ShardRecord:
        """Commit the shard and return its record.

        Raises
        ------
        StorageError
            If the shard could not be made durable.
        AssertionError
            If tensors are missing.
        """
        if self._writer is None or self.num_written != self.size_bytes:
            raise AssertionError(f"{self._key}: {self.num_written} of {self.size_bytes} bytes")
        stat = self._writer.commit()
        self.abort()
        return ShardRecord(
            name=self._key,
            size_bytes=self.size_bytes,
            sha256=self._file_hash.hexdigest(),
            tensors=self._digests,
            sample=self._sample.hexdigest(),
            version=stat.version,
        )

    def abort(self) -> None:
        """Throw away what was written. Harmless after `finish` and when repeated."""
        if self._writer is not None:
            self._writer.abort()
            self._writer = None

    def _hash_tensors(self, data: memoryview) -> None:
        """Hash `data` into the digests of the tensors it belongs to, and count it as written."""
        while data.nbytes:
            tensor = self.tensors[len(self._digests)]
            part = data[: tensor.stop - self.num_written]
            self._tensor_hash.update(part)
            self.num_written += part.nbytes
            data = data[part.nbytes :]
            self._end_tensors()

    def _end_tensors(self) -> None:
        """Close every tensor that ends where we are: the current one, and empty ones after it."""
        while (
            len(self._digests) < len(self.tensors)
            and self.tensors[len(self._digests)].stop == self.num_written
        ):
            self._digests[self.tensors[len(self._digests)].name] = self._tensor_hash.hexdigest()
            self._tensor_hash = blake3()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()
