"""What every store must do, as tests, for those who write one. Needs pytest; nothing imports it.

A subclass provides the store, empty, and pytest collects the subclass::

    import pytest
    from della_dist.storage.opening import open_output_store
    from della_dist.storage.store import OutputStore
    from della_dist.testing import RemoteSuite

    class TestMyStore(RemoteSuite):
        @pytest.fixture
        def store(self) -> OutputStore:
            return open_output_store("mine://empty/place")

`StoreSuite` is for stores whose lock a kernel keeps, `RemoteSuite` for those with a lease, and
`ObjectSuite` for stores without conditional writes.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from della_dist.errors import OutputError, RunError, StorageError
from della_dist.storage.manifest import MANIFEST_NAME
from della_dist.storage.opening import open_output_store
from della_dist.storage.remote import lease
from della_dist.storage.remote.holder import process_of
from della_dist.storage.remote.lease import LeaseTimes
from della_dist.storage.remote.store import RemoteStore
from della_dist.storage.store import LOCK_KEY, OutputStore

#: More than one request to read, more than two parts to write, and no multiple of either.
LARGE_BYTES = (20 << 20) + 12_345


class ObjectSuite:
    """The contract of `della_dist.storage.store.Store`, as tests, but for the lease."""

    #: Whether the store can keep a second run out.
    has_leases = True

    @pytest.fixture
    def store(self) -> Iterator[OutputStore]:
        """Return an empty store."""
        raise NotImplementedError

    @pytest.fixture(autouse=True)
    def fast_leases(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let dead holders die sooner."""
        monkeypatch.setattr(RemoteStore, "lease_times", LeaseTimes(0.2, 1.5, 0.1, 0.1))

    # Reading.

    def test_read_whole_and_ranges(self, store: OutputStore) -> None:
        stat = store.put("a/b.bin", bytes(range(100)))
        assert stat.size_bytes == 100
        assert store.stat("a/b.bin") == stat
        assert store.read("a/b.bin") == bytes(range(100))
        assert store.read("a/b.bin", 10, 20) == bytes(range(10, 20))
        assert store.read("a/b.bin", 90) == bytes(range(90, 100))
        assert store.read("a/b.bin", 50, 50) == b""
        assert store.exists("a/b.bin")
        assert not store.exists("a")
        assert not store.exists("a/b")
        with pytest.raises(StorageError, match="bytes"):
            store.read("a/b.bin", 50, 101)

    @pytest.mark.parametrize("method", ["stat", "read", "open_reader"])
    def test_what_is_not_there(self, store: OutputStore, method: str) -> None:
        with pytest.raises(StorageError, match=r"missing.bin failed: .*(No such|no such)"):
            getattr(store, method)("missing.bin")
        assert not store.exists("missing.bin")

    def test_views(self, store: OutputStore) -> None:
        data = np.random.default_rng(0).integers(0, 256, LARGE_BYTES, dtype=np.uint8)
        stat = store.put("x", data.tobytes())
        with store.open_reader("x") as reader:
            assert reader.stat == stat
            view = reader.view(5000, LARGE_BYTES)
            np.testing.assert_array_equal(view, data[5000:])
            assert not view.flags.writeable
            assert reader.view(7, 7).shape == (0,)
            assert reader.view(LARGE_BYTES, LARGE_BYTES).shape == (0,)
            reader.prefetch(100, 200)
            reader.prefetch(300, 400)
            np.testing.assert_array_equal(reader.view(300, 400), data[300:400])
            reader.release(300, 400)
            np.testing.assert_array_equal(reader.view(300, 400), data[300:400])
            np.testing.assert_array_equal(reader.view(100, 200), data[100:200])
            reader.release(100, 200)
            reader.release(5000, LARGE_BYTES)
            np.testing.assert_array_equal(view, data[5000:])
            with pytest.raises(ValueError, match="is not within"):
                reader.view(0, LARGE_BYTES + 1)
        reader.close()
        np.testing.assert_array_equal(view, data[5000:])  # a view outlives its reader
        with pytest.raises(ValueError, match="closed"):
            reader.view(0, 1)

    def test_views_from_many_threads(self, store: OutputStore) -> None:
        data = np.random.default_rng(0).integers(0, 256, 1_000_000, dtype=np.uint8)
        store.put("x", data.tobytes())
        wrong: list[int] = []
        with store.open_reader("x") as reader:

            def read(first: int) -> None:
                for start in range(first, 900_000, 70_000):
                    view = reader.view(start, start + 50_000)
                    if not np.array_equal(view, data[start : start + 50_000]):
                        wrong.append(start)
                    reader.release(start, start + 50_000)

            threads = [threading.Thread(target=read, args=(i * 9_000,)) for i in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert not wrong

    def test_empty_object(self, store: OutputStore) -> None:
        store.put("x", b"")
        assert store.read("x") == b""
        assert store.stat("x").size_bytes == 0
        with store.open_reader("x") as reader:
            assert reader.view(0, 0).shape == (0,)
            reader.prefetch(0, 0)
            reader.release(0, 0)

    # Names.

    def test_list(self, store: OutputStore) -> None:
        assert store.list() == []
        assert store.children("")[0] == []
        for key in ("b", "a/x", "a/y/z", "ab", ".della/tasks/1"):
            store.put(key, key.encode())
        with store.lock("me", lease=self.has_leases):
            assert store.list() == [".della/tasks/1", "a/x", "a/y/z", "ab", "b"]
            assert store.list(".della/") == [".della/tasks/1"]
        assert store.list("a") == ["a/x", "a/y/z", "ab"]
        assert store.list("a/") == ["a/x", "a/y/z"]
        assert store.list("a/y/z") == ["a/y/z"]
        assert store.list("none/") == []
        assert store.children("") == (["ab", "b"], [".della", "a"])
        assert store.children("a") == (["a/x"], ["a/y"])
        assert store.children("a/y") == (["a/y/z"], [])
        assert store.children("none") == ([], [])

    def test_another_store_at_the_same_place(self, store: OutputStore) -> None:
        store.put("x", b"abc")
        other = open_output_store(store.location)
        assert other.read("x") == b"abc"
        other.put("x", b"changed")
        assert store.read("x") == b"changed"
        assert store.stat("x").size_bytes == 7
        other.delete("x")
        assert not store.exists("x")
        assert store.list() == []

    @pytest.mark.parametrize("key", ["", "/a", "a/", "../a", "a/../b", "a\0b"])
    def test_what_is_no_key(self, store: OutputStore, key: str) -> None:
        with pytest.raises(ValueError, match="is no key"):
            store.put(key, b"")

    def test_odd_names(self, store: OutputStore) -> None:
        for key in ("with space", "ünïcode/ß", "a+b=c&d", "100%25", "x" * 200):
            store.put(key, key.encode())
            assert store.read(key) == key.encode()
            assert key in store.list()

    # Writing.

    def test_create_shows_nothing_before_commit(self, store: OutputStore) -> None:
        writer = store.create("deep/er/x", 10)
        writer.write(b"01234")
        writer.write(b"")
        writer.write(np.empty((0, 3), np.uint8))
        assert store.list() == []
        writer.write(np.frombuffer(b"56789", np.uint8))
        assert not store.exists("deep/er/x")
        stat = writer.commit()
        assert store.stat("deep/er/x") == stat
        writer.abort()  # nothing to abort any more
        assert store.read("deep/er/x") == b"0123456789"
        assert store.list() == ["deep/er/x"]

    @pytest.mark.parametrize("says_size", [True, False])
    def test_large_object(self, store: OutputStore, says_size: bool) -> None:
        data = np.random.default_rng(0).integers(0, 256, LARGE_BYTES, dtype=np.uint8)
        step = 3_000_017
        buffer = np.empty(step, np.uint8)
        with store.create("x", LARGE_BYTES if says_size else None) as writer:
            for start in range(0, LARGE_BYTES, step):
                part = buffer[: min(step, LARGE_BYTES - start)]
                part[:] = data[start : start + step]
                writer.write(part)
                part[:] = 0  # the writer may not look at it any more
            assert not store.exists("x")
            stat = writer.commit()
        assert stat == store.stat("x")
        assert store.read("x") == data.tobytes()

    def test_put_replaces(self, store: OutputStore) -> None:
        first = store.put("x", b"old")
        second = store.put("x", b"new")
        assert store.read("x") == b"new"
        assert store.stat("x") == second
        assert first.version != second.version

    @pytest.mark.parametrize("size", [100, LARGE_BYTES])
    def test_abort_leaves_nothing(self, store: OutputStore, size: int) -> None:
        store.put("x", b"before")
        with store.create("x", size) as writer:
            writer.write(bytes(size // 2))
        writer.abort()
        assert store.list() == ["x"]
        assert store.read("x") == b"before"

    @pytest.mark.parametrize("written", [b"", b"abc", b"abcde"])
    def test_commit_wants_the_promised_size(self, store: OutputStore, written: bytes) -> None:
        with store.create("x", 4) as writer:
            writer.write(written)
            with pytest.raises(AssertionError, match="of 4 bytes"):
                writer.commit()
        assert store.list() == []

    def test_attempts_do_not_share_bytes(self, store: OutputStore) -> None:
        with store.create("x") as one, store.create("x") as two:
            one.write(b"one")
            two.write(b"two")
            one.commit()
            two.commit()
        assert store.read("x") == b"two"

    def test_delete_and_state(self, store: OutputStore) -> None:
        store.put("a/x", b"abc")
        store.delete("a/x")
        store.delete("a/x")
        store.delete("never/was")
        assert store.list() == []
        store.delete_state()
        assert not store.has_state()
        restore = store.remember_root()
        store.put(".della/plan.json", b"{}")
        store.put(".della/tasks/0.json", b"{}")
        store.put("keep", b"x")
        assert store.has_state()
        store.delete_state()
        assert not store.has_state()
        assert store.list() == ["keep"]
        store.delete("keep")
        restore()
        assert store.list() == []

    def test_settled_and_completed(self, store: OutputStore) -> None:
        """Wherever shards are meanwhile, everything is there in the end, and for others to see."""
        files = {f"model-{i}.safetensors": bytes(range(i, 100 + i)) * 10 for i in range(7)}
        with store.lock("me", lease=self.has_leases):
            for key, data in files.items():
                with store.create(key, len(data)) as writer:
                    writer.write(data)
                    stat = writer.commit()
                digest = hashlib.sha256(data).hexdigest()
                store.settle(key, stat, digest)
                assert store.stat(key) == stat
                assert store.known_sha256(key) in (None, digest)
                store.settle(key, stat, digest)
            store.put("config.json", b"{}")
            open_output_store(store.shards_location).put("of-a-worker", b"other process")
            assert store.read("of-a-worker") == b"other process"
            last = store.complete(MANIFEST_NAME, b"last")
            assert store.stat(MANIFEST_NAME) == last
        files |= {"of-a-worker": b"other process", "config.json": b"{}", MANIFEST_NAME: b"last"}
        for seen in (store, open_output_store(store.location)):
            assert set(files) <= set(seen.list())
            for key, data in files.items():
                assert seen.stat(key).size_bytes == len(data)
                assert seen.read(key) == data

    def test_which_names_are_taken(self, store: OutputStore) -> None:
        assert list(store.taken(["a", "b/c"])) == []
        store.put("a", b"")
        store.put("b/c", b"")
        assert list(store.taken(["a", "aa", "b/c", "b/cc", "d"])) == ["a", "b/c"]
        assert list(store.links(["a", "b/c", "d"])) == []

    def test_clear_staging(self, store: OutputStore) -> None:
        writer = store.create("x")
        writer.write(bytes(LARGE_BYTES))
        store.clear_staging()
        store.clear_staging()
        assert store.list() == []
        writer.abort()

    def test_room(self, store: OutputStore) -> None:
        free = store.free_bytes()
        assert free is None or free > 0


class StoreSuite(ObjectSuite):
    """The contract with the lease, which stores without conditional writes cannot keep."""

    def test_lease_is_exclusive_and_named(self, store: OutputStore) -> None:
        held = store.lock("pid 42 on host h")
        assert store.is_held(held.token)
        assert not store.is_held("another token")
        held.check()
        with pytest.raises(OutputError, match=r"\(pid 42 on host h; since \d+ s"):
            open_output_store(store.location).lock("me")
        held.release()
        held.release()
        with open_output_store(store.location).lock("me") as second:
            assert store.is_held(second.token)
            assert not store.is_held(held.token)

    def test_one_of_many_threads_gets_the_lease(self, store: OutputStore) -> None:
        got: list[str] = []
        ready = threading.Barrier(6)
        refused = threading.Semaphore(0)

        def run() -> None:
            ready.wait()
            try:
                with store.lock("me"):
                    for _ in range(5):
                        assert refused.acquire(timeout=30)
                got.append("lock")
            except OutputError:
                got.append("refusal")
                refused.release()

        threads = [threading.Thread(target=run) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(got) == ["lock"] + ["refusal"] * 5


class RemoteSuite(StoreSuite):
    """What stores without a kernel that keeps their locks must do besides."""

    def test_dead_holder_is_taken_over_and_notices(
        self, store: OutputStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # As if the holder were another machine's process, and hung.
        monkeypatch.setattr(lease, "ended_here", lambda process: False)
        hang = threading.Event()
        renew = lease.RemoteLease._renew

        def hanging(self: lease.RemoteLease) -> None:
            if self is held:
                hang.wait()
            renew(self)

        monkeypatch.setattr(lease.RemoteLease, "_renew", hanging)
        held = store.lock("the first")
        assert isinstance(held, lease.RemoteLease)
        with open_output_store(store.location).lock("the second") as second:
            assert store.is_held(second.token)
            assert not store.is_held(held.token)
            with pytest.raises(RunError, match="taken over by another run"):
                held.check()  # although its heartbeat has not heard of it yet
            hang.set()
            held._thread.join(10)
            with pytest.raises(RunError, match="taken over by another run"):
                held.check()
            held.release()  # takes nothing from the second
            assert store.is_held(second.token)
        assert not store.has_state()

    def test_holder_that_ended_on_this_machine(self, store: OutputStore) -> None:
        own = process_of(1)
        assert own is not None
        ended = {**own, "started": "1"}  # another process had the number then
        content = {"owner": "dead", "token": "t", "since": 0, "beat": 0, "process": ended}
        store.put(LOCK_KEY, lease._dump(content))
        with store.lock("me") as held:
            assert store.is_held(held.token)

    def test_damaged_lease_counts_as_silent(self, store: OutputStore) -> None:
        store.put(LOCK_KEY, b"no json")
        with store.lock("me") as held:
            assert store.is_held(held.token)
