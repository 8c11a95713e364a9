"""What all remote stores have in common that are written to: the lease, the records of a run.

How a request is made is the subclass's matter: `della_dist.storage.remote.s3` for S3,
`della_dist.storage.remote.generic` for whatever else fsspec knows.
"""

from __future__ import annotations

import logging
import secrets
import threading
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Sequence

from della_dist.storage.in_place import InPlace
from della_dist.storage.remote.files import RemoteFiles
from della_dist.storage.remote.lease import LeaseTimes, RemoteLease, acquire, go_without, holder_of
from della_dist.storage.store import LOCK_KEY, STATE_PREFIX, ObjectStat, Writer

log = logging.getLogger("della_dist.run")


class RemoteStore(RemoteFiles, InPlace):
    """Objects under one URL that are also written; see `della_dist.storage.store.OutputStore`.

    Parameters
    ----------
    location
        The URL, for messages.
    root
        Its path within the store.
    connections
        Requests at once.
    """

    lease_times = LeaseTimes()

    def __init__(self, location: str, root: str, connections: int) -> None:
        super().__init__(location, connections)
        self._root = root.rstrip("/")

    @abstractmethod
    def put(self, key: str, data: bytes) -> ObjectStat:
        """Write a small object at once, whole or not at all."""

    @abstractmethod
    def put_new(self, key: str, data: bytes) -> bool:
        """Write `key` unless it exists; return whether it did not."""

    @abstractmethod
    def put_over(self, key: str, data: bytes, version: str) -> bool:
        """Replace the `version` of `key`; return whether that was there."""

    @abstractmethod
    def create(self, key: str, size_bytes: int | None = None) -> Writer:
        """Begin a new object; one that exists is replaced at ``commit``."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove `key`; one that is not there is fine."""

    @abstractmethod
    def clear_staging(self, names: Collection[str] = ()) -> None:
        """Remove what attempts that were killed left behind; see `Store`."""

    def delete_state(self) -> None:
        """Remove the records of a run; the lease goes when it is released."""
        for key in self._keys(STATE_PREFIX):
            if key != LOCK_KEY:
                self.delete(key)

    def has_state(self) -> bool:
        """Return whether a run has left records or a lease."""
        return bool(self._keys(STATE_PREFIX))

    def taken(self, keys: Iterable[str]) -> Sequence[str]:
        """Return those of `keys` that there are."""
        top_level = set(self.children("")[0])
        return [key for key in keys if key in top_level or ("/" in key and self.exists(key))]

    def remember_root(self) -> Callable[[], None]:
        """Return a function that does nothing: a prefix is there when an object is."""
        return lambda: None

    def free_bytes(self) -> int | None:
        """Return None: object stores have room."""
        return None

    def lock(self, owner_text: str, *, lease: bool = True) -> RemoteLease:
        """Take the lease of this output; see `della_dist.storage.remote.lease`."""
        return (acquire if lease else go_without)(self, owner_text, secrets.token_hex(16))

    def is_held(self, token: str) -> bool:
        """Return whether the lease with this token is the one in force."""
        return holder_of(self) == token

    def age_s(self, key: str) -> float | None:
        """Return how long ago at least `key` was written by the store's clock; None if unknown."""
        return None


_said: set[str] = set()
_said_lock = threading.Lock()


def say_once(text: str) -> None:
    """Log what a store lacks: once in this process, whatever is read and written there."""
    with _said_lock:
        is_new = text not in _said
        _said.add(text)
    if is_new:
        log.warning("%s", text)
