"""Nobody reads what is printed: a merge that is done is done, and a lost terminal interrupts."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from della_dist.storage.manifest import MANIFEST_NAME
from tests.checkpoints import tensor
from tests.merging import config_for, run, save_family, write_config
from tests.staged import contents

ROOT = Path(__file__).parents[2]
PROGRAM = (sys.executable, "-m", "della_dist")

#: Both streams, each gone in another way. The exit status of `plan` and `verify` where stdout is
#: not read, but full, is 1: they are run for what they print.
REDIRECTIONS = {
    "stdout closed": ">&-",
    "stderr closed": "2>&-",
    "both closed": ">&- 2>&-",
    "all closed": "<&- >&- 2>&-",
    "stdout full": ">/dev/full",
    "stderr full": "2>/dev/full",
    "stdout not read": "| sleep 0",
    "both not read": "2>&1 | sleep 0",
    "both full": ">/dev/full 2>/dev/full",
}
#: Of the two streams or of all three, where each alone was tried.
COVERED = ("both closed", "stdout not read")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("family")
    base, experts = save_family(folder, num_experts=2)
    return write_config(folder / "c.yaml", config_for(base, experts, parameters={"density": 0.5}))


NUM_SHARDS = 500


@pytest.fixture(scope="module")
def long_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Many small shards: each is committed durably, which takes its time."""
    folder = tmp_path_factory.mktemp("long")
    rng = np.random.default_rng(3)
    base = {
        f"layers.{i}.weight": tensor(rng.normal(0, 0.05, (4, 8)), "BF16") for i in range(NUM_SHARDS)
    }
    merge = config_for(*save_family(folder, base, num_experts=1), parameters={"density": 0.5})
    return write_config(folder / "config.yaml", merge)


