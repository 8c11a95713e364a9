"""A full disk stops a run with one clear paragraph, and the same command continues it.

Also: an output on which another driver is working is left alone.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from della_dist.cli import main
from della_dist.config import load_config
from della_dist.errors import OutputError
from della_dist.runtime.open_plan import open_plan
from della_dist.runtime.output.commit import SLACK_BYTES, Output
from della_dist.runtime.output.existing import open_output
from della_dist.storage.local.store import LocalStore
from della_dist.storage.manifest import MANIFEST_NAME
from tests.checkpoints import tensor
from tests.merging import assert_paragraph, config_for, run, save_family, write_config

MIB = 1 << 20
NUM_TENSORS = 6
TENSOR_BYTES = MIB // 4
OPTIONS = ("--shard-size", "256KiB", "--workers", "1", "--quiet", "--json")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the configuration of a merge whose output is six shards of 256 KiB."""
    folder = tmp_path_factory.mktemp("family")
    rng = np.random.default_rng(0)
    shape = (512, TENSOR_BYTES // 1024)  # two bytes each
    base = {
        f"layers.{i}.weight": tensor(rng.normal(0, 0.05, shape), "BF16") for i in range(NUM_TENSORS)
    }
    config = config_for(*save_family(folder, base, num_experts=2), parameters={"density": 0.5})
    return write_config(folder / "config.yaml", config)


@pytest.fixture(scope="module")
def digest(config: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return run(load_config(config), tmp_path_factory.mktemp("elsewhere") / "out").model_digest


class Disk:
    """A small file system in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", "size=16m", "della-test", str(path)]
        mount = shutil.which("mount")
        if mount is None:
            pytest.skip("there is no mount command to make a small disk with")
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")

    @property
    def free_bytes(self) -> int:
        result = os.statvfs(self.path)
        return result.f_bavail * result.f_frsize

    def resize(self, size_bytes: int) -> None:
        options = f"remount,size={size_bytes}"
        subprocess.run(["mount", "-o", options, str(self.path)], check=True)

    def fill(self, *, but_bytes: int) -> None:
        """Take all room but so much."""
        with (self.path / "filler").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, self.free_bytes - but_bytes)

    def unmount(self) -> None:
        subprocess.run(["umount", str(self.path)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    disk = Disk(tmp_path / "disk")
    yield disk
    disk.unmount()


def merge(config: Path, out: Path, *options: str) -> Result:
    result = CliRunner().invoke(main, ["merge", str(config), str(out), *OPTIONS, *options])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def summary_of(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.stderr
    summary = json.loads(result.stdout)
    assert isinstance(summary, dict)
    return summary


def num_committed(out: Path) -> int:
    return len(list((out / ".della" / "tasks").glob("*.json")))


def assert_unfinished(out: Path) -> None:
    names = {p.name for p in out.iterdir()}
    assert MANIFEST_NAME not in names
    assert "model.safetensors.index.json" not in names
    assert ".della" in names
    shards = {n for n in names if n.endswith(".safetensors")}
    assert len(shards) == num_committed(out) < NUM_TENSORS


def test_too_small_at_the_start(config: Path, digest: str, disk: Disk) -> None:
    out = disk.path / "out"
    needed = NUM_TENSORS * TENSOR_BYTES + SLACK_BYTES
    disk.resize(needed - MIB)
    free = disk.free_bytes
    assert free < needed
    for command in ("merge", "plan"):
        options = OPTIONS[:4] if command == "plan" else OPTIONS
        result = CliRunner().invoke(main, [command, str(config), str(out), *options])
        assert_paragraph(result, 1, str(out), str(free), str(needed), "Make room")
        assert list(disk.path.iterdir()) == []
    disk.resize(needed + MIB)
    assert summary_of(merge(config, out))["model_digest"] == digest


@pytest.mark.parametrize("room_bytes", [0, 100_000, TENSOR_BYTES + 100_000])
def test_full_in_mid_run(
    config: Path, digest: str, disk: Disk, room_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = disk.path / "out"
    disk.resize(32 * MIB)
    commit = Output.commit

    def commit_and_fill(self: Output, record: Any) -> None:
        commit(self, record)
        if len(self.committed) == 2:
            disk.fill(but_bytes=room_bytes)

    with monkeypatch.context() as patch:
        patch.setattr(Output, "commit", commit_and_fill)
        result = merge(config, out)
    assert_paragraph(result, 1, str(out), "No space left", "same command again", "bytes")
    assert_unfinished(out)
    committed = num_committed(out)
    assert committed == 2 + room_bytes // TENSOR_BYTES
    assert list((out / ".della" / "tmp").iterdir()) == []

    # Still full: the same again, and nothing is lost.
    result = merge(config, out)
    assert_paragraph(result, 1, str(out), "Make room", "bytes")
    assert num_committed(out) == committed

    disk.resize(64 * MIB)
    summary = summary_of(merge(config, out))
    assert summary["tasks_resumed"] == committed
    assert summary["bytes_written"] == (NUM_TENSORS - committed) * TENSOR_BYTES
    assert summary["model_digest"] == digest
    assert not (out / ".della").exists()
    assert CliRunner().invoke(main, ["verify", str(out)]).exit_code == 0


def test_full_when_the_last_files_are_written(
    config: Path, digest: str, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = disk.path / "out"
    disk.resize(32 * MIB)
    finish = Output.finish

    def fill_and_finish(self: Output, *how: Any) -> dict[str, Any]:
        disk.fill(but_bytes=0)
        return finish(self, *how)

    with monkeypatch.context() as patch:
        patch.setattr(Output, "finish", fill_and_finish)
        result = merge(config, out)
    assert_paragraph(result, 1, str(out), "No space left", "same command again", "bytes")
    assert not (out / MANIFEST_NAME).exists()
    assert num_committed(out) == NUM_TENSORS
    (disk.path / "filler").unlink()
    summary = summary_of(merge(config, out))
    assert summary["tasks_resumed"] == NUM_TENSORS
    assert (summary["bytes_read"], summary["bytes_written"]) == (0, 0)
    assert summary["model_digest"] == digest


#: A merge that stops after its first steps, until its standard input is closed.
DRIVER = """
import sys
from della_dist.config import load_config
from della_dist.runtime.options import RunOptions
from della_dist.runtime.run import merge

def wait(goal, snapshot):
    print("working", flush=True)
    sys.stdin.read()

options = RunOptions(device="cpu", shard_bytes=1 << 18, workers=1)
print(merge(load_config(sys.argv[1]), sys.argv[2], options, watch=wait).model_digest)
"""


@pytest.fixture
def driver(config: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a merge into `tmp_path` / out in another process, and hold it in mid-run."""
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(config), str(tmp_path / "out")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "working\n"
        yield process
        process.kill()


@pytest.mark.parametrize("option", ["--quiet", "--restart"])
def test_second_driver_is_refused(
    driver: subprocess.Popen[str], option: str, config: Path, digest: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert before
    result = merge(config, out, option)
    assert_paragraph(result, 2, str(out), f"pid {driver.pid}", "another run")
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    output, _ = driver.communicate(timeout=60)
    assert driver.returncode == 0
    assert output == f"{digest}\n"


@pytest.mark.parametrize("leaves", ["finished", "unfinished"])
def test_output_that_another_run_used_in_the_meantime(
    config: Path, tmp_path: Path, leaves: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Between the look at the output and the lock: two merges that are started at once.
    out = tmp_path / "out"
    mine = open_output(str(out), open_plan(load_config(config)), restart=False)
    assert isinstance(mine, Output)
    with monkeypatch.context() as patch:
        if leaves == "unfinished":
            patch.setattr(Output, "finish", lambda *_: 1 / 0)
        arguments = ["merge", str(config), str(out), "--seed", "8", *OPTIONS]
        CliRunner().invoke(main, arguments)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name != "lock"}
    assert len(before) > NUM_TENSORS
    with pytest.raises(OutputError, match="by another run just now"):
        mine.begin()
    mine.close()
    after = {p: p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name != "lock"}
    assert after == before
    with LocalStore(out).lock("somebody else"):
        pass


def test_lock_of_a_killed_driver_is_free(
    driver: subprocess.Popen[str], config: Path, digest: str, tmp_path: Path
) -> None:
    driver.kill()
    driver.wait()
    assert summary_of(merge(config, tmp_path / "out"))["model_digest"] == digest


def test_lock_is_free_after_a_failure(config: Path, tmp_path: Path) -> None:
    # Within one process: a notebook that merges again.
    out = tmp_path / "out"

    def fail(goal: Any, snapshot: Any) -> None:
        raise RuntimeError

    from della_dist.runtime.options import RunOptions
    from della_dist.runtime.run import merge as run_merge

    with pytest.raises(RuntimeError):
        run_merge(load_config(config), str(out), RunOptions(device="cpu"), watch=fail)
    with LocalStore(out).lock("mine"):
        pass
