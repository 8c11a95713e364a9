"""What all remote stores have in common that are read: pinned reads ahead, repeated requests."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from della_dist.errors import InputChangedError, InputError, StorageError
from della_dist.specs.checkpoint import ShardFile
from della_dist.storage.readahead import ReadAhead, RemoteReader
from della_dist.storage.remote.retry import retry
from della_dist.storage.store import LOCK_KEY, STAGING_PREFIX, ObjectStat, Reader

#: Bytes of one request. Larger ones gain nothing, smaller ones pay the latency more often.
REQUEST_BYTES = 8 << 20


class RemoteFiles(ABC):
    """Objects under one URL, to read; see `della_dist.storage.store.Store`.

    Parameters
    ----------
    location
        The URL, for messages.
    connections
        Requests at once.
    """

    is_remote = True

    def __init__(self, location: str, connections: int) -> None:
        self.location = location.rstrip("/")
        self.connections = connections
        self._pool: ThreadPoolExecutor | None = None
        self._pool_lock = threading.Lock()

    @property
    def pool(self) -> ThreadPoolExecutor:
        """The threads that make requests."""
        with self._pool_lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self.connections, thread_name_prefix="request")
            return self._pool

    def describe(self, key: str) -> str:
        """Return the URL of `key`."""
        return f"{self.location}/{key}"

    @abstractmethod
    def stat(self, key: str) -> ObjectStat:
        """Return size and version of `key`."""

    @abstractmethod
    def exists(self, key: str) -> bool:
        """Return whether there is an object `key`."""

    @abstractmethod
    def children(self, folder: str) -> tuple[list[str], list[str]]:
        """Return the keys right in `folder`, sorted: of objects, and of folders."""

    @abstractmethod
    def _keys(self, prefix: str) -> Sequence[str]:
        """Return all keys that begin with `prefix`, sorted."""

    @abstractmethod
    def _read_whole(self, key: str) -> bytes:
        """Return all bytes of `key`, in one attempt."""

    @abstractmethod
    def _fetch(self, key: str, start: int, version: str | None, into: memoryview) -> None:
        """Fill `into` with the bytes of `key` from `start` on, in one attempt."""

    def list(self, prefix: str = "") -> list[str]:
        """Return the keys that begin with `prefix`, sorted, but no unfinished ones and no lock."""
        keys = self._keys(prefix)
        return [key for key in keys if key != LOCK_KEY and not key.startswith(STAGING_PREFIX)]

    def read(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
        """Return the bytes of `key` from `start` up to `stop` (its end if None), all of them."""
        if (start, stop) == (0, None):
            return retry(lambda: self._read_whole(key), f"reading {self.describe(key)}")
        data = bytearray((self.stat(key).size_bytes if stop is None else stop) - start)
        if data:
            self.fetch(key, start, None, memoryview(data))
        return bytes(data)

    def fetch(
        self,
        key: str,
        start: int,
        version: str | None,
        into: memoryview,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        """Fill `into` with the bytes of `key` from `start` on, in one request.

        Parameters
        ----------
        key, start, version
            Where the bytes are; of any version if that is None.
        into
            Where they go.
        stopped
            Whether nobody wants them any more: then the request is not made (again).

        Raises
        ------
        InputChangedError
            If the object is not of `version` any more.
        StorageError
            If it cannot be read.
        """

        def attempt() -> None:
            if stopped():
                raise StorageError(f"reading {self.describe(key)} was stopped.")
            self._fetch(key, start, version, into)

        retry(attempt, f"reading {self.describe(key)}")

    def _too_short(self, key: str, stop: int, size_bytes: int) -> StorageError:
        return StorageError(
            f"reading up to byte {stop} of {self.describe(key)} failed: it has {size_bytes} "
            "bytes. The object is cut short or changed during the run; check it and run again."
        )

    def _no_ranges(self, key: str) -> InputError:
        return InputError(
            f"reading a part of {self.describe(key)} failed: the store does not serve ranges (it "
            "answered another part than was asked for, or the whole object), and a merge reads "
            "checkpoints in parts. Copy it to a store that does, or to a disk."
        )

    def _changed(self, key: str, how: str = "changed") -> InputChangedError:
        return InputChangedError(
            f"{self.describe(key)} was {how} while the merge was running, so that its parts do "
            "not belong together. Put the old object back and run the same command again, or "
            "merge the new one with --restart."
        )

    def open_reader(
        self, key: str, planned: ObjectStat | None = None, ahead: ReadAhead | None = None
    ) -> Reader:
        """Open `key` for reading; see `Store.open_reader`."""
        known = self.stat(key) if planned is None else planned
        held_by = ReadAhead(REQUEST_BYTES) if ahead is None else ahead

        def submit(start: int, into: memoryview) -> Future[None]:
            return self.pool.submit(self.fetch, key, start, known.version, into, held_by.is_closed)

        return RemoteReader(known, submit, held_by)

    def links(self, keys: Iterable[str]) -> Sequence[str]:
        """Return nothing: object stores have no links."""
        return ()

    def check(self, key: str) -> None:  # noqa: B027
        """Do nothing: objects are no links and no directories."""

    def sample(self, key: str, size_bytes: int) -> str:
        """Return nothing: the version tells the content."""
        return ""

    def as_seen_here(self, shard: ShardFile) -> ShardFile:
        """Return the shard: its version is the same everywhere."""
        return shard

    def refuse_changed(self, shard: ShardFile) -> None:  # noqa: B027
        """Do nothing: each request names the version that is wanted."""


def check_length(data: bytes, size_bytes: int) -> None:
    """Refuse an answer that was cut short, whatever length it stated itself."""
    if len(data) != size_bytes:
        raise OSError(f"{len(data)} of {size_bytes} bytes came")
