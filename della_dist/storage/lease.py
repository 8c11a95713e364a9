"""The lease of an output in an object store: one object, made by a conditional create.

The holder rewrites it every few seconds (its heartbeat). Whoever finds a lease watches it for as
long as a holder may be silent: if it changes the holder is alive, and the newcomer is refused; if
not, the newcomer takes it over. No clocks are compared, except the store's with itself. A holder
that was taken over finds out at its next heartbeat, and its workers before their next commit.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from della_dist.errors import MissingObjectError, OutputError, RunError, StorageError
from della_dist.storage.store import LOCK_KEY, ObjectStat

#: Seconds between two signs of life of the holder ...
BEAT_S = 5.0
#: ... and how long it may be silent before it counts as dead.
SILENCE_S = 30.0
POLL_S = 1.0
#: Where a takeover is not atomic, the loser of a race has overwritten the winner by then.
SETTLE_S = 2.0


class LeaseStore(Protocol):
    """What a lease needs of its store."""

    @property
    def location(self) -> str:
        """The root, for messages."""

    def stat(self, key: str) -> ObjectStat:
        """See `Store`."""

    def read(self, key: str) -> bytes:
        """See `Store`."""

    def delete(self, key: str) -> None:
        """See `Store`."""

    def put_new(self, key: str, data: bytes) -> bool:
        """Write `key` unless it exists; return whether it did not."""

    def put_over(self, key: str, data: bytes, version: str) -> bool:
        """Replace the `version` of `key`; return whether that was there."""

    def age_s(self, key: str) -> float | None:
        """Return how long ago at least `key` was written by the store's clock, or None."""


class RemoteLease:
    """A lease that is held; its heart beats in a thread until `release`."""

    def __init__(self, store: LeaseStore, content: Mapping[str, Any], version: str) -> None:
        self.token: str = content["token"]
        self._store = store
        self._content = dict(content)
        self._version = version
        self._lost = False
        self._reached = True
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise `RunError` if another run has taken the lease over.

        Asks the store: a process that was stopped and goes on has not heard of it yet.
        """
        if self._lost or holder_of(self._store) != self.token:
            raise RunError(
                f"{self._store.location} was taken over by another run: this one was silent for "
                f"more than {SILENCE_S:.0f} s. What it committed is kept. Let the other one finish."
            )

    def release(self) -> None:
        """Let go of it, as far as the store can be reached: else it lapses.

        Harmless when repeated, or when another run has it.
        """
        self._stop.set()
        self._thread.join()
        if self._reached:
            with contextlib.suppress(StorageError):
                if holder_of(self._store) == self.token:
                    self._store.delete(LOCK_KEY)

    def _beat(self) -> None:
        while not self._lost and not self._stop.wait(BEAT_S):
            self._reached = False  # whoever can reach it may take over; `check` will tell
            with contextlib.suppress(StorageError):
                self._renew()
                self._reached = True

    def _renew(self) -> None:
        self._content["beat"] += 1
        if not self._store.put_over(LOCK_KEY, _dump(self._content), self._version) and (
            holder_of(self._store) != self.token
        ):
            self._lost = True
            return
        self._version = self._store.stat(LOCK_KEY).version

    def __enter__(self) -> RemoteLease:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


def acquire(store: LeaseStore, owner_text: str, token: str) -> RemoteLease:
    """Take the lease, from a dead holder where there is one.

    Raises
    ------
    OutputError
        If a living run holds it.
    """
    content = {
        "owner": owner_text,
        "token": token,
        "since": time.time(),
        "beat": 0,
        "process": _process(os.getpid()),
    }
    while True:
        # A create whose answer was lost has been repeated, and refused: then it is ours.
        if store.put_new(LOCK_KEY, _dump(content)) or holder_of(store) == token:
            return RemoteLease(store, content, store.stat(LOCK_KEY).version)
        found = _look(store)
        if found is None:
            continue  # released just now
        holder, version = found
        if not _is_dead(store, holder, version):
            found = _look(store)
            if found is None:
                continue
            raise _held(store, found[0])  # which another newcomer may have taken meanwhile
        if store.put_over(LOCK_KEY, _dump(content), version):
            time.sleep(SETTLE_S)
            if holder_of(store) == token:
                return RemoteLease(store, content, store.stat(LOCK_KEY).version)


def holder_of(store: LeaseStore) -> str | None:
    """Return the token of the lease in force, None where there is none."""
    found = _look(store)
    return None if found is None else str(found[0].get("token"))


def _is_dead(store: LeaseStore, holder: Mapping[str, Any], version: str) -> bool:
    """Watch a lease until it changes (alive), or was silent for too long (dead)."""
    if _ended_here(holder.get("process")):
        return True
    try:
        silent_s = store.age_s(LOCK_KEY) or 0.0
        end_s = time.monotonic() + SILENCE_S - silent_s
        while (left_s := end_s - time.monotonic()) > 0:
            time.sleep(min(POLL_S, left_s))
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
    return OutputError(
        f"{store.location} is being written by another run "
        f"({holder.get('owner', 'owner unknown')}; since {age_s:.0f} s). "
        "Wait for it, stop it, or choose another output."
    )


def _process(pid: int) -> dict[str, Any] | None:
    """Return what tells a process from every other one of this machine; None if it has ended."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = str(Path("/proc/self/ns/pid").readlink())
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    if fields[0] in ("Z", "X"):
        return None
    return {"boot": boot, "namespace": namespace, "pid": pid, "started": fields[19]}


def _ended_here(process: Any) -> bool:  # noqa: ANN401
    """Tell whether a holder ran on this machine, since it was booted, and has ended."""
    own = _process(os.getpid())
    if not isinstance(process, dict) or own is None:
        return False
    if any(process.get(name) != own[name] for name in ("boot", "namespace")):
        return False
    return _process(int(process.get("pid", 0))) != process


def _dump(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content).encode()
