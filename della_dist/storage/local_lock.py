"""The lock of an output in a local directory: the kernel's, on a file that names the holder."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import time
from pathlib import Path
from types import TracebackType

from della_dist.errors import OutputError
from della_dist.storage.staged import make_directories
from della_dist.storage.store import LOCK_KEY


class LocalLock:
    """An exclusive lock on an output, held until `release` or the end of the process."""

    __slots__ = ("_descriptor", "token")

    def __init__(self, descriptor: int, token: str) -> None:
        self._descriptor = descriptor
        self.token = token

    def check(self) -> None:
        """Do nothing: the kernel keeps the lock for as long as the process lives."""

    def release(self) -> None:
        """Let go of the lock. Harmless when repeated."""
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)

    def __enter__(self) -> LocalLock:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
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
    path = root / LOCK_KEY
    descriptor = -1
    token = secrets.token_hex(16)
    try:
        while not _is_at(descriptor, path):  # else it went away with a run that ended just now
            LocalLock(descriptor, token).release()
            make_directories(path.parent)
            with contextlib.suppress(FileNotFoundError):
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{owner_text}\n{token}\n".encode(), 0)
    except BlockingIOError:
        with LocalLock(descriptor, token):
            raise _held(root, descriptor) from None
    except OSError as error:
        LocalLock(descriptor, token).release()
        raise OutputError(
            f"{root} cannot be used as output: locking {path} failed: {error.strerror}. "
            "Choose a directory that you may write to, on a file system with file locks."
        ) from error
    return LocalLock(descriptor, token)


def _is_at(descriptor: int, path: Path) -> bool:
    """Return whether an open file still has this name."""
    try:
        return descriptor >= 0 and os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _held(root: Path, descriptor: int) -> OutputError:
    """Return the error for an output that another run holds."""
    text = os.pread(descriptor, 4096, 0).decode(errors="replace")
    owner = text.partition("\n")[0].strip() or "owner unknown"
    age_s = max(0, time.time() - os.fstat(descriptor).st_mtime)
    return OutputError(
        f"{root} is being written by another run ({owner}; since {age_s:.0f} s). "
        "Wait for it, stop it, or choose another output."
    )
