"""The Ray engine on hosts that share nothing but a network and S3, and when the network fails.

Host 0 is the head, and runs the driver; host 1 is no part of the cluster; the others are workers.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from della_dist.storage.opening import open_output_store
from tests.checkpoints import tensor
from tests.merging import config_for, run, save_family
from tests.remote import upload_inputs
from tests.servers.moto import make_bucket, moto_server, s3_environment
from tests.servers.namespaces import Host, Network, network
from tests.servers.processes import ROOT
from tests.servers.proxy import Proxy, Rule, faulty_proxy
from tests.servers.ray_cluster import FAST_FAILURE_DETECTION, RAY_ENVIRONMENT

pytestmark = [pytest.mark.ray, pytest.mark.s3, pytest.mark.slow]

NUM_TASKS = 24
SHARD_BYTES = 70_000
#: How long the store takes for a shard, so that there is a middle of a run.
PUT_S = 1.5
TIMEOUT_S = 120.0
#: Run by Python on the head: a server of a driver outside of the cluster takes a file of the folder
#: and dies.
DYING_SERVERS = """\
import os, sys
if "--mode=specific-server" in sys.orig_argv:
    for name in os.listdir({folder!r}):
        try:
            os.remove(os.path.join({folder!r}, name))
        except FileNotFoundError:
            continue
        os._exit(1)
"""
COMMAND = ("-m", "della_dist")
COMMAND_THAT_TRIES_ONCE = (
    "-c",
    """\
