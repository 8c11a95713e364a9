"""What every store shares: how a key is spelled, what is known of an object, how failures read.

A store holds objects (files) under names relative to its root. The names, called keys, have
forward slashes whatever the machine, so that a local directory and a bucket look alike to the
callers.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass

from della_dist.errors import StorageError

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
    """Opaque version of the bytes: here the modification time in ns, of an object its ETag."""


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
    elif error.errno == errno.EIO:
        size = ""
        advice = "The device reports an I/O error: check it (dmesg), then run the command again"
    else:
        size = ""
        advice = "Check the path, its permissions and the disk, then run the command again"
    return StorageError(f"{doing} failed: {reason}{size}. {advice}.")
