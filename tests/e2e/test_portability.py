"""What only Linux has is used where it is, and missed by nobody: the same bytes without it."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from della_dist.storage import libc
from della_dist.storage.local.mapped import MappedReader, stat_of
from della_dist.storage.local.staged import StagedWriter
from tests.merging import config_for, save_family, write_config
from tests.staged import contents

ROOT = Path(__file__).parents[2]

#: Run before anything else: takes away what macOS and other systems do not have.
ELSEWHERE = """
import mmap, os, resource, signal, sys

for module, names in (
    (os, ["sched_getaffinity", "sched_setaffinity", "posix_fallocate", "posix_fadvise",
          "copy_file_range", "sendfile", "memfd_create", "pidfd_open", "eventfd", "splice"]),
    (mmap, ["MADV_" + n for n in ("WILLNEED", "DONTNEED", "SEQUENTIAL", "POPULATE_READ")]),
):
    for name in names:
        if hasattr(module, name):
            delattr(module, name)
for module, prefix in ((os, "POSIX_FADV_"), (os, "SCHED_"), (mmap, "MAP_POPULATE"), (os, "MFD_")):
    for name in [n for n in dir(module) if n.startswith(prefix)]:
        delattr(module, name)

GONE = {"madvise", "sync_file_range", "mallopt", "malloc_trim", "syscall", "prctl", "gettid"}

def refuse(event, arguments):
    if event == "open" and str(arguments[0]).startswith(("/proc", "/sys")):
        raise FileNotFoundError(2, "No such file or directory", str(arguments[0]))
    if event == "os.readlink" and os.fsdecode(arguments[0]).startswith("/proc"):
        raise FileNotFoundError(2, "No such file or directory", str(arguments[0]))
    if event == "ctypes.dlsym" and arguments[1] in GONE:
        raise AttributeError(arguments[1])

sys.addaudithook(refuse)
"""


def commands(
    config: Path, out: Path, folder: Path | None
) -> tuple[dict[str, object], dict[str, object]]:
    """Merge, verify and plan in processes of their own; return what merge and plan say."""
    path = str(ROOT) if folder is None else f"{folder}{os.pathsep}{ROOT}"

    def run(*arguments: str) -> dict[str, object]:
        done = subprocess.run(
            [sys.executable, "-m", "della_dist", *arguments, "--json"],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": path},
        )
        assert done.returncode == 0, done.stderr
        answer: dict[str, object] = json.loads(done.stdout)
        return answer

    merged = run("merge", str(config), str(out), "--shard-size", "200kB")
    verified = run("verify", str(out), "--recompute", "3")
    assert verified["model_digest"] == merged["model_digest"]
    return merged, run("plan", str(config), str(out), "--shard-size", "200kB")


def test_without_what_only_linux_has(tmp_path: Path) -> None:
    base, experts = save_family(tmp_path, num_experts=2, num_shards=2)
    path = write_config(tmp_path / "c.yaml", config_for(base, experts, parameters={"density": 0.5}))
    shim = tmp_path / "shim"
    shim.mkdir()
    (shim / "sitecustomize.py").write_text(ELSEWHERE)
    proof = "import os; print(hasattr(os, 'sched_getaffinity')); open('/proc/self/status')"
    gone = subprocess.run(
        [sys.executable, "-c", proof],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(shim)},
    )
    assert gone.stdout == "False\n"
    assert "FileNotFoundError" in gone.stderr
    here, planned_here = commands(path, tmp_path / "here", None)
    there, planned_there = commands(path, tmp_path / "there", shim)
    for key in ("model_digest", "num_tensors", "num_tasks", "bytes_read", "bytes_written"):
        assert there[key] == here[key]
    assert 10 << 20 < int(str(there["peak_rss_bytes"])) < 64 << 30
    assert planned_there["complete"] is planned_here["complete"] is True
    assert contents(tmp_path / "there") == contents(tmp_path / "here")


def test_full_fsync_where_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    synced: list[int] = []
    (tmp_path / ".della/tmp").mkdir(parents=True)
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr("della_dist.storage.libc.os.fsync", synced.append)
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "fcntl", lambda descriptor, command: asked.append(command))
        with StagedWriter(tmp_path, "final", 1) as writer:
            writer.write(b"x")
            writer.commit()
    assert set(asked) == {51}
    assert (len(asked), synced) == (2, [])  # the file, and the directory that names it
    # This kernel does not know the command, as some file systems of macOS do not: fsync then.
    with (tmp_path / "final").open("rb") as file:
        libc.make_durable(file.fileno())
        assert synced == [file.fileno()]


@pytest.mark.parametrize("missing", ["MADV_WILLNEED", "MADV_DONTNEED"])
def test_advice_that_the_system_does_not_know(
    tmp_path: Path, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(f"mmap.{missing}")
    (tmp_path / "file").write_bytes(bytes(range(256)) * 1024)
    with (tmp_path / "file").open("rb") as file:
        stat = stat_of(os.fstat(file.fileno()))
        reader = MappedReader(file.fileno(), stat, "file")
    with reader:
        reader.prefetch(0, 1 << 18)
        assert bytes(reader.view(256, 260)) == b"\0\1\2\3"
        reader.release(0, 1 << 18)


def test_systems_without_hangup(tmp_path: Path) -> None:
    code = (
        "import signal, sys\n"
        "del signal.SIGHUP\n"
        "sys.argv[1:] = ['verify', sys.argv[1]]\n"
        "from della_dist.cli import main\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
