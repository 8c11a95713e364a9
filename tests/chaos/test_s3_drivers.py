"""Several drivers on one output in S3: one works, and what the others do does no harm.

Drivers are processes, each with a network of its own to the one store. The first is held up in its
uploads by that; what happens to it happens after its first commit.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from della_dist.runtime.verify import verify
from tests.chaos.s3_faults import BUCKET, Scene, leavings, pointed_at, write_config
from tests.servers.moto import s3_client, s3_environment
from tests.servers.processes import ROOT, stop, tied
from tests.servers.proxy import Proxy, Rule, faulty_proxy

pytestmark = [pytest.mark.s3, pytest.mark.slow]

SILENCE_S = 4.0
#: The command line with leases that lapse sooner; {elsewhere}: as if other drivers were on other
#: machines, where nobody can see whether their processes live.
COMMAND = f"""
from della_dist.storage.remote import lease
from della_dist.storage.remote.store import RemoteStore
RemoteStore.lease_times = lease.LeaseTimes(0.5, {SILENCE_S}, 0.2, 0.5)
if {{elsewhere}}:
    lease.ended_here = lambda process: False
from della_dist.cli import main
main()
"""
HOLD_UP = Rule("delay", seconds=0.7, match=r"^PUT .*partNumber")


@dataclass(frozen=True, slots=True)
class Ended:
    code: int
    stdout: str
    stderr: str
    seconds: float

    @property
    def tasks_resumed(self) -> int:
        assert self.code == 0, self.stderr
        return int(json.loads(self.stdout)["tasks_resumed"])


class Driver:
    """A running ``della-dist merge``."""

    def __init__(
        self, config: Path, out: str, endpoint: str, *options: str, elsewhere: bool = False
    ) -> None:
        self._started_s = time.monotonic()
        command = [
            *(sys.executable, "-c", COMMAND.format(elsewhere=elsewhere)),
            *("merge", str(config), f"s3://{BUCKET}/{out}", "--shard-size", "9MB"),
            *("--workers", "1", "--quiet", "--json", *options),
        ]
        self.process = subprocess.Popen(
            tied(command),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, **s3_environment(endpoint), "PYTHONPATH": str(ROOT)},
        )

    def end(self, timeout_s: float = 180) -> Ended:
        stdout, stderr = self.process.communicate(timeout=timeout_s)
        seconds = time.monotonic() - self._started_s
        return Ended(self.process.returncode, stdout, stderr, seconds)


@pytest.fixture
def config(scene: Scene, tmp_path: Path) -> Path:
    return write_config(scene, tmp_path / "config.yaml")


@pytest.fixture
def slow(scene: Scene) -> Iterator[Proxy]:
    """The network of the first driver."""
    with faulty_proxy(scene.endpoint, HOLD_UP) as proxy:
        yield proxy


@pytest.fixture
def drivers() -> Iterator[list[Driver]]:
    started: list[Driver] = []
    yield started
    for driver in started:
        if driver.process.poll() is None:
            driver.process.send_signal(signal.SIGCONT)
            stop(driver.process)
        for stream in (driver.process.stdout, driver.process.stderr):
            assert stream is not None
            stream.close()


def objects(scene: Scene, out: str) -> dict[str, str]:
    with contextlib.closing(s3_client(scene.endpoint)) as client:
        found = client.list_objects_v2(Bucket=BUCKET, Prefix=f"{out}/").get("Contents", ())
        return {entry["Key"]: entry["ETag"] for entry in found}


def wait_for_commits(scene: Scene, out: str, number: int = 1) -> None:
    end_s = time.monotonic() + 60
    while sum("/.della/tasks/" in key for key in objects(scene, out)) < number:
        assert time.monotonic() < end_s
        time.sleep(0.05)


def check_output(scene: Scene, out: str, digest: str | None = None) -> None:
    with pointed_at(scene.endpoint):
        done = verify(f"s3://{BUCKET}/{out}")
    assert done.model_digest == (scene.model_digest if digest is None else digest)
    assert not leavings(scene.endpoint, out)


def of_whom(driver: Driver) -> str:
    return rf"\(pid {driver.process.pid} on {re.escape(socket.gethostname())}; since \d+ s\)"


def by_outcome(drivers: Sequence[Driver]) -> tuple[tuple[Driver, Ended], tuple[Driver, Ended]]:
    one, two = ((driver, driver.end()) for driver in drivers)
    return (one, two) if one[1].code == 0 else (two, one)


def test_two_at_once(scene: Scene, config: Path, slow: Proxy, drivers: list[Driver]) -> None:
    drivers += [Driver(config, "race", slow.endpoint) for _ in range(2)]
    (winner, won), (_, lost) = by_outcome(drivers)
    assert (won.code, lost.code) == (0, 2), (won, lost)
    assert re.search(rf"is being written by another run {of_whom(winner)}", lost.stderr)
    assert lost.stderr.count("\n") == 1
    check_output(scene, "race")


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_killed_driver_is_taken_over(
    scene: Scene, config: Path, slow: Proxy, drivers: list[Driver], elsewhere: bool
) -> None:
    """At once on the same machine, after its silence from another one."""
    out = f"killed-{elsewhere}"
    first = Driver(config, out, slow.endpoint)
    drivers.append(first)
    wait_for_commits(scene, out)
    first.process.kill()
    first.process.wait()
    assert leavings(scene.endpoint, out)
    second = Driver(config, out, scene.endpoint, elsewhere=elsewhere)
    drivers.append(second)
    done = second.end()
    assert done.tasks_resumed >= 1
    if elsewhere:
        assert done.seconds > SILENCE_S / 2
    check_output(scene, out)


@pytest.mark.parametrize("another", [False, True], ids=["same merge", "another merge"])
def test_a_suspended_driver_does_no_harm_when_it_goes_on(
    scene: Scene, config: Path, slow: Proxy, drivers: list[Driver], another: bool
) -> None:
    out = f"suspended-{another}"
    first = Driver(config, out, slow.endpoint)
    drivers.append(first)
    wait_for_commits(scene, out)
    first.process.send_signal(signal.SIGSTOP)
    options = ("--restart", "--seed", "7") if another else ()
    second = Driver(config, out, scene.endpoint, *options)
    drivers.append(second)
    done = second.end()
    assert done.seconds > SILENCE_S / 2
    assert done.tasks_resumed == 0 if another else done.tasks_resumed >= 1
    digest = json.loads(done.stdout)["model_digest"]
    assert (digest != scene.model_digest) == another
    before = objects(scene, out)
    first.process.send_signal(signal.SIGCONT)
    stopped = first.end()
    assert stopped.code == 1, stopped
    assert re.search("taken over by another run|took the output over", stopped.stderr)
    assert stopped.stderr.count("\n") == 1
    assert objects(scene, out) == before
    check_output(scene, out, digest)


def test_a_suspended_driver_goes_on_while_the_other_still_works(
    scene: Scene, config: Path, slow: Proxy, drivers: list[Driver]
) -> None:
    out = "both"
    first = Driver(config, out, slow.endpoint)
    drivers.append(first)
    wait_for_commits(scene, out)
    first.process.send_signal(signal.SIGSTOP)
    second = Driver(config, out, slow.endpoint)
    drivers.append(second)
    wait_for_commits(scene, out, 2)
    first.process.send_signal(signal.SIGCONT)
    assert first.end().code == 1
    assert second.end().tasks_resumed >= 1
    check_output(scene, out)


def test_a_driver_that_was_suspended_for_less_goes_on(
    scene: Scene, config: Path, slow: Proxy, drivers: list[Driver]
) -> None:
    """And whoever came meanwhile, and watched it, is refused."""
    first = Driver(config, "brief", slow.endpoint)
    drivers.append(first)
    wait_for_commits(scene, "brief")
    first.process.send_signal(signal.SIGSTOP)
    second = Driver(config, "brief", scene.endpoint)
    drivers.append(second)
    time.sleep(SILENCE_S / 4)
    first.process.send_signal(signal.SIGCONT)
    refused = second.end()
    assert refused.code == 2
    assert re.search(of_whom(first), refused.stderr)
    assert first.end().tasks_resumed == 0
    check_output(scene, "brief")
