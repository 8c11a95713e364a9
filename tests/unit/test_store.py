"""The store over a directory: exact reads, and writes that are there whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from della_dist.errors import OutputError, StorageError
from della_dist.storage import libc
from della_dist.storage.local import staged
from della_dist.storage.local.staged import StagedWriter
from della_dist.storage.local.store import LocalStore
from della_dist.storage.store import check_key


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "out")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 4 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(path)],
        capture_output=True,
        check=False,
    )
    if done.returncode:
        pytest.skip("this user may not mount")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def everything(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def test_folders_that_deleting_empties_go_away(store: LocalStore) -> None:
    for key in ("a/b/x", "a/b/y", "a/z"):
        store.put(key, b"")
    store.delete("a/b/x")
    assert everything(store.root) == ["a/b/y", "a/z"]
    store.delete("a/b/y")
    assert not (store.root / "a/b").exists()
    store.delete("a/z")
    assert not (store.root / "a").exists()
    assert store.root.is_dir()


# Reading.


def test_short_reads_are_continued(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put("x", bytes(range(100)))
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, count, at: pread(fd, min(count, 7), at))
    assert store.read("x", 1, 99) == bytes(range(1, 99))


@pytest.mark.parametrize("method", ["stat", "read", "open_reader"])
def test_what_is_no_file(store: LocalStore, method: str) -> None:
    (store.root / "folder").mkdir(parents=True)
    os.mkfifo(store.root / "fifo")
    call = getattr(store, method)
    with pytest.raises(StorageError, match="missing failed: No such file"):
        call("missing")
    for key in ("folder", "fifo"):  # a FIFO without a writer would block an open for ever
        with pytest.raises(StorageError, match="not a regular file"):
            call(key)
        assert not store.exists(key)


def test_advice_beyond_the_end(store: LocalStore) -> None:
    data = np.random.default_rng(0).integers(0, 256, 100_000, dtype=np.uint8)
    store.put("x", data.tobytes())
    with store.open_reader("x") as reader:
        view = reader.view(5000, 90_000)
        reader.prefetch(0, 100_000)
        reader.prefetch(99_999, 10**9)
        reader.prefetch(10**9, 2 * 10**9)
        reader.release(99_999, 10**9)
        reader.release(10**9, 2 * 10**9)
        reader.release(5001, 89_999)
        reader.release(3, 3)
        np.testing.assert_array_equal(view, data[5000:90_000])
    reader.release(0, 1)  # closed: harmless


def test_empty_file_can_be_mapped(store: LocalStore) -> None:
    store.put("x", b"")
    with store.open_reader("x") as reader:
        assert reader.view(0, 0).shape == (0,)
        reader.prefetch(0, 0)
        reader.release(0, 10)


def resident_bytes() -> int:
    """Return the pages of files that this process has mapped in."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssFile:")[1].split()[0]) * 1024


def test_released_pages_are_not_resident(store: LocalStore) -> None:
    size = 64 << 20
    store.put("x", bytes(size))
    with store.open_reader("x") as reader:
        before = resident_bytes()
        step = 1_000_003  # no multiple of a page: neighbours share one
        peak = 0
        for start in range(0, size, step):
            stop = min(start + step, size)
            assert not reader.view(start, stop).any()
            peak = max(peak, resident_bytes() - before)
            reader.release(start, stop)
        assert peak < 8 << 20
        assert resident_bytes() - before < 1 << 20


def test_descriptors_are_given_back(store: LocalStore) -> None:
    store.put("x", b"abc")
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for _ in range(10):
        reader = store.open_reader("x")
        view = reader.view(0, 3)
        reader.close()
        del view, reader
        store.read("x")
        store.put("y", b"")
        store.create("z").abort()
        store.lock("me").release()
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


# Names.


