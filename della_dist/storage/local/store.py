"""The store over a local directory (or a mounted file system)."""

from __future__ import annotations

import contextlib
import os
import stat as stat_flags
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from pathlib import Path

from della_dist.errors import StorageError
from della_dist.locations import absolute_path
from della_dist.storage.local.beneath import (
    links_among,
    opened_folder,
    remove_file,
    remove_tree,
    sync_folder,
    taken_among,
)
from della_dist.storage.local.lock import LocalLock, acquire_local, read_lock
from della_dist.storage.local.mapped import MappedReader, stat_of
from della_dist.storage.local.staged import STAGING, StagedWriter
from della_dist.storage.samples import sample_digest
from della_dist.storage.store import (
    LOCK_KEY,
    STAGING_PREFIX,
    STATE_PREFIX,
    ObjectStat,
    check_key,
    storage_error,
)


class LocalStore:
    """Objects are regular files under `root`; keys are their names relative to it.

    The root need not exist; whatever writes creates it. Every method raises `StorageError` where
    the system refuses, with the path and what to do.

    Parameters
    ----------
    root : str or Path
        The directory.
    """

    __slots__ = ("root",)

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    @property
    def location(self) -> str:
        """The directory."""
        return str(self.root)

    def path(self, key: str) -> Path:
        """Return where `key` lies."""
        return self.root / check_key(key)

    def describe(self, key: str) -> str:
        """Return where `key` lies, for messages."""
        return str(self.path(key))

    def stat(self, key: str) -> ObjectStat:
        """Return size and version of `key`, which must be a regular file (or a link to one)."""
        path = self.path(key)
        try:
            result = path.stat()
        except OSError as error:
            raise storage_error(error, f"looking up {path}") from error
        if not stat_flags.S_ISREG(result.st_mode):
            raise StorageError(f"{path} is not a regular file. Remove it or choose another path.")
        return stat_of(result)

    def exists(self, key: str) -> bool:
        """Return whether `key` is a regular file (or a link to one)."""
        path = self.path(key)
        try:
            return path.is_file()
        except OSError as error:  # no right to look, or a name that is too long
            raise storage_error(error, f"looking up {path}") from error

    def top_level(self) -> list[str]:
        """Return the names of everything in the root but directories, sorted."""
        return self.children("")[0]

    def children(self, folder: str) -> tuple[list[str], list[str]]:
        """Return the keys right in `folder`, sorted: of what is no directory, and of directories.

        A link to a directory counts as one.
        """
        directory = self.path(folder) if folder else self.root
        files: list[str] = []
        folders: list[str] = []
        try:
            with os.scandir(directory) as entries:
                for entry in entries:
                    key = f"{folder}/{entry.name}" if folder else entry.name
                    (folders if _is_directory(entry) else files).append(key)
        except FileNotFoundError:
            return [], []
        except OSError as error:
            raise storage_error(error, f"listing {directory}") from error
        return sorted(files), sorted(folders)

    def list(self, prefix: str = "") -> list[str]:
        """Return the keys that begin with `prefix`, sorted; unfinished files and the lock are not.

        Links to files count as files; links to directories are not followed.
        """
        folder = prefix.rpartition("/")[0]
        keys: list[str] = []
        pending = [folder]
        while pending:
            folder = pending.pop()
            directory = self.root / folder if folder else self.root
            try:
                with os.scandir(directory) as entries:
                    for entry in entries:
                        key = f"{folder}/{entry.name}" if folder else entry.name
                        if entry.is_dir(follow_symlinks=False):
                            if (key + "/").startswith(prefix) and key + "/" != STAGING_PREFIX:
                                pending.append(key)
                        elif key.startswith(prefix) and key != LOCK_KEY and entry.is_file():
                            keys.append(key)
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                raise storage_error(error, f"listing {directory}") from error
        return sorted(keys)

    def read(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
        """Return the bytes of `key` from `start` up to `stop` (its end if None), all of them.

        Raises
        ------
        StorageError
            Also if the file ends before `stop`.
        """
        size_bytes = self.stat(key).size_bytes  # before open: opening a FIFO would hang
        end = size_bytes if stop is None else stop
        path = self.path(key)
        if not 0 <= start <= end <= size_bytes:
            raise StorageError(
                f"reading bytes {start} to {end} of {path} failed: it has {size_bytes} bytes. "
                "The file is cut short or changed during the run; check it and run again."
            )
        try:
            with path.open("rb", buffering=0) as file:
                return _pread(file.fileno(), path, start, end)
        except StorageError:
            raise
        except OSError as error:
            raise storage_error(error, f"reading {path}") from error

    def open_reader(self, key: str) -> MappedReader:
        """Map `key` for zero-copy reading; its `stat` tells which version was opened."""
        self.stat(key)  # before open: opening a FIFO would hang
        path = self.path(key)
        try:
            with path.open("rb", buffering=0) as file:
                stat = stat_of(os.fstat(file.fileno()))
                return MappedReader(file.fileno(), stat, str(path))
        except OSError as error:
            raise storage_error(error, f"opening {path}") from error

    def stat_anew(self, key: str) -> ObjectStat | None:
        """Return size and version of `key` as they are now, None if it is gone.

        A network file system may answer `stat` by what it knew a minute ago, but it asks its
        server when a file is opened.
        """
        path = self.path(key)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a FIFO would hang
            try:
                return stat_of(os.fstat(descriptor))
            finally:
                os.close(descriptor)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise storage_error(error, f"opening {path}") from error

    def sample(self, key: str, size_bytes: int) -> str:
        """Return the digest of sampled blocks of `key`, which has `size_bytes`.

        Raises
        ------
        StorageError
            Also if it is shorter.
        """
        path = self.path(key)
        try:
            with path.open("rb", buffering=0) as file:
                return sample_digest(partial(_pread, file.fileno(), path), size_bytes)
        except StorageError:
            raise
        except OSError as error:
            raise storage_error(error, f"reading {path}") from error

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

    def links(self, keys: Iterable[str]) -> Sequence[str]:
        """Return the keys, or the folders below the root they lie in, that are links."""
        try:
            return links_among(self.root, map(check_key, keys))
        except OSError as error:
            raise storage_error(error, f"looking for links in {self.root}") from error

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
        path = absolute_path(self.root)
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


def _pread(descriptor: int, path: Path, start: int, stop: int) -> bytes:
    """Return the bytes of an open file from `start` up to `stop`, all of them."""
    parts = []
    while start < stop and (part := os.pread(descriptor, stop - start, start)):
        parts.append(part)  # a read may return less than asked for
        start += len(part)
    if start < stop:
        raise StorageError(f"{path} shrank while it was read; check it and run again.")
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _is_directory(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself: whoever opens it says so
        return False