def shell(arguments: list[str], redirection: str) -> subprocess.CompletedProcess[str]:
    """Run a command of della-dist as `bash` would; its own exit status counts."""
    command = shlex.join([*PROGRAM, *arguments])
    # The reader of a pipe is gone by the time that anything is written.
    return subprocess.run(
        ["bash", "-c", f"(sleep 0.2; exec {command}) {redirection}; exit ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


@pytest.mark.parametrize("how", [how for how in REDIRECTIONS if how not in COVERED])
def test_nobody_reads(config: Path, tmp_path: Path, how: str) -> None:
    out = str(tmp_path / "out")
    redirection = REDIRECTIONS[how]
    for options in ([], ["--json"]):
        done = shell(["merge", str(config), out, *options], redirection)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "out" / MANIFEST_NAME).exists()
        if how == "stdout full":
            assert "della-dist: done, but stdout could not be written (No space" in done.stderr
        assert "Traceback" not in done.stderr
        assert "Exception ignored" not in done.stderr
    for arguments in (["plan", str(config)], ["verify", out, "--json"]):
        done = shell(arguments, redirection)
        assert done.returncode == (how in ("stdout full", "both full")), done.stderr
        if how == "stdout full":
            assert done.stderr.startswith("della-dist: stdout could not be written (No space")
            assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("how", ["both closed", "both not read", "both full"])
def test_failures_keep_their_status(config: Path, tmp_path: Path, how: str) -> None:
    for arguments, status in (
        (["merge", str(tmp_path / "none.yaml"), "out"], 2),
        (["verify", str(tmp_path)], 2),
        (["merge"], 2),
        (["mrege"], 2),
    ):
        assert shell(arguments, REDIRECTIONS[how]).returncode == status
    out = tmp_path / "out"
    assert shell(["merge", str(config), str(out)], "").returncode == 0
    with (
        (out / "config.json").open("a")
        if (out / "config.json").exists()
        else (out / "README.md").open("a") as file
    ):
        file.write("\n")
    shard = out / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\0\0")
    assert shell(["verify", str(out)], REDIRECTIONS[how]).returncode == 3


@pytest.mark.slow
def test_demo(tmp_path: Path) -> None:
    for redirection in (">&- 2>&-", ">/dev/full", "2>&1 | sleep 0"):
        done = shell(["demo", str(tmp_path / "demo")], redirection)
        assert done.returncode == 0, done.stderr


def test_no_file_gets_the_number_of_a_closed_stream(config: Path, tmp_path: Path) -> None:
    # What a library then prints to stderr would be in the weights.
    code = (
        "import os, sys\n"
        "from della_dist.cli import main\n"
        "import della_dist.runtime.run as run\n"
        "merge = run.merge\n"
        "def chatty(*arguments, **keywords):\n"
        "    descriptor = os.open(sys.argv[0], os.O_RDONLY)\n"
        "    assert descriptor > 2\n"
        "    for standard in (0, 1, 2):\n"
        "        assert os.path.samestat(os.fstat(standard), os.stat(os.devnull))\n"
        "    return merge(*arguments, **keywords)\n"
        "run.merge = chatty\n"
        "main()\n"
    )
    file = tmp_path / "chatty.py"
    file.write_text(code)
    command = shlex.join([sys.executable, str(file), "merge", str(config), str(tmp_path / "out")])
    done = subprocess.run(
        ["bash", "-c", f"{command} <&- >&- 2>&-"],
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0


def test_a_pipe_that_does_not_block(long_config: Path) -> None:
    # ssh and others leave such pipes behind. All arrives, however slowly it is read.
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    os.set_blocking(writing, False)
    process = subprocess.Popen(
        [*PROGRAM, "plan", str(long_config), "--json", "--shard-size", "1"],
        stdout=writing,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    os.close(writing)
    with process:
        time.sleep(3)
        with os.fdopen(reading, "rb") as file:
            text = file.read()
    assert process.returncode == 0
    assert len(text) > 4096
    assert text.endswith(b"}\n")


def test_names_that_are_no_unicode(config: Path, tmp_path: Path) -> None:
    out = os.fsencode(tmp_path) + b"/o\xfct"
    done = subprocess.run(
        [*PROGRAM, "merge", str(config), out],
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8:strict"},
    )
    assert done.returncode == 0, done.stderr
    assert b"/o\\udcfct" in done.stdout


def num_committed(out: Path) -> int:
    tasks = out / ".della" / "tasks"
    return len(list(tasks.iterdir())) if tasks.is_dir() else 0


def signalled(config: Path, out: Path, name: str, ignored: bool) -> tuple[int, str]:
    """Send a signal to a merge that has committed something; return its status and stderr."""
    before = num_committed(out)
    # These tests may run under nohup themselves, which a shell would not undo.
    start = f"""import runpy, signal
signal.signal(signal.{name}, signal.{"SIG_IGN" if ignored else "SIG_DFL"})
runpy.run_module("della_dist", run_name="__main__", alter_sys=True)"""
    command = [sys.executable, "-c", start, "merge", config, out, "--shard-size", "1", "--json"]
    process = subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    with process:
        while process.poll() is None and num_committed(out) <= before:
            time.sleep(0.002)
        process.send_signal(getattr(signal, name))
        _, stderr = process.communicate(timeout=120)
    return process.returncode, stderr


@pytest.mark.parametrize("name", ["SIGHUP", "SIGTERM"])
def test_signals(long_config: Path, tmp_path: Path, name: str) -> None:
    for attempt in range(10):  # a busy machine may deliver the signal too late
        out = tmp_path / f"out{attempt}"
        status, stderr = signalled(long_config, out, name, ignored=False)
        if status:
            break
    assert status == 1
    assert stderr.endswith("della-dist: interrupted; the same command continues.\n")
    assert not (out / MANIFEST_NAME).exists()
    # The lock is free, and the same command continues; ignored (nohup), the signal does nothing.
    status, stderr = signalled(long_config, out, name, ignored=True)
    assert (status, (out / MANIFEST_NAME).exists()) == (0, True), stderr


def test_a_terminal_that_goes_away(long_config: Path, tmp_path: Path) -> None:
    """Under nohup with the bar on a terminal that is closed: nothing but the bar is lost."""
    ours, theirs = os.openpty()
    out = tmp_path / "out"
    process = subprocess.Popen(
        [*PROGRAM, "merge", str(long_config), str(out), "--shard-size", "1"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm"},
        start_new_session=True,
    )
    os.close(theirs)
    with process:
        shown = b""
        while b"shards" not in shown:
            with contextlib.suppress(OSError):
                shown += os.read(ours, 4096)
            assert process.poll() is None, shown
        os.close(ours)
        assert process.wait(timeout=120) == 0
    assert (out / MANIFEST_NAME).exists()


def test_guard_leaves_streams_of_others_alone(capsys: pytest.CaptureFixture[str]) -> None:
    from della_dist.report import streams

    before = (sys.stdout, sys.stderr)
    streams.guard()
    assert (sys.stdout, sys.stderr) == before
    assert streams.lost_output() is None


def test_same_output_whether_read_or_not(config: Path, tmp_path: Path) -> None:
    from della_dist.config import load_config

    assert shell(["merge", str(config), str(tmp_path / "a")], ">&- 2>&-").returncode == 0
    run(load_config(config), tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
