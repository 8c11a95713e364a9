"""Mapped files that are cut short: each in a process of its own, which a mistake would kill."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from della_dist.storage.local import bus_errors

pytestmark = pytest.mark.skipif(
    not bus_errors._IS_SUPPORTED, reason="bus errors are not handled on this system"
)

SETUP = """
import faulthandler, hashlib, mmap, os, sys, threading
from pathlib import Path
import numpy as np
from della_dist.errors import StorageError
from della_dist.storage.local.bus_errors import survived
from della_dist.storage.local.store import LocalStore

MIB = 1 << 20
store = LocalStore(sys.argv[1])

def reader(name, size=4 * MIB):
    store.put(name, np.full(size, 7, np.uint8).tobytes())
    return store.open_reader(name)

def cut(name, size=MIB):
    os.truncate(store.path(name), size)

def fails(found):
    try:
        found.release(0, 1)
    except StorageError as error:
        assert str(store.path("x"))[:-1] in str(error), error
        assert "cut short" in str(error)
        return True
    return False
"""


def python(folder: Path, script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SETUP + script, str(folder)],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )


def assert_passes(folder: Path, script: str) -> None:
    done = python(folder, script)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_zeros_in_the_place_of_what_is_gone(tmp_path: Path) -> None:
    assert_passes(
        tmp_path,
        """
with survived():
    found = reader("x")
    assert not fails(found)
    cut("x")
    view = found.view(0, 4 * MIB)
    assert int(view[:MIB].sum()) == 7 * MIB
    assert not fails(found)  # nothing was missed yet
    assert int(view.sum()) == 7 * MIB
    assert fails(found)
    assert fails(found)
    # The reader of another file, perhaps at the same place, is whole.
    found.close()
    del found, view
    assert not fails(reader("y"))
""",
    )


def test_from_many_threads_with_and_without_the_lock_of_python(tmp_path: Path) -> None:
    assert_passes(
        tmp_path,
        """
readers = [reader(f"{i}") for i in range(8)]
wrong = []
def look(number):
    view = readers[number % 8].view(0, 4 * MIB)
    try:
        if number < 8:
            hashlib.sha256(view).digest()  # without
        else:
            np.array(view)
    except BaseException as error:
        wrong.append(error)
with survived():
    for i in range(8):
        cut(f"{i}", 5000 * i)
    threads = [threading.Thread(target=look, args=(i,)) for i in range(16)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert not wrong
    for found in readers:
        try:
            found.release(0, 1)
        except StorageError:
            continue
        raise AssertionError
""",
    )


def test_nested_and_after(tmp_path: Path) -> None:
    script = """
with survived():
    with survived():
        pass
    found = reader("x")
    cut("x")
    assert int(found.view(2 * MIB, 3 * MIB).sum()) == 0
    assert fails(found)
found = reader("y")
cut("y")
print("so far", flush=True)
found.view(2 * MIB, 3 * MIB).sum()
"""
    done = python(tmp_path, script)
    assert done.stdout == "so far\n"
    assert done.returncode == -signal.SIGBUS


@pytest.mark.parametrize("has_handler", [False, True])
def test_mapping_of_somebody_else(tmp_path: Path, has_handler: bool) -> None:
    script = f"""
if {has_handler}:
    faulthandler.enable()
(store.root / "x").write_bytes(bytes(4 * MIB))
with survived(), open(store.root / "x", "rb") as file:
    mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    cut("x")
    mapping[2 * MIB]
"""
    done = python(tmp_path, script)
    assert done.returncode == -signal.SIGBUS
    assert ("Bus error" in done.stderr) == has_handler
