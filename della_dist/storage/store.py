"""The storage contract: what a store does, how a key is spelled, how failures read.

A store holds objects (files) under names relative to its root. The names, called keys, have
forward slashes whatever the machine, so that a local directory and a bucket look alike to the
callers. Every implementation passes the suite in `della_dist.testing`.
"""

from __future__ import annotations

import errno
import resource
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from della_dist.errors import InputError, StorageError
from della_dist.specs.checkpoint import ShardFile

if TYPE_CHECKING:
    from della_dist.storage.readahead import ReadAhead

U8Array: TypeAlias = npt.NDArray[np.uint8]
Bytes: TypeAlias = bytes | bytearray | memoryview | U8Array

#: Folder under the root for everything that is not output: records, lock, unfinished files.
STATE_PREFIX = ".della/"
#: Unfinished objects; never listed.
STAGING_PREFIX = ".della/tmp/"
#: Held by the driver that works on an output; never listed.
LOCK_KEY = ".della/lock"

_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})


@dataclass(frozen=True, slots=True)
class ObjectStat:
    """What a store knows of an object without reading it."""

    size_bytes: int
    version: str
    """Version of the bytes: of a file the text of a `FileVersion`, of an object its ETag (or, where
    the store names none, size and time of the last change)."""


class Reader(Protocol):
    """Reads ranges of one object. Safe to use from several threads."""

    @property
    def stat(self) -> ObjectStat:
        """Size and version of the object that is read."""

    def prefetch(self, start: int, stop: int) -> None:
        """Begin to read the bytes from `start` up to `stop`, which a `view` will ask for."""

    def view(self, start: int, stop: int) -> U8Array:
        """Return the bytes from `start` up to `stop`, shape (stop - start,), read-only.

        Raises
        ------
        ValueError
            If the range does not lie in the object, or the reader is closed.
        """

    def release(self, start: int, stop: int) -> None:
        """Let go of the memory of a range that was viewed; the views themselves stay valid."""

    def close(self) -> None:
        """Let go of the object."""

    def __enter__(self) -> Reader:
        """Return this reader."""

    def __exit__(self, *_: object) -> None:
        """Close."""


class Writer(Protocol):
    """Writes one object from beginning to end; it appears under its name at `commit`, or never."""

    def write(self, buffer: Bytes) -> None:
        """Append `buffer`, any contiguous bytes; they may be changed after the call."""

    def commit(self) -> ObjectStat:
        """Make the object durable and visible, all of it at once."""

    def abort(self) -> None:
        """Throw away what was written. Harmless after `commit` and when repeated."""

    def __enter__(self) -> Writer:
        """Return this writer."""

    def __exit__(self, *_: object) -> None:
        """Abort, unless committed."""


class Lease(Protocol):
    """The exclusive right to write an output, held until `release` or the death of the holder."""

    @property
    def token(self) -> str:
        """Names this lease and no other: what `OutputStore.is_held` is asked with."""

    def check(self) -> None:
        """Raise `RunError` if another run has taken the lease over."""

    def release(self) -> None:
        """Let go of it. Harmless when repeated."""

    def __enter__(self) -> Lease:
        """Return this lease."""

    def __exit__(self, *_: object) -> None:
        """Release."""


