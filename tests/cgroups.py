"""Processes in a control group of their own, whose memory the kernel counts and limits."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.servers.processes import ROOT

_CONTROLLER = Path("/sys/fs/cgroup/memory")
_numbers = itertools.count()


@dataclass(frozen=True)
class MemoryGroup:
    """A group of processes; what goes beyond its limit is killed."""

    folder: Path

    def run(self, command: Sequence[str], env: Mapping[str, str], timeout_s: float) -> str:
        """Run a command in the group and return its standard output.

        Raises
        ------
        subprocess.CalledProcessError
            It failed, or was killed for its memory (return code -9).
        """
        enter = f'echo $$ > {self.folder}/cgroup.procs && exec "$@"'
        return subprocess.run(
            ["sh", "-c", enter, "sh", *command],
            env={**os.environ, **env},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            timeout=timeout_s,
        ).stdout

    @property
    def peak_bytes(self) -> int:
        """The most that the group used so far: resident memory, page cache and the kernel's."""
        return int((self.folder / "memory.max_usage_in_bytes").read_text())


@contextmanager
def memory_group(limit_bytes: int | None = None) -> Iterator[MemoryGroup]:
    """Make a control group; skip the test where that is not possible."""
    found = re.search(r":memory:(.*)", Path("/proc/self/cgroup").read_text())
    if found is None or not _CONTROLLER.is_dir():
        pytest.skip("no memory controller of cgroup v1 here")
    parent = _CONTROLLER / found[1].strip("/")
    folder = parent / f"della-test-{os.getpid()}-{next(_numbers)}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"may not make control groups: {error}")
    try:
        if limit_bytes is not None:
            (folder / "memory.limit_in_bytes").write_text(str(limit_bytes))
        yield MemoryGroup(folder)
    finally:
        folder.rmdir()
