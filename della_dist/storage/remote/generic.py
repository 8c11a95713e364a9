"""The store over any file system that fsspec knows: ``gs://``, ``az://``, ``hf://``, ``memory://``.

`della_dist.storage.remote.s3` does for S3 what fsspec's general interface cannot: conditional
requests and uploads of several parts at once.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from della_dist.errors import MissingObjectError, StorageError, UnsupportedError
from della_dist.storage.remote.files import REQUEST_BYTES, check_length
from della_dist.storage.remote.retry import failing, retry
from della_dist.storage.remote.store import RemoteStore
from della_dist.storage.remote.writer import RemoteWriter
from della_dist.storage.store import STAGING_PREFIX, ObjectStat, Writer, check_key

#: What tells versions apart, best first; each file system calls it by another name.
_VERSIONS = (
    *("ETag", "etag", "generation", "version_id", "blob_id", "md5Hash", "content_md5"),
    *("mtime", "LastModified", "last_modified", "created"),
)


class GenericStore(RemoteStore):
    """Objects under one URL; see `RemoteStore`.

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
        super().__init__(location, root, connections)
        self._fs = filesystem

    def _path(self, key: str) -> str:
        return f"{self._root}/{check_key(key)}"

    def stat(self, key: str) -> ObjectStat:
        """Return size and version of `key`."""
        info = self._look_up(key)
        if info["type"] != "file":
            raise StorageError(f"{self.describe(key)} is not an object but a folder.")
        return _stat_of(info)

    def exists(self, key: str) -> bool:
        """Return whether there is an object `key`."""
        try:
            return bool(self._look_up(key)["type"] == "file")
        except MissingObjectError:
            return False

    def _look_up(self, key: str) -> Mapping[str, Any]:
        path = self._path(key)
        info: Mapping[str, Any] = retry(
            lambda: self._fs.info(path), f"looking up {self.describe(key)}"
        )
        return info

    def children(self, folder: str) -> tuple[list[str], list[str]]:
        """Return the keys right in `folder`, sorted: of objects, and of folders."""
        path = self._path(folder) if folder else self._root
        entries = self._entries(lambda: self._fs.ls(path, detail=True))
        files: list[str] = []
        folders: list[str] = []
        for entry in entries:
            key = self._key(entry["name"])
            if key.rpartition("/")[0] == folder and key != folder:
                (files if entry["type"] == "file" else folders).append(key)
        return sorted(files), sorted(folders)

    def _keys(self, prefix: str) -> Sequence[str]:
        folder = prefix.rpartition("/")[0]
        path = f"{self._root}/{folder}" if folder else self._root
        entries = self._entries(lambda: self._fs.find(path))
        keys = (self._key(name) for name in entries)
        # Consoles mark an empty folder by an object of its name.
        return sorted(key for key in keys if key and key.startswith(prefix))

    def _entries(self, look: Callable[[], Iterable[Any]]) -> tuple[Any, ...]:
        try:
            return retry(lambda: tuple(look()), f"listing {self.location}")
        except MissingObjectError:  # a prefix without objects
            return ()

    def _key(self, path: str) -> str:
        return path.rstrip("/").removeprefix(self._root).lstrip("/")

    def _read_whole(self, key: str) -> bytes:
        path = self._path(key)
        data = bytes(self._fs.cat_file(path))
        check_length(data, int(self._fs.info(path)["size"]))
        return data

    def _fetch(self, key: str, start: int, version: str | None, into: memoryview) -> None:
        path = self._path(key)
        if version is not None and _stat_of(self._fs.info(path)).version != version:
            raise self._changed(key)
        data = self._fs.cat_file(path, start=start, end=start + len(into))
        if len(data) > len(into):
            raise self._no_ranges(key)
        if len(data) != len(into):
            stop, size_bytes = start + len(into), int(self._fs.info(path)["size"])
            if stop > size_bytes:
                raise self._too_short(key, stop, size_bytes)
            raise OSError(f"{len(data)} of {len(into)} bytes from {start} on came")
        into[:] = data

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
            except (TypeError, ValueError) as error:  # how fsspec says that there is no such mode
                raise UnsupportedError(
                    f"creating {self.describe(key)} only if it is not there failed: {error}"
                ) from error
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
        with contextlib.suppress(MissingObjectError):
            retry(lambda: self._fs.rm_file(path), f"deleting {self.describe(key)}")

    def clear_staging(self, names: Collection[str] = ()) -> None:
        """Remove what attempts that were killed left behind; see `Store`."""
        for key in self._keys(STAGING_PREFIX):
            self.delete(key)


def _stat_of(info: Mapping[str, Any]) -> ObjectStat:
    version = next((str(info[name]).strip('"') for name in _VERSIONS if info.get(name)), "")
    return ObjectStat(int(info["size"]), version)
