"""Child processes that end with the test, however the test ends."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def tied(command: Sequence[str]) -> list[str]:
    """Return `command` such that the kernel kills it when the thread that started it ends.

    setpriv sets PR_SET_PDEATHSIG and executes the command in its own place (the same pid).
    A `preexec_fn` would do so too, but may deadlock where the parent has threads.
    """
    return ["setpriv", "--pdeathsig", "KILL", *command]


@contextmanager
def running(
    command: Sequence[str],
    log: Path,
    *,
    env: Mapping[str, str] | None = None,
    stop_signal: signal.Signals = signal.SIGKILL,
) -> Iterator[subprocess.Popen[bytes]]:
    """Run `command` with its output in `log`; end it at exit, by force after a second."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            tied(command),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=env,
            cwd=ROOT,
        )
    try:
        yield process
    finally:
        stop(process, stop_signal)


def stop(process: subprocess.Popen[Any], stop_signal: signal.Signals = signal.SIGKILL) -> None:
    """End and reap one process."""
    process.send_signal(stop_signal)
    try:
        process.wait(1)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def wait_for_line(
    process: subprocess.Popen[bytes], log: Path, pattern: str, timeout_s: float = 30
) -> re.Match[str]:
    """Return the first match of `pattern` in the log of a starting process.

    Raises
    ------
    RuntimeError
        The process ended, or the time did; the message ends with the log.
    """
    deadline_s = time.monotonic() + timeout_s
    while True:
        alive = process.poll() is None
        text = log.read_text(errors="replace")
        if found := re.search(pattern, text):
            return found
        if not alive or time.monotonic() > deadline_s:
            why = "did not say so in time" if alive else f"ended with {process.returncode}"
            raise RuntimeError(f"{process.args!r} {why}; its log ends:\n{text[-3000:]}")
        time.sleep(0.02)


def need_programs(*programs: str, get: str) -> None:
    """Skip the test where a program is missing, and say by which command one gets it."""
    missing = [p for p in programs if shutil.which(p) is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)} here: {get}")
