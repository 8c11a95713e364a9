"""Which faults a proxy injects, and when: a plan decides alike in every run."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from tests.servers.wire import Head

FaultName = Literal[
    "delay",  # wait `seconds` before anything else
    "bandwidth",  # pass at most `bytes_per_s` on this connection, either way
    "internal_error",  # answer 500 InternalError; the server never sees the request
    "slow_down",  # answer 503 SlowDown; the server never sees the request
    "forbidden",  # answer 403 InvalidAccessKeyId, naming the key as AWS does
    "not_implemented",  # answer 501 NotImplemented; the server never sees the request
    "not_allowed",  # answer 405 MethodNotAllowed; the server never sees the request
    "not_found",  # answer 404 without a code; the server never sees the request
    "bad_request",  # answer 400 InvalidArgument; the server never sees the request
    "error_under_200",  # answer 200 with an InternalError; the server never sees the request
    "babble",  # answer 200 with a page of HTML; the server never sees the request
    "reset",  # reset the connection; the server never sees the request
    "freeze",  # never answer; the server never sees the request
    "lost_response",  # the server performs the request, the client gets a reset
    "reset_body",  # half of the body, then a reset
    "close_body",  # half of the body, then an orderly close: a short read
    "shorten",  # half of the body, under a Content-Length that says so
    "flip_response",  # one byte of the response's body is another
    "flip_request",  # one byte of the request's body is another
    "rewrite",  # replace what matches `pattern` in the request's head and in the response's
]
ALL_FAULTS: tuple[FaultName, ...] = get_args(FaultName)
# These go together with any other; of the rest a request gets at most one.
COMBINING = ("delay", "bandwidth", "rewrite")


@dataclass(frozen=True, slots=True)
class Rule:
    """A fault and the requests it befalls.

    Parameters
    ----------
    fault
        What happens.
    probability
        For each matching request.
    match
        A regular expression searched in the request's head, ignoring case; `^` and `$` match at
        lines. For example `^GET /bucket/.*safetensors`, `^PUT .*uploadId`, `^if-none-match`.
    calls
        Which of the matching requests, counted from 1; empty for all.
    times
        How often at most; None without a bound.
    seconds
        The length of a `delay`.
    bytes_per_s
        The bound of `bandwidth`.
    pattern, replacement
        Of `rewrite`, as `re.sub` takes them, ignoring case, `^` matching at lines: a store that
        ignores a header or sends none is ``rewrite`` of ``^range:.*\\r\\n``. Signatures break.
    """

    fault: FaultName
    probability: float = 1.0
    match: str = ""
    calls: Sequence[int] = ()
    times: int | None = None
    seconds: float = 0.0
    bytes_per_s: float = 0.0
    pattern: str = ""
    replacement: str = ""

    def __post_init__(self) -> None:
        if self.fault not in ALL_FAULTS:
            raise ValueError(f"no fault is called {self.fault!r}; there are {ALL_FAULTS}")
        if (self.fault == "delay") != (self.seconds > 0):
            raise ValueError(f"{self.fault!r} with seconds={self.seconds}")
        if (self.fault == "bandwidth") != (self.bytes_per_s > 0):
            raise ValueError(f"{self.fault!r} with bytes_per_s={self.bytes_per_s}")
        if (self.fault == "rewrite") != bool(self.pattern):
            raise ValueError(f"{self.fault!r} with pattern={self.pattern!r}")


@dataclass(frozen=True, slots=True)
class Plan:
    """Rules, and the seed of what is left to chance."""

    rules: Sequence[Rule] = ()
    seed: int = 0

    @staticmethod
    def from_mapping(content: Mapping[str, Any]) -> Plan:
        """Return the plan that `dataclasses.asdict` took apart."""
        return Plan(tuple(Rule(**rule) for rule in content["rules"]), content["seed"])


@dataclass(frozen=True, slots=True)
class Verdict:
    """What happens to one request."""

    fault: FaultName | None
    delay_s: float
    bytes_per_s: float | None
    rng: random.Random
    rewrites: Sequence[tuple[str, str]] = ()

    def rewritten(self, head: Head) -> Head:
        """Return a request's or a response's head as the other side is to see it."""
        text = head.text
        for pattern, replacement in self.rewrites:
            text = re.sub(pattern, replacement, text, flags=re.IGNORECASE | re.MULTILINE)
        return Head(text.encode("latin-1"))


class Referee:
    """Decides what happens to each request.

    Chance hangs on the request (method, target, range, how often it came before), not on the
    order in which requests arrive: concurrent clients see the same faults in every run.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._patterns = [re.compile(r.match, re.IGNORECASE | re.MULTILINE) for r in plan.rules]
        self._num_matched: Counter[int] = Counter()
        self._num_fired: Counter[int] = Counter()
        self._num_seen: Counter[str] = Counter()

    def judge(self, head: Head) -> Verdict:
        """Decide about the next request."""
        # The server draws upload ids anew in every run.
        target = re.sub(r"uploadId=[^&]*", "", head.target)
        identity = f"{head.method} {target} {head.headers.get('range', '')}"
        self._num_seen[identity] += 1
        rng = random.Random(f"{self._plan.seed} {identity} {self._num_seen[identity]}")
        text = head.text.replace("\r", "")
        fault: FaultName | None = None
        delay_s = 0.0
        rates = []
        rewrites = []
        for i, (rule, pattern) in enumerate(zip(self._plan.rules, self._patterns, strict=True)):
            if not pattern.search(text):
                continue
            self._num_matched[i] += 1
            chance = rng.random()
            if (
                chance >= rule.probability
                or (rule.calls and self._num_matched[i] not in rule.calls)
                or (rule.times is not None and self._num_fired[i] >= rule.times)
                or (fault is not None and rule.fault not in COMBINING)
            ):
                continue
            self._num_fired[i] += 1
            delay_s += rule.seconds
            if rule.bytes_per_s:
                rates.append(rule.bytes_per_s)
            if rule.pattern:
                rewrites.append((rule.pattern, rule.replacement))
            if rule.fault not in COMBINING:
                fault = rule.fault
        return Verdict(fault, delay_s, min(rates, default=None), rng, rewrites)
