"""Hosts with addresses of their own on one machine: network namespaces at a bridge (needs root).

    test process, 10.77.x.1 ---- bridge ---- veth pair ---- host 0, 10.77.x.10
                                        `--- veth pair ---- host 1, 10.77.x.11

Hosts reach each other and the test process, and nothing else.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.servers.processes import ROOT, need_programs, tied

_numbers = itertools.count()


@dataclass(frozen=True)
class Host:
    """A host: commands run there from the repository's root."""

    address: str
    namespace: str
    holder: subprocess.Popen[bytes]

    @property
    def prefix(self) -> tuple[str, ...]:
        """What runs a command on this host when put before it."""
        target = str(self.holder.pid)
        return ("nsenter", "--target", target, "--net", "--mount", "env", f"--chdir={ROOT}")

    def popen(
        self, command: Sequence[str], *, env: Mapping[str, str] | None = None, **how: Any
    ) -> subprocess.Popen[bytes]:
        """Start a command, with `env` added to the environment; it ends with the network."""
        return subprocess.Popen(
            tied([*self.prefix, *command]), env={**os.environ, **(env or {})}, **how
        )

    def run(
        self, command: Sequence[str], *, env: Mapping[str, str] | None = None, timeout_s: float = 60
    ) -> str:
        """Run a command and return its standard output; standard error goes to the test's.

        Raises
        ------
        subprocess.CalledProcessError
            The command failed.
        """
        # To a file: a daemon that the command leaves behind would keep a pipe open.
        with tempfile.TemporaryFile() as output:
            subprocess.run(
                [*self.prefix, *command],
                env={**os.environ, **(env or {})},
                stdout=output,
                timeout=timeout_s,
                check=True,
            )
            output.seek(0)
            return output.read().decode()

    def cut(self) -> None:
        """Take the host off the network: packets to and from it are lost without a word."""
        _ip("link", "set", self.namespace, "down")

    def heal(self) -> None:
        """Undo `cut`."""
        _ip("link", "set", self.namespace, "up")


@dataclass(frozen=True)
class Network:
    """A network of hosts; `address` is the test process's own in it."""

    address: str
    hosts: list[Host]


@contextmanager
def network(num_hosts: int, *, private: Sequence[Path | str] = ()) -> Iterator[Network]:
    """Make a network; at the end all processes on its hosts are killed.

    Parameters
    ----------
    num_hosts
        How many hosts.
    private
        Existing folders that each host has for itself, empty, in memory.
    """
    need_programs("ip", "nsenter", "mount", get="apt-get install iproute2 util-linux")
    # Interface names have at most 15 characters.
    name = f"dd{os.getpid():x}-{next(_numbers)}"
    try:
        _ip("link", "add", name, "type", "bridge")
        _ip("netns", "add", f"{name}.0")
    except subprocess.CalledProcessError as e:
        _remove(name)
        pytest.skip(f"may not make network namespaces: {e.stderr.strip()}")
    # The cleaner is a process of its own that outlives a killed test.
    cleaner = subprocess.Popen(
        [sys.executable, "-m", "tests.servers.namespaces", name],
        stdin=subprocess.PIPE,
        cwd=ROOT,
        start_new_session=True,
    )
    hosts: list[Host] = []
    try:
        subnet = _free_subnet()
        _ip("addr", "add", f"{subnet}.1/24", "dev", name)
        _ip("link", "set", name, "up")
        hosts.extend(_add_host(name, subnet, i, private) for i in range(num_hosts))
        yield Network(f"{subnet}.1", hosts)
    finally:
        cleaner.communicate()
        for host in hosts:
            host.holder.wait()


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


def _free_subnet() -> str:
    used = _ip("-4", "-o", "addr")
    candidates = (f"10.77.{(os.getpid() + i) % 256}" for i in range(256))
    return next(s for s in candidates if f" {s}." not in used)


def _add_host(name: str, subnet: str, index: int, private: Sequence[Path | str]) -> Host:
    namespace = f"{name}.{index}"
    address = f"{subnet}.{10 + index}"
    if index:
        _ip("netns", "add", namespace)
    _ip(
        *("link", "add", namespace, "type", "veth"),
        *("peer", "name", "eth0", "netns", namespace),
    )
    _ip("link", "set", namespace, "master", name, "up")
    inside = ("-n", namespace)
    _ip(*inside, "addr", "add", f"{address}/24", "dev", "eth0")
    _ip(*inside, "link", "set", "eth0", "up")
    _ip(*inside, "link", "set", "lo", "up")
    # `ip netns exec` gives each command a mount namespace of its own; a process that stays keeps
    # one for all commands of the host, and nsenter joins it.
    mounts = "".join(f"mount -t tmpfs tmpfs '{folder}' && " for folder in private)
    holder = subprocess.Popen(
        ["ip", "netns", "exec", namespace, "sh", "-c", f"{mounts}echo up && exec sleep infinity"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert holder.stdout is not None
    with holder.stdout:
        if holder.stdout.readline() != b"up\n":
            raise RuntimeError(f"cannot mount {private} in {namespace}")
    return Host(address, namespace, holder)


def _remove(name: str) -> None:
    """Remove a network, whatever there is of it, with the processes on its hosts."""
    spaces = [s.split()[0] for s in _ip("netns").splitlines() if s.startswith(f"{name}.")]
    for space in spaces:
        # Until none is left: they may start others meanwhile.
        while pids := _ip("netns", "pids", space).split():
            for pid in map(int, pids):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        _ip("netns", "del", space)
    subprocess.run(["ip", "link", "del", name], check=False, capture_output=True)


if __name__ == "__main__":
    sys.stdin.buffer.read(1)  # ends with the test process, however that ends
    _remove(sys.argv[1])
