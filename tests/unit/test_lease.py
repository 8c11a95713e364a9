"""The lease where requests fail, answers are lost, and several come at once."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from della_dist.errors import MissingObjectError, OutputError, RunError, StorageError
from della_dist.storage.opening import open_output_store
from della_dist.storage.remote import lease
from della_dist.storage.remote.lease import LeaseTimes, RemoteLease, acquire, holder_of
from della_dist.storage.remote.store import RemoteStore
from della_dist.storage.store import LOCK_KEY, ObjectStat, OutputStore
from tests.servers.moto import s3_environment
from tests.servers.proxy import Proxy, Rule, faulty_proxy

TIMES = LeaseTimes(beat_s=0.1, silence_s=1.0, poll_s=0.05, settle_s=0.2)


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RemoteStore, "lease_times", TIMES)


class FakeStore:
    """One object, and what may happen to requests for it."""

    lease_times = TIMES

    location = "fake://store"

    def __init__(self) -> None:
        self.content: bytes | None = None
        self.version = 0
        self.reachable = True
        self.num_requests = 0
        self.before: list[Any] = []
        """Called before the next requests, first come first."""

    def _request(self) -> None:
        self.num_requests += 1
        if self.before:
            self.before.pop(0)()
        if not self.reachable:
            raise StorageError("no answer")

    def stat(self, key: str) -> ObjectStat:
        self._request()
        if self.content is None:
            raise MissingObjectError("no such object")
        return ObjectStat(len(self.content), str(self.version))

    def read(self, key: str) -> bytes:
        self._request()
        if self.content is None:
            raise MissingObjectError("no such object")
        return self.content

    def delete(self, key: str) -> None:
        self._request()
        self.content = None

    def put(self, key: str, data: bytes) -> ObjectStat:
        self._request()
        self._put(data)
        return ObjectStat(len(data), str(self.version))

    def put_new(self, key: str, data: bytes) -> bool:
        self._request()
        return self.content is None and self._put(data)

    def put_over(self, key: str, data: bytes, version: str) -> bool:
        self._request()
        return self.content is not None and str(self.version) == version and self._put(data)

    def age_s(self, key: str) -> float | None:
        self.stat(key)
        return None

    def _put(self, data: bytes) -> bool:
        self.content = data
        self.version += 1
        return True

    def take(self, token: str) -> None:
        """Write another run's lease."""
        self._put(lease._dump({"owner": "another", "token": token, "since": 0, "beat": 0}))


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


def beats(store: FakeStore) -> int:
    assert store.content is not None
    return int(json.loads(store.content)["beat"])


def wait_for(condition: Any, timeout_s: float = 10) -> None:
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.01)


def test_a_holder_lives_through_an_outage(store: FakeStore) -> None:
    with acquire(store, "me", "mine") as held:
        wait_for(lambda: beats(store) > 2)
        store.reachable = False
        time.sleep(TIMES.silence_s * 1.5)
        with pytest.raises(StorageError, match="no answer"):
            held.check()  # nobody knows, so nothing is committed
        store.reachable = True
        held.check()  # nobody has taken it
        seen = beats(store)
        wait_for(lambda: beats(store) > seen)
    assert store.content is None


def test_a_holder_that_was_taken_over_in_an_outage(store: FakeStore) -> None:
    with acquire(store, "me", "mine") as held:
        store.reachable = False
        store.take("other")
        time.sleep(0.3)
        store.reachable = True
        for _ in range(2):
            with pytest.raises(RunError, match="taken over by another run"):
                held.check()
        held._thread.join(5)  # it does not write any more
        assert not held._thread.is_alive()
    assert holder_of(store) == "other"


def test_the_end_of_a_run_does_not_wait_for_a_store_that_is_gone(store: FakeStore) -> None:
    held = acquire(store, "me", "mine")
    store.reachable = False
    wait_for(lambda: not held._reached)
    held.release()
    asked = store.num_requests
    held.release()
    assert store.num_requests == asked
    # And where that shows only now, it is no error: the lease lapses.
    store.reachable = True
    store.content = None
    held = acquire(store, "me", "mine")
    store.before = [lambda: setattr(store, "reachable", False)]
    held._stop.set()
    held._thread.join()
    held.release()


def test_a_heartbeat_whose_answer_was_lost(store: FakeStore) -> None:
    """The object is of a version that the holder does not know, and still its own."""
    with acquire(store, "me", "mine") as held:
        store.version += 1
        seen = beats(store)
        wait_for(lambda: beats(store) > seen + 2)
        held.check()


@pytest.mark.parametrize("request_number", [1, 2])
def test_a_holder_that_is_taken_over_between_the_requests_of_a_heartbeat(
    store: FakeStore, request_number: int
) -> None:
    """Stopped there, and going on, it must not write over the version of the other run."""
    with acquire(store, "me", "mine") as held:
        store.before = [lambda: None] * request_number + [lambda: store.take("other")]
        wait_for(lambda: not store.before)
        held._thread.join(5 * TIMES.beat_s)
        assert holder_of(store) == "other"
        with pytest.raises(RunError, match="taken over by another run"):
            held.check()
    assert holder_of(store) == "other"


