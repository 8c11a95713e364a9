"""The store over any file system that fsspec knows: ``gs://``, ``az://``, ``hf://``, ``memory://``.

`della_dist.storage.s3` does for S3 what fsspec's general interface cannot: conditional requests
and uploads of several parts at once.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from della_dist.errors import InputError, StorageError
from della_dist.storage.lease import RemoteLease, acquire, holder_of
from della_dist.storage.libc import free_large_buffers_at_once
from della_dist.storage.readahead import ReadAhead, RemoteReader
from della_dist.storage.remote_writer import RemoteWriter
from della_dist.storage.retry import failing, retry
from della_dist.storage.store import (
    LOCK_KEY,
    STAGING_PREFIX,
    STATE_PREFIX,
    ObjectStat,
    Writer,
    check_key,
)

#: Bytes of one request. Larger ones gain nothing, smaller ones pay the latency more often.
REQUEST_BYTES = 8 << 20
#: What tells versions apart, best first; each file system calls it by another name.
_VERSIONS = (
    *("ETag", "etag", "generation", "version_id", "blob_id", "md5Hash", "content_md5"),
    *("mtime", "LastModified", "last_modified", "created"),
)


class RemoteStore:
    """Objects under one URL.

    Parameters
    ----------
    location
        The URL, for messages.
    filesystem
        An fsspec file system that keeps no listings.
    root
        The path of the URL in it.
    connections
        Requests at once.
    """

    def __init__(
        self,
        location: str,
        filesystem: Any,  # noqa: ANN401
        root: str,
        connections: int,
    ) -> None:
        self.location = location.rstrip("/")
        self.connections = connections
        self._fs = filesystem
        self._root = root.rstrip("/")
        self._pool: ThreadPoolExecutor | None = None
        self._pool_lock = threading.Lock()
        free_large_buffers_at_once()  # what is read ahead and uploaded is made of them

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

    def _path(self, key: str) -> str:
        return f"{self._root}/{check_key(key)}"

    def stat(self, key: str) -> ObjectStat:
        """Return size and version of `key`."""
        path = self._path(key)
        info = retry(lambda: self._fs.info(path), f"looking up {self.describe(key)}")
        if info["type"] != "file":
            raise StorageError(f"{self.describe(key)} is not an object but a folder.")
        return _stat_of(info)

    def exists(self, key: str) -> bool:
        """Return whether there is an object `key`."""
        path = self._path(key)

        def look() -> bool:
            try:
                return bool(self._fs.info(path)["type"] == "file")
            except FileNotFoundError:
                return False

        return retry(look, f"looking up {self.describe(key)}")

    def top_level(self) -> list[str]:
        """Return the keys without a ``/``, sorted."""
        entries = self._entries(lambda: self._fs.ls(self._root, detail=True))
        return sorted(
            key
            for entry in entries
            if entry["type"] == "file" and (key := self._key(entry["name"])) and "/" not in key
        )

    def list(self, prefix: str = "") -> list[str]:
        """Return the keys that begin with `prefix`, sorted, but no unfinished ones and no lock."""
        keys = self._keys(prefix)
        return [key for key in keys if key != LOCK_KEY and not key.startswith(STAGING_PREFIX)]

    def _keys(self, prefix: str) -> Sequence[str]:
        folder = prefix.rpartition("/")[0]
        path = f"{self._root}/{folder}" if folder else self._root
        entries = self._entries(lambda: self._fs.find(path))
        keys = (self._key(name) for name in entries)
        # Consoles mark an empty folder by an object of its name.
        return sorted(key for key in keys if key and key.startswith(prefix))

    def _entries(self, look: Callable[[], Iterable[Any]]) -> tuple[Any, ...]:
        def attempt() -> tuple[Any, ...]:
            try:
                return tuple(look())
            except FileNotFoundError:  # a prefix without objects
                return ()

        return retry(attempt, f"listing {self.location}")

    def _key(self, path: str) -> str:
        return path.rstrip("/").removeprefix(self._root).lstrip("/")

    def read(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
        """Return the bytes of `key` from `start` up to `stop` (its end if None), all of them."""
        where = self.describe(key)
        if stop is None:
            path = self._path(key)
            return retry(lambda: self._cat(path, start), f"reading {where}")
        data = bytearray(stop - start)
        if data:
            self.fetch(key, start, None, memoryview(data))
        return bytes(data)

    def _cat(self, path: str, start: int) -> bytes:
        data = bytes(self._fs.cat_file(path, start=start or None))
        check_length(data, start, int(self._fs.info(path)["size"]))
        return data

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
        InputError
            If the object is not of `version` any more.
        StorageError
            If it cannot be read.
        """

        def attempt() -> None:
            if stopped():
                raise StorageError(f"reading {self.describe(key)} was stopped.")
            self._fetch(key, start, version, into)

        retry(attempt, f"reading {self.describe(key)}")

    def _fetch(self, key: str, start: int, version: str | None, into: memoryview) -> None:
        path = self._path(key)
        if version is not None and _stat_of(self._fs.info(path)).version != version:
            raise self._changed(key)
        data = self._fs.cat_file(path, start=start, end=start + len(into))
        if len(data) != len(into):
            self._refuse_beyond(key, start + len(into), int(self._fs.info(path)["size"]))
            raise OSError(f"{len(data)} of {len(into)} bytes from {start} on came")
        into[:] = data

    def _refuse_beyond(self, key: str, stop: int, size_bytes: int) -> None:
        if stop > size_bytes:
            raise StorageError(
                f"reading up to byte {stop} of {self.describe(key)} failed: it has {size_bytes} "
                "bytes. The object is cut short or changed during the run; check it and run again."
            )

    def _changed(self, key: str, how: str = "changed") -> InputError:
        return InputError(
            f"{self.describe(key)} was {how} while the merge was running, so that its parts do "
            "not belong together. Put the old object back and run the same command again, or "
            "merge the new one with --restart."
        )

    def open_reader(
        self, key: str, stat: ObjectStat | None = None, ahead: ReadAhead | None = None
    ) -> RemoteReader:
        """Open `key` for reading.

        Parameters
        ----------
        key
            The object.
        stat
            Its version that is read, and none else; the newest if None.
        ahead
            What holds the bytes, shared with other readers; the reader's own if None.
        """
        known = self.stat(key) if stat is None else stat
        held_by = ReadAhead(REQUEST_BYTES) if ahead is None else ahead

        def submit(start: int, into: memoryview) -> Future[None]:
            return self.pool.submit(self.fetch, key, start, known.version, into, held_by.is_closed)

        return RemoteReader(known, submit, held_by)

    def put(self, key: str, data: bytes) -> ObjectStat:
        """Write a small object at once, whole or not at all."""
        path = self._path(key)
        retry(lambda: self._fs.pipe_file(path, data), f"writing {self.describe(key)}")
        return self.stat(key)

    def put_new(self, key: str, data: bytes) -> bool:
        """Write `key` unless it exists; return whether it did not."""
        path = self._path(key)

        def create() -> bool:
            try:
                self._fs.pipe_file(path, data, mode="create")
            except FileExistsError:
                return False
            return True

        return retry(create, f"writing {self.describe(key)}")

    def put_over(self, key: str, data: bytes, version: str) -> bool:
        """Replace the `version` of `key`; return whether that was there.

        Not atomic here: the loser of a race finds out when it looks again.
        """
        if not self.exists(key) or self.stat(key).version != version:
            return False
        self.put(key, data)
        return True

    def create(self, key: str, size_bytes: int | None = None) -> Writer:
        """Begin a new object; one that exists is replaced at ``commit``."""
        # What a file of fsspec shows before it is closed, and whether it can be thrown away,
        # differs between file systems. A copy within the store appears whole in all of them.
        staged = f"{STAGING_PREFIX}{secrets.token_hex(8)}"
        doing = f"writing {self.describe(key)}"
        with failing(doing):
            file = self._fs.open(self._path(staged), "wb", block_size=REQUEST_BYTES)

        def publish() -> ObjectStat:
            source, target = self._path(staged), self._path(key)
            retry(lambda: self._fs.cp_file(source, target), doing)
            self.delete(staged)
            return self.stat(key)

        return RemoteWriter(file, doing, publish, lambda: self.delete(staged), size_bytes)

    def delete(self, key: str) -> None:
        """Remove `key`; one that is not there is fine."""
        path = self._path(key)

        def remove() -> None:
            try:
                self._fs.rm_file(path)
            except FileNotFoundError:
                return

        retry(remove, f"deleting {self.describe(key)}")

    def clear_staging(self) -> None:
        """Remove what attempts that were killed left behind."""
        for key in self._keys(STAGING_PREFIX):
            self.delete(key)

    def delete_state(self) -> None:
        """Remove the records of a run; the lease goes when it is released."""
        for key in self._keys(STATE_PREFIX):
            if key != LOCK_KEY:
                self.delete(key)

    def has_state(self) -> bool:
        """Return whether a run has left records or a lease."""
        return bool(self._keys(STATE_PREFIX))

    def holds_only_state(self) -> bool:
        """Return whether nothing but what a run may have left is here."""
        return all(key.startswith(STATE_PREFIX) for key in self._keys(""))

    def remember_root(self) -> Callable[[], None]:
        """Return a function that does nothing: a prefix is there when an object is."""
        return lambda: None

    def free_bytes(self) -> int | None:
        """Return None: object stores have room."""
        return None

    def lock(self, owner_text: str) -> RemoteLease:
        """Take the lease of this output; see `della_dist.storage.lease`."""
        return acquire(self, owner_text, secrets.token_hex(16))

    def is_held(self, token: str) -> bool:
        """Return whether the lease with this token is the one in force."""
        return holder_of(self) == token

    def age_s(self, key: str) -> float | None:
        """Return how long ago at least `key` was written by the store's clock; None if unknown."""
        return None


def check_length(data: bytes, start: int, size_bytes: int) -> None:
    """Refuse an answer that was cut short, whatever length it stated itself."""
    if len(data) != max(0, size_bytes - start):
        raise OSError(f"{len(data)} of {size_bytes} bytes from {start} on came")


def _stat_of(info: Mapping[str, Any]) -> ObjectStat:
    version = next((str(info[name]).strip('"') for name in _VERSIONS if info.get(name)), "")
    return ObjectStat(int(info["size"]), version)