from della_dist import cli
from della_dist.runtime.engines.ray import connection as ray_connection
ray_connection.CONNECT_TRIES = 1
cli.main()
""",
)
RAY_START = [sys.executable, "-m", "ray.scripts.scripts", "start", "--disable-usage-stats"]


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster of hosts, a store, and what all of them know."""

    net: Network
    proxy: Proxy
    env: dict[str, str]
    folder: Path
    """Each host has it for itself."""
    digest: str
    """What the local engine makes of the inputs at `s3://bucket/in`."""

    @property
    def head(self) -> Host:
        return self.net.hosts[0]

    def start(self, host: Host, *arguments: str) -> None:
        """Make a host a node."""
        host.run(["mkdir", "-p", str(self.folder / "ray")])
        where = [f"--node-ip-address={host.address}", "--object-store-memory=80000000"]
        host.run([*RAY_START, *where, *arguments], env=self.env)

    def write(self, name: str, text: str, *, on: Host | None = None) -> None:
        """Write a file in a host's folder."""
        target = str(self.folder / name)
        (on or self.head).run(["sh", "-c", 'printf %s "$1" > "$2"', "sh", text, target])

    def add_worker(self, host: Host) -> None:
        self.start(host, f"--address={self.head.address}:6379", "--num-cpus=1")

    @contextmanager
    def merging(
        self,
        out: str,
        *,
        on: Host | None = None,
        address: str = "auto",
        workers: int,
        program: Sequence[str] = COMMAND,
    ) -> Iterator[subprocess.Popen[bytes]]:
        """Run a merge to `s3://bucket/OUT` by the command line."""
        command = [
            *(sys.executable, *program, "merge", str(self.folder / "config.yaml")),
            *(f"s3://bucket/{out}", "--engine", "ray", "--address", address, "--json"),
            *("--workers", str(workers), "--threads", "1", "--memory", "192MiB"),
            *("--shard-size", str(SHARD_BYTES)),
        ]
        process = (on or self.head).popen(
            command, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        with process:
            try:
                yield process
            finally:
                process.kill()

    def num_committed(self, out: str) -> int:
        return len(open_output_store(f"s3://bucket/{out}").list(".della/tasks/"))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Run a head and two workers, one task each; hosts 4 and 5 are not in it yet."""
    rng = np.random.default_rng(0)
    base = {f"t{i:02}": tensor(rng.normal(0, 0.05, (64, 512)), "BF16") for i in range(NUM_TASKS)}
    inputs = tmp_path_factory.mktemp("in")
    local = config_for(*save_family(inputs, base), parameters={"density": 0.4})
    digest = run(local, inputs / "out", shard_bytes=SHARD_BYTES).model_digest
    with (
        tempfile.TemporaryDirectory(prefix="ns", dir="/tmp") as short,  # for Ray's sockets
        network(6, private=[short, inputs, "/dev/shm"]) as net,
        moto_server(net.address) as moto,
        faulty_proxy(moto, host=net.address) as proxy,
        pytest.MonkeyPatch.context() as patch,
    ):
        s3 = s3_environment(proxy.endpoint)
        for name, value in s3.items():
            patch.setenv(name, value)
        make_bucket(moto, "bucket")
        remote = upload_inputs(local, "s3://bucket/in")
        health = {f"RAY_{name}": str(value) for name, value in FAST_FAILURE_DETECTION.items()}
        here = {"RAY_TMPDIR": short, "PYTHONPATH": f"{short}:{ROOT}"}
        client = {
            "RAY_CLIENT_RECONNECT_GRACE_PERIOD": "2",
            "RAY_CLIENT_SERVER_CHECK_CHANNEL_TIMEOUT_S": "10",
            "GRPC_ENABLE_FORK_SUPPORT": "0",
        }
        env = {**RAY_ENVIRONMENT, **s3, **health, **here, **client}
        cluster = Cluster(net, proxy, env, Path(short), digest)
        cluster.head.run(["mkdir", f"{short}/dying"])
        cluster.write("sitecustomize.py", DYING_SERVERS.format(folder=f"{short}/dying"))
        head = ["--head", "--port=6379", "--num-cpus=0", "--include-dashboard=false"]
        cluster.start(cluster.head, *head)
        for host in net.hosts[2:4]:
            cluster.add_worker(host)
        for host in net.hosts[:2]:
            cluster.write("config.yaml", yaml.safe_dump(remote.normalized()), on=host)
        proxy.use(Rule("delay", match="^PUT .*safetensors", seconds=PUT_S))
        yield cluster


def summary_of(process: subprocess.Popen[bytes]) -> tuple[dict[str, Any], str]:
    """Wait for a merge; return what it prints, and its log."""
    output, errors = process.communicate(timeout=TIMEOUT_S)
    log = errors.decode()
    assert process.returncode == 0, log
    summary = json.loads(output)
    assert isinstance(summary, dict)
    return summary, log


def wait_until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline_s, "it did not happen"
        time.sleep(0.1)


def check(cluster: Cluster, out: str, summary: dict[str, Any]) -> None:
    """Compare an output with the local engine's."""
    assert summary["model_digest"] == cluster.digest
    assert summary["num_tasks"] == NUM_TASKS
    store = open_output_store(f"s3://bucket/{out}")
    assert not store.has_state()
    assert sum(key.endswith(".safetensors") for key in store.list()) == NUM_TASKS


def processes(host: Host, text: str) -> list[int]:
    """Return the processes on a host whose command lines contain `text`."""
    pids = subprocess.check_output(["ip", "netns", "pids", host.namespace], text=True).split()
    found = []
    for pid in map(int, pids):
        with contextlib.suppress(FileNotFoundError):  # it ended just now
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            if text in command:
                found.append(pid)
    return found


def actors(host: Host) -> list[int]:
    """Return the actors that run on a host."""
    return processes(host, "ray::_Actor")


def test_same_bytes_as_on_one_machine(cluster: Cluster) -> None:
    with cluster.merging("plain", workers=2) as process:
        wait_until(lambda: cluster.num_committed("plain") >= 2)
        assert [len(actors(host)) for host in cluster.net.hosts[:4]] == [0, 0, 1, 1]
        summary, _ = summary_of(process)
    check(cluster, "plain", summary)
    assert (summary["workers_lost"], summary["tasks_retried"]) == (0, 0)


def test_a_driver_that_is_not_on_the_cluster(cluster: Cluster) -> None:
    address = f"ray://{cluster.head.address}:10001"
    outside = cluster.net.hosts[1]
    with cluster.merging("client", on=outside, address=address, workers=2) as process:
        summary, _ = summary_of(process)
    check(cluster, "client", summary)
    assert (summary["workers_lost"], summary["tasks_retried"]) == (0, 0)


def test_a_driver_whose_server_dies_at_its_start(cluster: Cluster) -> None:
    # Ray 2.60 does so by itself, now and then.
    address = f"ray://{cluster.head.address}:10001"
    outside = cluster.net.hosts[1]
    cluster.write("dying/one", "")
    cluster.write("dying/two", "")
    with (
        cluster.merging("tried", on=outside, address=address, workers=2) as process,
        cluster.merging(
            "once", on=outside, address=address, workers=2, program=COMMAND_THAT_TRIES_ONCE
        ) as once,
    ):
        _, errors = once.communicate(timeout=TIMEOUT_S)
        summary, log = summary_of(process)
    check(cluster, "tried", summary)
    assert f"{address} did not take the connection" in log
    assert "Traceback" not in log
    assert once.returncode == 1
    assert b"no server for this driver stayed alive" in errors
    assert b"Traceback" not in errors


def test_a_host_is_cut_off_for_good(cluster: Cluster) -> None:
    host = cluster.net.hosts[4]
    cluster.add_worker(host)
    with cluster.merging("cut", workers=3) as process:
        wait_until(lambda: cluster.num_committed("cut") >= 3)
        assert actors(host)
        host.cut()
        summary, log = summary_of(process)
    check(cluster, "cut", summary)
    assert summary["workers_lost"] >= 1
    assert summary["tasks_retried"] >= 1
    assert "was lost" in log


def test_a_host_that_was_cut_off_comes_back(cluster: Cluster) -> None:
    host = cluster.net.hosts[5]
    cluster.add_worker(host)
    with cluster.merging("healed", workers=3) as process:
        wait_until(lambda: cluster.num_committed("healed") >= 3)
        host.cut()
        assert process.stderr is not None
        log = ""
        while "was lost" not in log:
            line = process.stderr.readline()
            assert line, f"it ended before:\n{log}"
            log += line.decode()
        assert actors(host)  # it does not know yet
        host.heal()
        summary, _ = summary_of(process)
    check(cluster, "healed", summary)
    assert summary["workers_lost"] >= 1
    wait_until(lambda: not actors(host))
    check(cluster, "healed", summary)


def test_a_driver_that_loses_its_connection(cluster: Cluster) -> None:
    # The last test: nobody can connect to the cluster from outside any more.
    address = f"ray://{cluster.head.address}:10001"
    outside = cluster.net.hosts[1]
    with cluster.merging("lost", on=outside, address=address, workers=2) as process:
        wait_until(lambda: cluster.num_committed("lost") >= 2)
        servers = processes(cluster.head, "-m ray.util.client.server")
        assert servers
        for pid in servers:
            os.kill(pid, signal.SIGKILL)
        _, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 1
    assert b"della-dist: the Ray cluster failed, or the connection to it" in errors
    assert b"Traceback" not in errors
    with cluster.merging("lost", workers=2) as process:
        summary, _ = summary_of(process)
    check(cluster, "lost", summary)
    assert summary["tasks_resumed"] >= 2