def test_what_is_not_listed(store: LocalStore) -> None:
    for key in ("b", ".della/tasks/1", ".della/lock", ".della/tmp/q"):
        path = store.root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (store.root / "dangling").symlink_to("nowhere")
    (store.root / "link").symlink_to("b")
    (store.root / "loop").symlink_to(".", target_is_directory=True)
    os.mkfifo(store.root / "fifo")
    assert store.list() == [".della/tasks/1", "b", "link"]


@pytest.mark.parametrize("key", ["", "/a", "a/", "a//b", "../a", "a/../b", ".", "a/./b", "a\0b"])
def test_what_is_no_key(store: LocalStore, key: str) -> None:
    with pytest.raises(ValueError, match="is no key"):
        check_key(key)
    with pytest.raises(ValueError, match="is no key"):
        store.put(key, b"")


# Writing.


def test_committed_files_lie_under_their_names_alone(store: LocalStore) -> None:
    writer = store.create("deep/er/x", 10)
    writer.write(b"0123456789")
    writer.commit()
    assert everything(store.root) == ["deep/er/x"]


def test_abort_leaves_nothing(store: LocalStore) -> None:
    with store.create("x", 100) as writer:
        writer.write(b"abc")
    assert everything(store.root) == []
    writer.abort()
    with pytest.raises(TypeError, match="contiguous"), store.create("x") as writer:
        writer.write(np.zeros((4, 4), np.uint8)[:, 1])  # not contiguous
    assert everything(store.root) == []


def test_short_writes_are_continued(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:7]))
    store.put("x", bytes(range(100)))
    assert store.read("x") == bytes(range(100))


@pytest.mark.parametrize("has_write_back", [True, False])
def test_large_write(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch, has_write_back: bool
) -> None:
    if not has_write_back:
        monkeypatch.setattr(libc, "sync_file_range", None)
    data = np.random.default_rng(0).integers(0, 256, 3_000_001, dtype=np.uint8)
    bounds = {"write_back_bytes": 1 << 16, "lag_bytes": 1 << 18}
    with StagedWriter(store.root, "x", data.nbytes, **bounds) as writer:
        for start in range(0, data.nbytes, 99_991):
            writer.write(data[start : start + 99_991])
        writer.commit()
    assert store.read("x") == data.tobytes()


def test_size_is_reserved_at_once(store: LocalStore) -> None:
    with store.create("x", 1 << 20):
        (path,) = (store.root / ".della/tmp").iterdir()
        assert path.stat().st_blocks * 512 >= 1 << 20


def test_full_disk_fails_at_once_where_the_size_is_known(small_disk: Path) -> None:
    store = LocalStore(small_disk / "out")
    with pytest.raises(StorageError, match=r"reserving room for .*big failed: No space") as caught:
        store.create("big", 10_000_000)
    assert "10,000,000 bytes" in str(caught.value)
    assert "run the same command again" in str(caught.value)
    assert everything(small_disk) == []
    store.put("small", b"there is room again")