class Store(Protocol):
    """Objects under one root, to read. Every method raises `StorageError` where that is refused."""

    @property
    def location(self) -> str:
        """The root, as the user wrote it."""

    @property
    def is_remote(self) -> bool:
        """Whether a request takes a round trip, and a version tells the content.

        An ETag does; times and inode of a file do not.
        """

    def describe(self, key: str) -> str:
        """Return where `key` lies, for messages."""

    def stat(self, key: str) -> ObjectStat:
        """Return size and version of `key`."""

    def exists(self, key: str) -> bool:
        """Return whether there is an object `key`."""

    def children(self, folder: str) -> tuple[list[str], list[str]]:
        """Return the keys right in `folder`, sorted: of what is no folder, and of folders."""

    def list(self, prefix: str = "") -> list[str]:
        """Return the keys that begin with `prefix`, sorted, but no unfinished ones and no lock."""

    def read(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
        """Return the bytes of `key` from `start` up to `stop` (its end if None), all of them."""

    def open_reader(
        self, key: str, planned: ObjectStat | None = None, ahead: ReadAhead | None = None
    ) -> Reader:
        """Open `key` for reading; the reader's `stat` tells which version was opened.

        Parameters
        ----------
        key
            The object.
        planned
            The version that is wanted. A remote reader reads that one and no other; of a local
            one, whoever opens it compares.
        ahead
            Holds what a remote store is asked for ahead, for several readers.
        """

    def links(self, keys: Iterable[str]) -> Sequence[str]:
        """Return which of `keys`, and of the folders they lie in, are links."""

    def check(self, key: str) -> None:
        """Raise `InputError` if `key` is there and no file of the checkpoint (a link out of it)."""

    def sample(self, key: str, size_bytes: int) -> str:
        """Return the digest of sampled blocks; empty where the version tells the content."""

    def as_seen_here(self, shard: ShardFile) -> ShardFile:
        """Return a shard that was planned on another machine as it is called on this one.

        Raises
        ------
        InputChangedError
            If its content is another.
        """

    def refuse_changed(self, shard: ShardFile) -> None:
        """Raise `InputChangedError` if a shard is not any more what it was when it was planned."""


class OutputStore(Store, Protocol):
    """Objects under one root that is also written to."""

    @property
    def shards_location(self) -> str:
        """Where workers of other processes write shards: the root, or a folder of this machine's.

        Of the Hub it is a folder, from which the driver alone uploads.
        """

    def put(self, key: str, data: bytes) -> ObjectStat:
        """Write a small object at once, whole or not at all."""

    def create(self, key: str, size_bytes: int | None = None) -> Writer:
        """Begin a new object of `size_bytes` (if known); one that exists is replaced at commit."""

    def settle(self, key: str, committed: ObjectStat, sha256: str) -> None:
        """Take note that a shard is committed and recorded.

        A store that keeps shards elsewhere sends it there; it waits where many are to be sent.

        Parameters
        ----------
        key, committed, sha256
            Of the shard: its name, its size and version, its digest.
        """

    def complete(self, key: str, data: bytes) -> ObjectStat:
        """Write the last object of an output; with it everything else is visible at the latest."""

    def known_sha256(self, key: str) -> str | None:
        """Return the SHA-256 that the store itself answers for; None where bytes must be read."""

    def delete(self, key: str) -> None:
        """Remove `key`, durably; one that is not there is fine."""

    def clear_staging(self, names: Collection[str] = ()) -> None:
        """Remove what attempts that were killed left behind. Only under the lease.

        Parameters
        ----------
        names
            Keys with a ``/`` that this run writes: where unfinished objects have the names of
            finished ones, only the run can tell its own from somebody else's in a subfolder.
        """

    def delete_state(self) -> None:
        """Remove the records and leavings of a run; under the lease, or where none was taken."""

    def has_state(self) -> bool:
        """Return whether a run has left anything but output."""

    def taken(self, keys: Iterable[str]) -> Sequence[str]:
        """Return those of `keys` whose place is taken, by whatever."""

    def remember_root(self) -> Callable[[], None]:
        """Return a function that makes or removes the (empty) root, as it is at this moment."""

    def free_bytes(self) -> int | None:
        """Return the room left, or None where there is no limit to know of."""

    def lock(self, owner_text: str, *, lease: bool = True) -> Lease:
        """Take the exclusive lease of this output.

        Parameters
        ----------
        owner_text
            Who takes it, for those who are refused.
        lease
            False where the store has no conditional writes: then nothing keeps a later run out. A
            local directory has its lock all the same.

        Raises
        ------
        OutputError
            If another run holds it: names the holder and since when; or if the store has none.
        """

    def is_held(self, token: str) -> bool:
        """Return whether the lease with this token is the one in force: asked before a commit."""


def check_key(key: str) -> str:
    """Return `key` if it is one: relative, forward slashes, no empty, ``.`` or ``..`` parts.

    Raises
    ------
    ValueError
        If it is not. Names that come from a file are checked by their reader before this.
    """
    if "\0" in key or any(part in ("", ".", "..") for part in key.split("/")):
        raise ValueError(f"{key!r} is no key: a relative name with '/' and without '..'")
    return key


def folder_for_a_file(where: str) -> InputError:
    """Return the error for a directory that is called what only a file should be."""
    return InputError(
        f"{where} is a directory, where a file of that name is expected. Remove or rename it, or "
        "download the checkpoint again."
    )


def as_bytes(buffer: Bytes) -> memoryview:
    """Return the contiguous bytes of `buffer` without copying them."""
    # numpy's stubs for 3.10 do not say that arrays are buffers.
    view = memoryview(cast(bytes, buffer))
    return view.cast("B") if view.nbytes else memoryview(b"")  # no cast of what is empty


def storage_error(error: OSError, doing: str, *, needed_bytes: int | None = None) -> StorageError:
    """Return the `StorageError` for a failed system call.

    Parameters
    ----------
    error : OSError
        What the system said.
    doing : str
        What failed, with the path: ``"writing /out/model.safetensors"``.
    needed_bytes : int, optional
        Size of the file, named where there was no room for it.
    """
    reason = error.strerror or str(error)
    if error.errno in _NO_SPACE:
        size = "" if needed_bytes is None else f" (the file needs {needed_bytes:,} bytes)"
        advice = "Make room there, or raise the quota, and run the same command again: it continues"
    elif error.errno == errno.EMFILE:
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        size = f" (this process may have {limit} open at once)"
        advice = "Raise that limit (ulimit -n), or take fewer --workers, then run the command again"
    elif error.errno == errno.ENOMEM:
        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        unlimited = limit == resource.RLIM_INFINITY
        size = "" if unlimited else f" (this process may have {limit >> 20} MiB of address space)"
        advice = "Raise that limit (ulimit -v), or take fewer --workers, then run the command again"
    elif error.errno == errno.EIO:
        size = ""
        advice = "The device reports an I/O error: check it (dmesg), then run the command again"
    else:
        size = ""
        advice = "Check the path, its permissions and the disk, then run the command again"
    return StorageError(f"{doing} failed: {reason}{size}. {advice}.")
