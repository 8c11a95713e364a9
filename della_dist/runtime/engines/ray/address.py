"""Where a Ray cluster is, and whether it is still there: without Ray, which waits for minutes."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

_REASON_LENGTH = 300
#: A cluster answers within this time.
CONNECT_S = 5.0


def running_cluster() -> str | None:
    """Return the address of the cluster that this machine belongs to, if it answers."""
    address = os.environ.get("RAY_ADDRESS")
    if address:
        return address
    # Where `ray start` leaves it, and where it stays when the cluster dies: ray.init would try for
    # minutes to reach that one.
    file = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"
    try:
        address = file.read_text().strip()
    except OSError:
        return None
    return address if answers(address) else None


def answers(address: str, timeout_s: float = CONNECT_S) -> bool:
    """Return whether something listens at ``host:port``."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout_s).close()
    except (OSError, ValueError):
        return False
    return True


class Lifeline:
    """Watches what a run cannot go on without.

    Parameters
    ----------
    patience_s
        Address -> how long it may be away.
    every_s
        How often they are tried.
    """

    def __init__(self, patience_s: Mapping[str, float], every_s: float) -> None:
        now_s = time.monotonic()
        self._patience_s = dict(patience_s)
        self._answered_s = dict.fromkeys(patience_s, now_s)
        self._tried_s = now_s
        self._every_s = every_s

    def holds(self) -> bool:
        """Return whether everything answers at this moment."""
        started_s = time.monotonic()
        for address in self._answered_s:
            if answers(address, self._every_s / 2):
                self._answered_s[address] = time.monotonic()
        self._tried_s = time.monotonic()
        return all(answered_s >= started_s for answered_s in self._answered_s.values())

    def missing(self) -> str | None:
        """Return an address at which nothing has answered for too long; None if there is none."""
        if time.monotonic() - self._tried_s >= self._every_s:
            self.holds()
        for address, answered_s in self._answered_s.items():
            if self._tried_s - answered_s > self._patience_s[address]:
                return address
        return None


def reason_of(error: BaseException) -> str:
    """Return the first sentence or two of what Ray says, which goes on for pages."""
    said = str(error)
    _, traceback, rest = said.rpartition("\n ")  # of a worker: the error itself comes after it
    if traceback:
        said = rest.partition("\n")[2] or said
    # Numbers of the actor and the job, which nobody looks up.
    lines = [line for line in said.splitlines() if not line.startswith("\t")]
    text = " ".join(" ".join(lines).split())
    return text if len(text) <= _REASON_LENGTH else text[:_REASON_LENGTH] + "..."
