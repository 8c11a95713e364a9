"""The lease of an output in an object store: one object, made by a conditional create.

The holder rewrites it every few seconds (its heartbeat). Whoever finds a lease watches it for as
long as a holder may be silent: if it changes the holder is alive, and the newcomer is refused; if
not, the newcomer takes it over. No clocks are compared, except the store's with itself. A holder
that was taken over finds out at its next heartbeat, and its workers before their next commit.

All that hangs on conditional writes, which some stores lack and others ignore without a word. So
whoever has made a lease first tries whether the store protects it; where it does not, the run is
refused unless the user takes the store's part (``--no-lease``). The object then only says which run
began last: an earlier one stops at its next commit, but nothing keeps the later one out.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from della_dist.errors import (
    MissingObjectError,
    OutputError,
    RunError,
    StorageError,
    UnsupportedError,
)
from della_dist.storage.remote.holder import ended_here, process_of
from della_dist.storage.store import LOCK_KEY, ObjectStat

log = logging.getLogger("della_dist.run")


@dataclass(frozen=True, slots=True)
class LeaseTimes:
    """How long what takes, in seconds."""

    beat_s: float = 5.0
    """Between two signs of life of the holder."""
    silence_s: float = 30.0
    """How long it may be silent before it counts as dead."""
    poll_s: float = 1.0
    """Between two looks at a holder that is silent."""
    settle_s: float = 2.0
    """Where a takeover is not atomic, the loser of a race has overwritten the winner by then."""


class LeaseStore(Protocol):
    """What a lease needs of its store."""

    @property
    def location(self) -> str:
        """The root, for messages."""

    @property
    def lease_times(self) -> LeaseTimes:
        """How long what takes."""

    def stat(self, key: str) -> ObjectStat:
        """See `Store`."""

    def read(self, key: str) -> bytes:
        """See `Store`."""

    def delete(self, key: str) -> None:
        """See `Store`."""

    def put(self, key: str, data: bytes) -> ObjectStat:
        """See `Store`."""

    def put_new(self, key: str, data: bytes) -> bool:
        """Write `key` unless it exists; return whether it did not."""

    def put_over(self, key: str, data: bytes, version: str) -> bool:
        """Replace the `version` of `key`; return whether that was there."""

    def age_s(self, key: str) -> float | None:
        """Return how long ago at least `key` was written by the store's clock, or None."""


class RemoteLease:
    """A lease that is held; its heart beats in a thread until `release`.

    Parameters
    ----------
    store, content
        Where it is, and what is written there.
    version
        Of what is written there; None for the mark of a run without a lease, which has no heart.
    """

    def __init__(self, store: LeaseStore, content: Mapping[str, Any], version: str | None) -> None:
        self.token: str = content["token"]
        self._store = store
        self._content = dict(content)
        self._version = version
        self._lost = False
        self._reached = True
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        if version is not None:
            self._thread.start()

    def check(self) -> None:
        """Raise `RunError` if another run has taken the lease over.

        Asks the store: a process that was stopped and goes on has not heard of it yet.
        """
        if self._lost or holder_of(self._store) != self.token:
            why = (
                "no lease kept it out"
                if self._version is None
                else f"this one was silent for more than {self._store.lease_times.silence_s:.0f} s"
            )
            raise RunError(
                f"{self._store.location} was taken over by another run: {why}. What it committed "
                "is kept. Let the other one finish."
            )

    def release(self) -> None:
        """Let go of it, as far as the store can be reached: else it lapses.

        Harmless when repeated, or when another run has it.
        """
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._reached:
            with contextlib.suppress(StorageError):
                if holder_of(self._store) == self.token:
                    self._store.delete(LOCK_KEY)

    def _beat(self) -> None:
        while not self._lost and not self._stop.wait(self._store.lease_times.beat_s):
            self._reached = False  # whoever can reach it may take over; `check` will tell
            with contextlib.suppress(StorageError):
                self._renew()
                self._reached = True

    def _renew(self) -> None:
        assert self._version is not None
        self._content["beat"] += 1
        # Refused, it is ours all the same where only the answer was lost.
        self._store.put_over(LOCK_KEY, _dump(self._content), self._version)
        version = _own_version(self._store, self.token)
        if version is None:
            self._lost = True
        else:
            self._version = version

    def __enter__(self) -> RemoteLease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def acquire(store: LeaseStore, owner_text: str, token: str) -> RemoteLease:
    """Take the lease, from a dead holder where there is one.

    Raises
    ------
    OutputError
        If a living run holds it, or the store cannot keep others from taking it.
    """
    content = _content(owner_text, token)
    while True:
        found = _look(store)  # before anything is written: the store may overwrite what is there
        if found is None:
            # A create whose answer was lost has been repeated, and refused: then it is ours.
            taken = _protected(store, content, store.put_new) or holder_of(store) == token
        else:
            holder, version = found
            if not _is_dead(store, holder, version):
                found = _look(store)
                if found is None:
                    continue
                raise _held(store, found[0])  # which another newcomer may have taken meanwhile
            taken = _protected(store, content, store.put_over, version)
            if taken:
                time.sleep(store.lease_times.settle_s)
                taken = holder_of(store) == token
        if taken and (held := _tried(store, content)) is not None:
            return held


