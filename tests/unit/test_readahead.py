"""Reading ahead: the right bytes, in order, within the budget, and never for ever."""

from __future__ import annotations

import random
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from della_dist.storage.readahead import ReadAhead, RemoteReader, Want
from della_dist.storage.store import ObjectStat, U8Array

SIZE = 4000


class FakeStore:
    """Objects of random bytes; requests take `delay_s` at most, or wait for `let_go`."""

    def __init__(self, num_objects: int, delay_s: float = 0.0, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.data = [rng.integers(0, 256, SIZE, dtype=np.uint8) for _ in range(num_objects)]
        self.requests: list[tuple[int, int, int]] = []
        self.errors: dict[int, Exception] = {}
        self.let_go = threading.Event()
        self.let_go.set()
        self._delay_s = delay_s
        self._rng = random.Random(seed)
        self._pool = ThreadPoolExecutor(6)
        self._buffers: dict[int, int] = {}
        self.peak_bytes = 0

    def reader(self, number: int, ahead: ReadAhead) -> RemoteReader:
        def submit(start: int, into: memoryview) -> Future[None]:
            self._count(into)
            self.requests.append((number, start, start + len(into)))
            return self._pool.submit(self._fill, number, start, into)

        return RemoteReader(ObjectStat(SIZE, "v"), submit, ahead)

    def _fill(self, number: int, start: int, into: memoryview) -> None:
        self.let_go.wait(20)
        time.sleep(self._rng.uniform(0, self._delay_s))
        if start in self.errors:
            raise self.errors[start]
        into[:] = self.data[number][start : start + len(into)].data

    @property
    def live_bytes(self) -> int:
        return sum(self._buffers.values())

    def _count(self, into: memoryview) -> None:
        """Count the bytes of buffers that exist, independently of what is tested."""
        buffer = into.obj
        if id(buffer) not in self._buffers:
            assert isinstance(buffer, np.ndarray)
            self._buffers[id(buffer)] = buffer.nbytes
            weakref.finalize(buffer, self._buffers.pop, id(buffer))
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def check(self, number: int, start: int, view: U8Array) -> None:
        np.testing.assert_array_equal(view, self.data[number][start : start + len(view)])

    def close(self) -> None:
        self.let_go.set()
        self._pool.shutdown(cancel_futures=True)


@pytest.fixture
def store() -> Iterator[FakeStore]:
    store = FakeStore(3)
    yield store
    store.close()


def groups(readers: list[RemoteReader], step: int, passes: int = 1) -> Iterator[list[Want]]:
    for _ in range(passes):
        for start in range(0, SIZE, step):
            yield [(reader, start, min(SIZE, start + step)) for reader in readers]


def test_in_order_within_the_budget(store: FakeStore) -> None:
    ahead = ReadAhead(request_bytes=200, budget_bytes=1200)
    readers = [store.reader(i, ahead) for i in range(3)]
    ahead.follow(groups(readers, 50))
    assert store.requests[:3] == [(0, 0, 200), (1, 0, 200), (2, 0, 200)]  # one of each first
    assert store.live_bytes == 1200  # as far as the budget goes, before anything is asked for
    for group in groups(readers, 50):
        for reader, start, stop in group:
            store.check(readers.index(reader), start, reader.view(start, stop))
        for reader, start, stop in group:
            reader.release(start, stop)
    assert store.peak_bytes <= 1200
    assert store.live_bytes == 0
    for i in range(3):  # every byte once, in order
        mine = [(start, stop) for number, start, stop in store.requests if number == i]
        assert mine == [(start, start + 200) for start in range(0, SIZE, 200)]


def test_the_plan_is_drawn_only_as_far_as_the_budget_reaches(store: FakeStore) -> None:
    drawn = 0
    ahead = ReadAhead(request_bytes=100, budget_bytes=400)
    reader = store.reader(0, ahead)

    def plan() -> Iterator[list[Want]]:
        nonlocal drawn
        for group in groups([reader], 10):
            drawn += 1
            yield group

    ahead.follow(plan())
    assert drawn * 10 <= 400 + 200


def test_a_range_beyond_the_budget_is_read_and_nothing_besides(store: FakeStore) -> None:
    ahead = ReadAhead(request_bytes=100, budget_bytes=400)
    reader = store.reader(0, ahead)
    ahead.follow(groups([reader], 100))
    assert store.live_bytes == 400
    store.check(0, 3000, reader.view(3000, 3100))  # far ahead in the plan
    assert store.live_bytes == 500
    store.check(0, 1234, reader.view(1234, 1334))  # not in the plan at all
    assert store.live_bytes == 600
    reader.release(3000, 3100)
    reader.release(1234, 1334)
    assert store.live_bytes == 400


def test_a_range_larger_than_the_budget(store: FakeStore) -> None:
    ahead = ReadAhead(request_bytes=100, budget_bytes=150)
    reader = store.reader(0, ahead)
    ahead.follow(iter([[(reader, 0, 1000)], [(reader, 1000, 1010)]]))
    store.check(0, 0, reader.view(0, 1000))
    assert store.requests == [(0, start, start + 100) for start in range(0, 1000, 100)]
    reader.release(0, 1000)
    store.check(0, 1000, reader.view(1000, 1010))


@pytest.mark.parametrize(("budget_bytes", "read_bytes"), [(SIZE, 2 * SIZE), (4 * SIZE, SIZE)])
def test_two_passes(store: FakeStore, budget_bytes: int, read_bytes: int) -> None:
    """What both passes want is read once, where the budget has room to keep it for the second."""
    ahead = ReadAhead(request_bytes=1000, budget_bytes=budget_bytes)
    reader = store.reader(0, ahead)
    ahead.follow(groups([reader], 500, passes=2))
    for _ in range(2):
        for start in range(0, SIZE, 500):
            store.check(0, start, reader.view(start, start + 500))
            reader.release(start, start + 500)
    assert sum(stop - start for _, start, stop in store.requests) == read_bytes
    assert store.live_bytes == 0


def test_views_outlive_their_release(store: FakeStore) -> None:
    ahead = ReadAhead(request_bytes=1000, budget_bytes=1000)
    reader = store.reader(0, ahead)
    view = reader.view(0, 1000)
    reader.release(0, 1000)
    reader.view(1000, 2000)
    store.check(0, 0, view)
    assert not view.flags.writeable


def test_what_was_not_announced_and_is_released_twice(store: FakeStore) -> None:
    ahead = ReadAhead(request_bytes=1000, budget_bytes=1000)
    reader = store.reader(0, ahead)
    for _ in range(2):
        store.check(0, 10, reader.view(10, 20))
        reader.release(10, 20)
        reader.release(10, 20)
    assert store.live_bytes == 0


def test_errors_reach_whoever_looks(store: FakeStore) -> None:
    ahead = ReadAhead(request_bytes=100, budget_bytes=1000)
    reader = store.reader(0, ahead)
    store.errors[100] = OSError("broken")
    ahead.follow(iter([[(reader, 0, 300)], [(reader, 300, 400)]]))
    for _ in range(2):
        with pytest.raises(OSError, match="broken"):
            reader.view(0, 300)
    store.check(0, 300, reader.view(300, 400))


def test_closing_while_requests_are_on_their_way(store: FakeStore) -> None:
    store.let_go.clear()
    ahead = ReadAhead(request_bytes=50, budget_bytes=2000)
    reader = store.reader(0, ahead)
    ahead.follow(groups([reader], 50))
    seen: list[BaseException | None] = []

    def look(start: int) -> None:
        try:
            store.check(0, start, reader.view(start, start + 50))
            seen.append(None)
        except (CancelledError, ValueError) as error:
            seen.append(error)

    # Of the six threads each has a request; 1000 is queued behind them, 3000 beyond the budget.
    threads = [threading.Thread(target=look, args=(start,)) for start in (0, 1000)]
    for thread in threads:
        thread.start()
    while not all(thread.ident for thread in threads):
        time.sleep(0.01)
    time.sleep(0.05)
    ahead.close()
    num_requests = len(store.requests)
    look(3000)
    store.let_go.set()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert len(store.requests) == num_requests
    kinds = sorted(type(error).__name__ for error in seen)
    assert kinds == ["CancelledError", "NoneType", "ValueError"]


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    step=st.integers(1, 700),
    request=st.integers(30, 900),
    budget=st.integers(1, 8000),
    num_threads=st.integers(1, 5),
    passes=st.integers(1, 2),
    announced=st.floats(0, 1),
)
def test_many_threads_and_slow_requests(
    seed: int,
    step: int,
    request: int,
    budget: int,
    num_threads: int,
    passes: int,
    announced: float,
) -> None:
    """Whatever is announced and whoever comes first: all bytes are right, and nobody waits long."""
    step = max(step, SIZE // 60)
    store = FakeStore(2, delay_s=0.002, seed=seed)
    ahead = ReadAhead(request, budget)
    readers = [store.reader(i, ahead) for i in range(2)]
    total = -(-SIZE // step) * passes
    ahead.follow(islice(groups(readers, step, passes), int(announced * total)))
    errors: list[BaseException] = []
    rng = random.Random(seed)

    def work(todo: Iterator[list[Want]], lock: threading.Lock) -> None:
        try:
            while True:
                with lock:
                    group = next(todo, None)
                if group is None:
                    return
                for reader, start, stop in group:
                    reader.prefetch(start, stop)
                time.sleep(rng.uniform(0, 0.001))
                for reader, start, stop in group:
                    store.check(readers.index(reader), start, reader.view(start, stop))
                for reader, start, stop in group:
                    reader.release(start, stop)
        except BaseException as error:
            errors.append(error)

    try:
        for _ in range(passes):  # as a tensor is measured before it is merged
            todo, lock = groups(readers, step), threading.Lock()
            threads = [threading.Thread(target=work, args=(todo, lock)) for _ in range(num_threads)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(30)
                assert not thread.is_alive(), "deadlock"
        assert not errors, errors
        assert store.live_bytes == 0
        # Beyond the budget are the spans that the groups in hand need, and no others.
        waited = 2 * num_threads * (step + max(step, request))
        assert store.peak_bytes <= budget + waited
    finally:
        ahead.close()
        store.close()
