"""The lock of an output in a local directory: the kernel's, on a file that names the holder."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import stat as stat_flags
import time
from pathlib import Path

from della_dist.errors import OutputError
from della_dist.storage.local.beneath import opened_folder, split_key
from della_dist.storage.store import LOCK_KEY

_FOLDER, _NAME = split_key(LOCK_KEY)


class LocalLock:
    """An exclusive lock on an output, held until `release` or the end of the process."""

    __slots__ = ("_descriptor", "_root", "token")

    def __init__(self, root: Path, descriptor: int, token: str) -> None:
        self._root = root
        self._descriptor = descriptor
        self.token = token

    def check(self) -> None:
        """Do nothing: the kernel keeps the lock for as long as the process lives."""

    def release(self) -> None:
        """Let go of the lock, and remove its file. Harmless when repeated."""
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            # Still locked, so that the file is nobody else's; a newcomer that opened it already
            # finds out that it is gone.
            with contextlib.suppress(OSError), opened_folder(self._root, _FOLDER) as folder:
                if _is_at(descriptor, folder):
                    os.unlink(_NAME, dir_fd=folder)
            os.close(descriptor)
            remove_empty_state(self._root)

    def __enter__(self) -> LocalLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def acquire_local(root: Path, owner_text: str) -> LocalLock:
    """Take the exclusive lock of an output; the kernel drops it when the process ends.

    Parameters
    ----------
    root
        The directory of the output.
    owner_text
        Who holds it, for the message that a second run gets: process, host, time.

    Raises
    ------
    OutputError
        If another run holds it (the message shows the holder's text and since when), or the
        output cannot be written to.
    """
    descriptor = -1
    token = secrets.token_hex(16)
    try:
        while True:
            with contextlib.suppress(FileNotFoundError):  # a run that ended took the folder along
                descriptor, is_ours = _try(root)
                if is_ours:
                    break
                os.close(descriptor)  # or the file
                descriptor = -1
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{owner_text}\n{token}\n".encode(), 0)
    except OSError as error:
        if descriptor >= 0:
            LocalLock(root, descriptor, token).release()
        remove_empty_state(root)
        raise OutputError(
            f"{root} cannot be used as output: locking {root / LOCK_KEY} failed: "
            f"{error.strerror}. Choose a directory that you may write to, on a file system with "
            "file locks."
        ) from error
    return LocalLock(root, descriptor, token)


def _try(root: Path) -> tuple[int, bool]:
    """Return the open and locked file, and whether it has the lock's name (still)."""
    with opened_folder(root, _FOLDER, make=True) as folder:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        descriptor = os.open(_NAME, flags, 0o666, dir_fd=folder)
        try:
            _refuse_foreign(root, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise _held(root, descriptor) from None
            return descriptor, _is_at(descriptor, folder)
        except BaseException:
            os.close(descriptor)
            raise


def _refuse_foreign(root: Path, descriptor: int) -> None:
    """Refuse a file that would not be ours to write: a pipe, or one that has another name too."""
    found = os.fstat(descriptor)
    if not stat_flags.S_ISREG(found.st_mode) or found.st_nlink > 1:
        raise OutputError(
            f"{root / LOCK_KEY} is not a file of della-dist's own: it is no regular file, or one "
            "that has another name elsewhere. Remove it, or choose another output."
        )


def read_lock(root: Path) -> str:
    """Return what the lock's file says.

    Raises
    ------
    OSError
        If there is none, or it cannot be read.
    """
    with opened_folder(root, _FOLDER) as folder:
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        descriptor = os.open(_NAME, flags, dir_fd=folder)
    try:
        return os.pread(descriptor, 4096, 0).decode(errors="replace")
    finally:
        os.close(descriptor)


def remove_empty_state(root: Path) -> None:
    """Remove the folder of the lock if nothing else is in it: nothing was begun."""
    with contextlib.suppress(OSError), opened_folder(root) as folder:
        os.rmdir(_FOLDER, dir_fd=folder)


def _is_at(descriptor: int, folder: int) -> bool:
    """Return whether an open file still has the lock's name."""
    try:
        named = os.stat(_NAME, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(descriptor), named)


def _held(root: Path, descriptor: int) -> OutputError:
    """Return the error for an output that another run holds."""
    text = os.pread(descriptor, 4096, 0).decode(errors="replace")
    owner = text.partition("\n")[0].strip() or "owner unknown"
    age_s = max(0, time.time() - os.fstat(descriptor).st_mtime)
    return OutputError(
        f"{root} is being written by another run ({owner}; since {age_s:.0f} s). "
        "Wait for it, stop it, or choose another output."
    )