def go_without(store: LeaseStore, owner_text: str, token: str) -> RemoteLease:
    """Mark the output as that of the run which began last, where the store has no leases.

    Raises
    ------
    OutputError
        If a living run holds a lease all the same.
    """
    found = _look(store)
    if found is not None and not found[0].get("marks") and not _is_dead(store, *found):
        raise _held(store, found[0])
    log.warning(
        "%s is written without a lease: a second run that writes there would damage it",
        store.location,
    )
    content = {**_content(owner_text, token), "marks": True}
    store.put(LOCK_KEY, _dump(content))
    return RemoteLease(store, content, None)


def _content(owner_text: str, token: str) -> dict[str, Any]:
    return {
        "owner": owner_text,
        "token": token,
        "since": time.time(),
        "beat": 0,
        "process": process_of(os.getpid()),
    }


def _tried(store: LeaseStore, content: dict[str, Any]) -> RemoteLease | None:
    """Return a lease that was made just now, once the store has shown that it protects it.

    By its first heartbeat, and by not doing what would take it from its holder. None if another
    run has it by then.
    """
    version = _own_version(store, content["token"])
    if version is None:
        return None
    if _protected(store, content, store.put_new):
        raise _unprotected(store, content, "a PUT with If-None-Match: * overwrote an object")
    if _protected(store, content, store.put_over, "0" * 32):
        raise _unprotected(store, content, "a PUT with If-Match overwrote another version")
    content["beat"] += 1
    if not _protected(store, content, store.put_over, version):
        found = _look(store)
        if found is None or found[0].get("token") != content["token"]:
            return None
        if found[0].get("beat") != content["beat"]:  # else only the answer was lost
            raise _unprotected(store, content, "a PUT with the right If-Match was refused")
    version = _own_version(store, content["token"])
    return None if version is None else RemoteLease(store, content, version)


def _protected(
    store: LeaseStore, content: Mapping[str, Any], write: Callable[..., bool], *version: str
) -> bool:
    """Make a conditional write; refuse a store that has none."""
    try:
        return write(LOCK_KEY, _dump(content), *version)
    except UnsupportedError as error:
        raise _unprotected(store, content, str(error.__cause__ or error).rstrip(".")) from error


def _unprotected(store: LeaseStore, content: Mapping[str, Any], how: str) -> OutputError:
    """Take back what was written, and return what is to be said."""
    with contextlib.suppress(StorageError):
        if holder_of(store) == content["token"]:
            store.delete(LOCK_KEY)
    return OutputError(
        f"{store.location} cannot be kept from a second run: its store has no conditional writes "
        f"({how}). Choose an output in a store that has; or see to it yourself that no second run "
        "writes there, and add --no-lease."
    )


def holder_of(store: LeaseStore) -> str | None:
    """Return the token of the lease in force, None where there is none."""
    found = _look(store)
    return None if found is None else str(found[0].get("token"))


def _own_version(store: LeaseStore, token: str) -> str | None:
    """Return the version of the lease in force, None if it is not that with this token.

    The version is asked for first. A process may be stopped between two requests, and taken over:
    the version is then the other run's, and writing over it would take the lease from a living
    holder. Content that is still ours shows that the version was.
    """
    found = _look(store)
    return found[1] if found is not None and found[0].get("token") == token else None


def _is_dead(store: LeaseStore, holder: Mapping[str, Any], version: str) -> bool:
    """Watch a lease until it changes (alive), or was silent for too long (dead)."""
    if ended_here(holder.get("process")):
        return True
    if holder.get("marks"):
        return False  # nobody can tell
    try:
        silent_s = store.age_s(LOCK_KEY) or 0.0
        end_s = time.monotonic() + store.lease_times.silence_s - silent_s
        while (left_s := end_s - time.monotonic()) > 0:
            time.sleep(min(store.lease_times.poll_s, left_s))
            if store.stat(LOCK_KEY).version != version:
                return False
    except MissingObjectError:
        return False  # released just now
    return True


def _look(store: LeaseStore) -> tuple[dict[str, Any], str] | None:
    """Return the content and version of the lease, or None where there is none."""
    try:
        version = store.stat(LOCK_KEY).version
        content = json.loads(store.read(LOCK_KEY))
    except MissingObjectError:
        return None
    except ValueError:
        content = None
    return (content if isinstance(content, dict) else {}), version


def _held(store: LeaseStore, holder: Mapping[str, Any]) -> OutputError:
    age_s = max(0.0, time.time() - float(holder.get("since", time.time())))
    if holder.get("marks"):
        return OutputError(
            f"{store.location} was begun without a lease ({holder.get('owner', 'owner unknown')}; "
            f"{age_s:.0f} s ago), so that nobody can tell whether that run still writes there. If "
            "it does not, run the same command again with --no-lease."
        )
    return OutputError(
        f"{store.location} is being written by another run "
        f"({holder.get('owner', 'owner unknown')}; since {age_s:.0f} s). "
        "Wait for it, stop it, or choose another output."
    )


def _dump(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content).encode()