@pytest.mark.parametrize("request_number", range(14))
def test_a_newcomer_that_is_taken_over_before_it_holds_the_lease(
    store: FakeStore, request_number: int
) -> None:
    """It does not write over a lease before that was silent for long enough."""
    taken_s: list[float] = []

    def take() -> None:
        taken_s.append(time.monotonic())
        store.take("other")

    store.before = [lambda: None] * request_number + [take]
    with acquire(store, "me", "mine") as held:
        wait_for(lambda: not store.before)
        held._thread.join(5 * TIMES.beat_s)
        waited_s = time.monotonic() - taken_s[0]
        assert holder_of(store) == ("mine" if waited_s > TIMES.silence_s else "other")


@pytest.mark.parametrize("request_number", range(6))
def test_a_lease_that_is_let_go_while_it_is_looked_at(
    store: FakeStore, request_number: int
) -> None:
    store.take("other")
    store.before = [lambda: None] * request_number + [lambda: setattr(store, "content", None)]
    with acquire(store, "me", "mine") as held:
        held.check()
        assert not store.before


def test_a_store_that_fails_is_no_free_lease(store: FakeStore) -> None:
    store.take("other")
    store.before = [lambda: None] * 2 + [lambda: setattr(store, "reachable", False)]
    with pytest.raises(StorageError, match="no answer"):
        acquire(store, "me", "mine")
    assert store.content is not None


def test_an_empty_or_foreign_lease_counts_as_silent(
    store: FakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RemoteStore, "lease_times", replace(TIMES, silence_s=0.2))
    for content in (b"", b"[]", b"null", b"\xff", b'{"process": {"boot": 1}}', b'{"process": 3}'):
        store._put(content)
        with acquire(store, "me", "mine") as held:
            held.check()


_numbers = itertools.count()


@pytest.fixture(params=["memory", pytest.param("s3", marks=pytest.mark.s3)])
def root(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "s3":
        yield f"s3://{request.getfixturevalue('s3_bucket')}/out"
        return
    location = f"memory://lease-{next(_numbers)}/out"
    yield location
    open_output_store(location).delete(LOCK_KEY)


@pytest.mark.parametrize("held_before", [True, False])
def test_exactly_one_of_several_newcomers_wins(root: str, held_before: bool) -> None:
    """Whether there is no lease or a dead run's."""
    if held_before:
        dead = {"owner": "dead", "token": "dead", "since": 0, "beat": 0, "process": None}
        open_output_store(root).put(LOCK_KEY, lease._dump(dead))
    stores: list[OutputStore] = [open_output_store(root) for _ in range(6)]
    ready = threading.Barrier(len(stores))
    winners: list[RemoteLease] = []
    refusals: list[str] = []
    others: list[BaseException] = []

    def run(store: OutputStore, number: int) -> None:
        ready.wait()
        try:
            held = store.lock(f"newcomer {number}")
            assert isinstance(held, RemoteLease)
            winners.append(held)
        except OutputError as error:
            refusals.append(str(error))
        except BaseException as error:
            others.append(error)

    threads = [threading.Thread(target=run, args=(s, i)) for i, s in enumerate(stores)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not others
    (winner,) = winners
    winner.check()
    assert len(refusals) == len(stores) - 1
    assert all("is being written by another run (newcomer" in text for text in refusals)
    winner.release()
    assert not open_output_store(root).has_state()


@pytest.fixture
def proxy(s3_endpoint: str, s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    with faulty_proxy(s3_endpoint) as proxy:
        for name, value in s3_environment(proxy.endpoint).items():
            monkeypatch.setenv(name, value)
        yield proxy


@pytest.mark.s3
@pytest.mark.parametrize("operation", ["create", "takeover"])
def test_lost_answers_to_conditional_writes(proxy: Proxy, s3_bucket: str, operation: str) -> None:
    """The repetition is refused because of what the first request did: the lease is ours."""
    store = open_output_store(f"s3://{s3_bucket}/out")
    if operation == "create":
        proxy.use(Rule("lost_response", match="^if-none-match: *", times=1))
    else:
        store.put(LOCK_KEY, lease._dump({"owner": "dead", "token": "dead", "process": None}))
        proxy.use(Rule("lost_response", match="^if-match: *", times=1))
    with store.lock("me") as held:
        held.check()
        assert proxy.faults() == {"lost_response": 1}
        assert 412 in [seen.status for seen in proxy.seen() if seen.method == "PUT"]
    assert not store.has_state()


@pytest.mark.s3
def test_a_lease_at_a_fifth_of_all_requests_failing(
    proxy: Proxy, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a busy machine a beat that is repeated can take more than a second.
    monkeypatch.setattr(RemoteStore, "lease_times", replace(TIMES, silence_s=10))
    store = open_output_store(f"s3://{s3_bucket}/out")
    proxy.use(
        *(Rule(fault, 0.05) for fault in ("internal_error", "slow_down", "reset", "lost_response"))
    )
    held = store.lock("me")
    end_s = time.monotonic() + 4
    while time.monotonic() < end_s:
        held.check()
        with pytest.raises(OutputError, match=r"\(me; since"):
            open_output_store(store.location).lock("another")
    held.release()
    assert sum(proxy.faults().values()) > 10
    assert not store.has_state()
