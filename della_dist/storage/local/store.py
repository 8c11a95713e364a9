"""The store over a local directory (or a mounted file system)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterable, Sequence

from della_dist.storage.in_place import InPlace
from della_dist.storage.local.beneath import (
    opened_folder,
    remove_file,
    remove_tree,
    sync_folder,
    taken_among,
)
from della_dist.storage.local.files import LocalFiles
from della_dist.storage.local.lock import LocalLock, acquire_local, read_lock
from della_dist.storage.local.staged import STAGING, StagedWriter
from della_dist.storage.store import LOCK_KEY, STATE_PREFIX, ObjectStat, check_key, storage_error


class LocalStore(LocalFiles, InPlace):
    """A local directory that is also written to; whatever writes creates it."""

    __slots__ = ()

    def put(self, key: str, data: bytes) -> ObjectStat:
        """Write a small object at once: after a crash it is there whole, or as it was before."""
        with self.create(key, len(data)) as writer:
            writer.write(data)
            return writer.commit()

    def create(self, key: str, size_bytes: int | None = None) -> StagedWriter:
        """Begin a new object. It is written out of sight and appears at ``commit``.

        Parameters
        ----------
        key : str
            Name of the object; one that exists is replaced at ``commit``.
        size_bytes : int, optional
            Its size if known, reserved at once: a full disk fails here and not hours later.
        """
        return StagedWriter(self.root, check_key(key), size_bytes)

    def delete(self, key: str) -> None:
        """Remove `key`, durably, and the folders that this empties; one that is gone is fine."""
        path = self.path(key)
        try:
            remove_file(self.root, key)
        except OSError as error:
            raise storage_error(error, f"deleting {path}") from error

    def taken(self, keys: Iterable[str]) -> Sequence[str]:
        """Return the keys whose place is taken, by a file, a folder, a link to nothing."""
        try:
            return taken_among(self.root, map(check_key, keys))
        except OSError as error:
            raise storage_error(error, f"looking up files in {self.root}") from error

    def clear_staging(self, names: Collection[str] = ()) -> None:
        """Remove what attempts that were killed left behind. Only under the lock."""
        try:
            remove_tree(self.root, STAGING)
        except OSError as error:
            raise storage_error(error, f"clearing {self.root / STAGING}") from error

    def delete_state(self) -> None:
        """Remove the records of a run, its lock among them, and the root if nothing else is in it.

        Only under the lock, or where no run has begun.
        """
        state = STATE_PREFIX.rstrip("/")
        try:
            remove_tree(self.root, state)
            with contextlib.suppress(FileNotFoundError), opened_folder(self.root) as root:
                sync_folder(root)
            if self.root.is_dir() and not any(self.root.iterdir()):
                with contextlib.suppress(OSError):  # somebody else uses it by now
                    self.root.rmdir()
        except OSError as error:
            raise storage_error(error, f"removing {self.root / state}") from error

    def has_state(self) -> bool:
        """Return whether a run has left records or unfinished files."""
        return (self.root / STATE_PREFIX).is_dir()

    def remember_root(self) -> Callable[[], None]:
        """Return a function that makes or removes the (empty) root, as it is at this moment."""
        missing = [path for path in (self.root, *self.root.parents) if not path.exists()]

        def restore() -> None:
            for path in missing:
                with contextlib.suppress(OSError):  # somebody else uses it by now
                    path.rmdir()
            if not missing:
                self.root.mkdir(exist_ok=True)

        return restore

    def free_bytes(self) -> int:
        """Return the room left for this user on the file system of the root."""
        path = self.root
        while not path.exists():
            path = path.parent
        try:
            result = os.statvfs(path)
        except OSError as error:
            raise storage_error(error, f"asking for the free space of {path}") from error
        return result.f_bavail * result.f_frsize

    def lock(self, owner_text: str, *, lease: bool = True) -> LocalLock:
        """Take the exclusive lock of this output; see `della_dist.storage.local.lock`."""
        return acquire_local(self.root, owner_text)

    def is_held(self, token: str) -> bool:
        """Return whether `token` is that of the newest lock: a later run has written its own."""
        try:
            return read_lock(self.root).splitlines()[1:] == [token]
        except FileNotFoundError:
            return False
        except OSError as error:
            raise storage_error(error, f"reading {self.path(LOCK_KEY)}") from error