def test_full_disk_while_writing(small_disk: Path) -> None:
    store = LocalStore(small_disk)
    store.put("x", b"before")
    with store.create("x") as writer, pytest.raises(StorageError, match=r"writing .*No space"):
        writer.write(bytes(10 << 20))
    assert everything(small_disk) == ["x"]
    assert store.read("x") == b"before"
    assert store.free_bytes() > 3 << 20


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", ["write", "fsync", "posix_fallocate"])
def test_failing_device(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    store.put("x", b"before")

    def fail(*_: Any) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(StorageError, match=os.strerror(code)):
        store.put("x", b"after")
    monkeypatch.undo()
    assert everything(store.root) == ["x"]
    assert store.read("x") == b"before"


def test_file_systems_that_cannot_reserve(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", fail)
    store.put("x", b"abc")
    assert store.read("x") == b"abc"


def test_long_names(store: LocalStore) -> None:
    key = "n" * 250
    store.put(key, b"abc")
    assert store.list() == [key]
    umlauts = "ü" * 120
    store.put(umlauts, b"abc")
    assert store.exists(umlauts)


def test_what_is_staged_is_cleared(store: LocalStore) -> None:
    store.clear_staging()
    writer = store.create("y")
    store.clear_staging()
    store.clear_staging()
    with pytest.raises(StorageError, match="committing"):
        writer.commit()
    assert everything(store.root) == []


def test_free_bytes_of_what_is_not_there_yet(tmp_path: Path) -> None:
    assert LocalStore(tmp_path / "a/b/c").free_bytes() > 0


# The lock.

HOLDER = """
import sys, time
from della_dist.storage.local.store import LocalStore
lock = LocalStore(sys.argv[1]).lock("process 42 on host h")
print("locked", flush=True)
time.sleep(60)
"""


def test_lock_shows_its_holder_and_ends_with_it(store: LocalStore) -> None:
    command = [sys.executable, "-c", HOLDER, str(store.root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(OutputError, match=r"process 42 on host h; since \d+ s"):
            store.lock("me")
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with store.lock("me"), pytest.raises(OutputError, match=r"\(me; since"):
        store.lock("you")
    with store.lock("a shorter text") as lock:
        assert (store.root / ".della/lock").read_text() == f"a shorter text\n{lock.token}\n"


def test_lock_leaves_nothing_behind(store: LocalStore) -> None:
    store.lock("me").release()
    assert list(store.root.iterdir()) == []
    store.put("x", b"")
    with store.lock("me"):
        store.put(".della/plan.json", b"{}")
    assert everything(store.root) == [".della/plan.json", "x"]


def test_lock_that_is_released_late_takes_nothing_from_the_next(store: LocalStore) -> None:
    first = store.lock("first")
    store.delete_state()
    with store.lock("second") as second:
        first.release()
        assert store.is_held(second.token)


def test_lock_of_what_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be used as output"):
        LocalStore(tmp_path / "file").lock("me")


def test_lock_that_went_away_with_its_run(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run ends between the newcomer's opening of the lock's file and its taking of the lock."""
    first = store.lock("first")
    flock = fcntl.flock

    def end_first(descriptor: int, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        store.delete_state()
        first.release()
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", end_first)
    with store.lock("second") as second:
        assert store.is_held(second.token)
        with pytest.raises(OutputError, match=r"\(second; since"):
            store.lock("third")


def test_state_is_removed_while_workers_write_there(store: LocalStore) -> None:
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            # The directory goes away.
            with contextlib.suppress(StorageError), store.create("x") as writer:
                writer.write(b"abc")

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for i in range(200):
            (store.clear_staging if i % 2 else store.delete_state)()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    store.delete_state()
    assert not store.root.exists()


def test_one_of_many_threads_gets_the_lock(store: LocalStore) -> None:
    got: list[str] = []

    def run() -> None:
        try:
            with store.lock("me"):
                time.sleep(0.2)
            got.append("lock")
        except OutputError:
            got.append("refusal")

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == ["lock"] + ["refusal"] * 7


def test_an_interrupt_closes_no_descriptor_twice(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may come between any two lines; the number may be another thread's file by then."""
    store.put("folder/inner/object", b"first")
    close, failed = os.close, []

    def watched_close(descriptor: int) -> None:
        try:
            close(descriptor)
        except OSError:
            failed.append(descriptor)
            raise

    monkeypatch.setattr(os, "close", watched_close)
    ours = str(Path(staged.__file__).parent)
    num_lines = interrupted_at = 0

    def trace(frame: Any, event: str, _: object) -> Any:
        nonlocal num_lines
        if not frame.f_code.co_filename.startswith(ours):
            return None
        num_lines += event == "line"
        if num_lines == interrupted_at:
            num_lines += 1
            raise KeyboardInterrupt
        return trace

    for number in range(1, 1000):
        num_lines, interrupted_at = 0, number
        sys.settrace(trace)
        try:
            store.put("folder/inner/object", b"second")
        except KeyboardInterrupt:
            pass
        else:
            break
        finally:
            sys.settrace(None)
    assert 30 < interrupted_at < 999
    assert failed == []
    assert store.read("folder/inner/object") == b"second"
