"""The files of a local directory (or a mounted file system), for reading."""

from __future__ import annotations

import os
import stat as stat_flags
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

from della_dist.errors import InputError, StorageError
from della_dist.locations import absolute_path
from della_dist.specs.checkpoint import ShardFile
from della_dist.storage.local import unchanged
from della_dist.storage.local.beneath import links_among
from della_dist.storage.local.mapped import MappedReader, stat_of
from della_dist.storage.readahead import ReadAhead
from della_dist.storage.samples import sample_digest
from della_dist.storage.store import (
    LOCK_KEY,
    STAGING_PREFIX,
    ObjectStat,
    check_key,
    folder_for_a_file,
    storage_error,
)


class LocalFiles:
    """Regular files under `root`; keys are their names relative to it.

    The root need not exist. Every method raises `StorageError` where the system refuses, with the
    path and what to do.

    Parameters
    ----------
    root : str or Path
        The directory.
    """

    __slots__ = ("location", "root")

    #: A request takes no time; and a version is times and inode, which tell nothing of the content.
    is_remote = False

    def __init__(self, root: str | Path) -> None:
        self.location = str(root)
        #: From the root on: a program may change its working directory while a store is open.
        self.root = absolute_path(Path(root))

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

    def open_reader(
        self, key: str, planned: ObjectStat | None = None, ahead: ReadAhead | None = None
    ) -> MappedReader:
        """Map `key` for zero-copy reading; its `stat` tells which version was opened."""
        self.stat(key)  # before open: opening a FIFO would hang
        path = self.path(key)
        try:
            with path.open("rb", buffering=0) as file:
                stat = stat_of(os.fstat(file.fileno()))
                return MappedReader(file.fileno(), stat, str(path))
        except OSError as error:
            raise storage_error(error, f"opening {path}") from error

    def links(self, keys: Iterable[str]) -> Sequence[str]:
        """Return the keys, or the folders below the root they lie in, that are links."""
        try:
            return links_among(self.root, map(check_key, keys))
        except OSError as error:
            raise storage_error(error, f"looking for links in {self.root}") from error

    def check(self, key: str) -> None:
        """Refuse a key that is there and is no file of this directory.

        The cache of the Hugging Face Hub consists of links from ``models--A--B/snapshots/REV/NAME``
        to ``models--A--B/blobs/HASH``, and older downloads to a directory link into it too: links
        to its blobs are followed. The root may itself be a link.

        Raises
        ------
        InputError
            For a directory, a link to nothing, or one to a file outside of the root.
        StorageError
            For anything else that is no file.
        """
        path = self.path(key)
        if not os.path.lexists(path):
            return
        self._refuse_link_out(path)
        if path.is_dir():
            raise folder_for_a_file(str(path))
        if path.is_symlink() and not path.exists():
            raise InputError(
                f"{path} is a link to {path.readlink()}, which leads to nothing. Download the "
                "checkpoint again, or remove the link."
            )
        self.stat(key)  # of anything else but a file it says what it is

    def _refuse_link_out(self, path: Path) -> None:
        try:
            target = path.resolve()
            root = self.root.resolve()
        except (OSError, RuntimeError):  # a link to itself: opening it says so
            return
        blobs = target.parent
        if target.is_relative_to(root):
            return
        if blobs.name == "blobs" and blobs.parent.name.startswith("models--"):
            return
        raise InputError(
            f"{path} is a link to {target}, outside the checkpoint. Replace the link by the file, "
            "or link the whole directory."
        )

    def _stat_anew(self, key: str) -> ObjectStat | None:
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

    def refuse_changed(self, shard: ShardFile) -> None:
        """Raise `InputChangedError` unless a shard is the very file that it was."""
        unchanged.refuse_changed(
            self.describe(shard.name),
            shard,
            self._stat_anew(shard.name),
            partial(self.sample, shard.name, shard.size_bytes),
        )

    def as_seen_here(self, shard: ShardFile) -> ShardFile:
        """Return a shard that was planned on another machine with the version it has on this one.

        Raises
        ------
        InputChangedError
            If it has not the content that it was planned with, or was written to since.
        """
        return unchanged.as_seen_here(
            self.describe(shard.name),
            shard,
            self.stat(shard.name),
            partial(self.sample, shard.name, shard.size_bytes),
        )


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
