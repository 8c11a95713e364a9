"""The store over a local directory (or a mounted file system)."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat as stat_flags
from collections.abc import Callable, Collection
from pathlib import Path

from della_dist.errors import StorageError
from della_dist.storage.local_lock import LocalLock, acquire_local
from della_dist.storage.mapped import MappedReader, stat_of
from della_dist.storage.staged import StagedWriter, fsync_directory, make_directories
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
        return self.path(key).is_file()

    def top_level(self) -> list[str]:
        """Return the names of everything in the root but directories, sorted."""
        try:
            with os.scandir(self.root) as entries:
                return sorted(entry.name for entry in entries if not _is_directory(entry))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise storage_error(error, f"listing {self.root}") from error

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
        parts = []
        try:
            with path.open("rb", buffering=0) as file:
                while start < end and (part := os.pread(file.fileno(), end - start, start)):
                    parts.append(part)  # a read may return less than asked for
                    start += len(part)
        except OSError as error:
            raise storage_error(error, f"reading {path}") from error
        if start < end:
            raise StorageError(f"{path} shrank while it was read; check it and run again.")
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def open_reader(self, key: str) -> MappedReader:
        """Map `key` for zero-copy reading; its `stat` tells which version was opened."""
        self.stat(key)  # before open: opening a FIFO would hang
        path = self.path(key)
        try:
            with path.open("rb", buffering=0) as file:
                return MappedReader(file.fileno(), stat_of(os.fstat(file.fileno())))
        except OSError as error:
            raise storage_error(error, f"opening {path}") from error

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
        final = self.path(key)
        staging = self.root / STAGING_PREFIX
        # Every attempt has a name of its own: a worker thought dead may still be writing.
        staged = staging / f"{final.name[:180]}.{os.getpid()}.{secrets.token_hex(4)}"
        try:
            make_directories(staging)
        except OSError as error:
            raise storage_error(error, f"creating {staging}") from error
        return StagedWriter(staged, final, size_bytes)

    def delete(self, key: str) -> None:
        """Remove `key`, durably; one that is not there is fine."""
        path = self.path(key)
        try:
            path.unlink(missing_ok=True)
            if path.parent.is_dir():
                fsync_directory(path.parent)
        except OSError as error:
            raise storage_error(error, f"deleting {path}") from error

    def clear_staging(self, names: Collection[str] = ()) -> None:
        """Remove what attempts that were killed left behind. Only under the lock."""
        staging = self.root / STAGING_PREFIX
        try:
            _remove_tree(staging)
        except OSError as error:
            raise storage_error(error, f"clearing {staging}") from error

    def delete_state(self) -> None:
        """Remove the records of a run, its lock among them, and the root if nothing else is in it.

        Only under the lock, or where no run has begun.
        """
        state = self.root / STATE_PREFIX
        try:
            if state.exists():
                _remove_tree(state)
                fsync_directory(self.root)
            if self.root.is_dir() and not any(self.root.iterdir()):
                with contextlib.suppress(OSError):  # somebody else uses it by now
                    self.root.rmdir()
        except OSError as error:
            raise storage_error(error, f"removing {state}") from error

    def has_state(self) -> bool:
        """Return whether a run has left records or unfinished files."""
        return (self.root / STATE_PREFIX).is_dir()

    def holds_only_state(self) -> bool:
        """Return whether nothing but what a run may have left is here."""
        try:
            return {path.name for path in self.root.iterdir()} <= {STATE_PREFIX.rstrip("/")}
        except FileNotFoundError:
            return True
        except OSError as error:
            raise storage_error(error, f"listing {self.root}") from error

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
        path = self.root.absolute()
        while not path.exists():
            path = path.parent
        try:
            result = os.statvfs(path)
        except OSError as error:
            raise storage_error(error, f"asking for the free space of {path}") from error
        return result.f_bavail * result.f_frsize

    def lock(self, owner_text: str, *, lease: bool = True) -> LocalLock:
        """Take the exclusive lock of this output; see `della_dist.storage.local_lock`."""
        return acquire_local(self.root, owner_text)

    def is_held(self, token: str) -> bool:
        """Return whether `token` is that of the newest lock: a later run has written its own."""
        try:
            return self.path(LOCK_KEY).read_text().splitlines()[1:] == [token]
        except FileNotFoundError:
            return False
        except OSError as error:
            raise storage_error(error, f"reading {self.path(LOCK_KEY)}") from error


def _remove_tree(path: Path) -> None:
    """Remove a directory, while workers believed dead may still come and go in it."""
    try:
        shutil.rmtree(path)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTEMPTY):
            raise
        if path.exists():
            _remove_tree(path)


def _is_directory(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself: whoever opens it says so
        return False
