"""A faulty network between an S3 client and an S3 server: a reverse proxy in its own process."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import IO, Any
from urllib.parse import urlsplit

from tests.servers.faults import Plan, Rule
from tests.servers.processes import ROOT, tied

__all__ = ["Plan", "Proxy", "Rule", "Seen", "faulty_proxy"]


@dataclass(frozen=True, slots=True)
class Seen:
    """A request that came by.

    `status` is 0 where the client got no response's head; `fault` is "" where none applied
    (faults of the body need a 200 or 206 with a Content-Length).
    """

    method: str
    target: str
    range: str
    status: int
    fault: str
    delay_s: float


class Proxy:
    """A running proxy: its endpoint, its plan, and what it saw."""

    def __init__(self, process: subprocess.Popen[bytes], host: str) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._commands: IO[bytes] = process.stdin
        self._answers: IO[bytes] = process.stdout
        self._lock = threading.Lock()
        self.pid = process.pid
        self.endpoint = f"http://{host}:{self._answer()['port']}"

    def _answer(self) -> dict[str, Any]:
        line = self._answers.readline()
        if not line:
            raise RuntimeError("the proxy ended; its error is on standard error")
        answer = json.loads(line)
        assert isinstance(answer, dict)
        return answer

    def _ask(self, **request: Any) -> dict[str, Any]:
        with self._lock:
            self._commands.write(json.dumps(request).encode() + b"\n")
            self._commands.flush()
            return self._answer()

    def use(self, *rules: Rule, seed: int = 0) -> None:
        """Follow these rules for all requests from now on; none: pass everything."""
        self._ask(plan=asdict(Plan(rules, seed)))

    def forget(self) -> None:
        """Count from zero again."""
        self._ask(forget=True)

    def seen(self) -> list[Seen]:
        """Return all requests so far, in the order they arrived."""
        return [Seen(*note) for note in self._ask(report=True)["seen"]]

    def methods(self) -> Counter[str]:
        """Return how many requests there were by method."""
        return Counter(s.method for s in self.seen())

    def faults(self) -> Counter[str]:
        """Return how many requests suffered what (of delays only their presence)."""
        seen = self.seen()
        counts = Counter(s.fault for s in seen if s.fault)
        counts.update("delay" for s in seen if s.delay_s)
        return counts

    def peak_in_flight(self) -> int:
        """Return the greatest number of requests in flight at once."""
        return int(self._ask(report=True)["peak_in_flight"])


@contextmanager
def faulty_proxy(
    endpoint: str,
    *rules: Rule,
    seed: int = 0,
    host: str = "127.0.0.1",
    prefix: Sequence[str] = (),
) -> Iterator[Proxy]:
    """Run a proxy on a free port of `host` before the server at `endpoint`.

    Parameters
    ----------
    endpoint
        The server's URL, http only.
    rules, seed
        Which faults happen from the start; `Proxy.use` changes them.
    host
        The address to listen at.
    prefix
        What to start it through, for example `ip netns exec NAME`.
    """
    server = urlsplit(endpoint)
    assert server.hostname is not None
    assert server.port is not None
    command = [
        *(*prefix, sys.executable, "-m", "tests.servers.relay"),
        *(server.hostname, str(server.port), host),
    ]
    process = subprocess.Popen(
        tied(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    )
    with process:  # closes the pipes and reaps
        try:
            proxy = Proxy(process, host)
            proxy.use(*rules, seed=seed)
            yield proxy
        finally:
            process.kill()
