"""A merge into the Hub that is killed at any instant: one commit, nothing sent twice."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from della_dist.storage.hub.output.uploads import MOST_WAITING, UPLOADS_AT_ONCE
from della_dist.storage.run_history import RUN_NAME
from tests.chaos.figures import family_in_shards, num_kills, report
from tests.servers.hub import Hub, hub_server
from tests.servers.hub_writes import TOKEN
from tests.servers.processes import ROOT
from tests.staged import contents

NUM_KILLS = num_kills(20)
WORKERS = 2
SHARD_BYTES = 4_000_000
PART_BYTES = 1_000_000


class Merge:
    """The command, and what it leaves."""

    def __init__(self, config: Path, home: Path, hub: Hub) -> None:
        self._config = config
        self._home = home
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
            **{"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "HF_TOKEN": TOKEN},
            **{"HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT)},
        }

    def start(self, out: str) -> subprocess.Popen[str]:
        command = [
            *(sys.executable, "-m", "della_dist", "merge", str(self._config), out, "--debug"),
            *("--workers", str(WORKERS), "--shard-size", str(SHARD_BYTES), "--json"),
        ]
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self._environment,
            start_new_session=True,
        )

    def waiting(self) -> list[Path]:
        """Return the shards that lie here, whole or not."""
        folder = self._home / "della-dist"
        return [p for p in folder.rglob("*.safetensors*") if p.suffix != ".json"]

    def written(self) -> list[bytes]:
        """Return all that was written beside the shards."""
        paths = (self._home / "della-dist").rglob("*")
        return [p.read_bytes() for p in paths if p.is_file() and p not in self.waiting()]


@pytest.mark.slow
def test_kills_while_writing_to_the_hub(tmp_path: Path) -> None:
    family = family_in_shards(tmp_path / "family")
    rng = random.Random(20)
    with hub_server(tmp_path / "repositories", delay_s=0.03) as hub:
        hub.use(chunk_bytes=PART_BYTES)
        merge = Merge(family.config_path, tmp_path / "hf", hub)
        local = merge.start(str(tmp_path / "whole"))  # compiles the kernels, too
        local.communicate()
        assert local.returncode == 0
        expected = contents(tmp_path / "whole")
        shards = {name for name in expected if name.endswith(".safetensors")}
        assert len(shards) > 2 * MOST_WAITING
        first = merge.start("hf://writer/first")
        wait_for_upload(hub, first)
        started_s = time.monotonic()
        first.communicate()
        duration_s = time.monotonic() - started_s
        assert {k: v for k, v in hub.files("writer/first").items() if k in expected} == expected
        kills = outputs = resent = resumed = 0
        most_here = 0
        while kills < NUM_KILLS:
            name = f"team/out{outputs}"
            outputs += 1
            forget_objects(hub)
            hub.forget()
            while True:
                process = merge.start(f"hf://{name}")
                if kills < NUM_KILLS:
                    wait_for_upload(hub, process)
                try:
                    stdout, stderr = process.communicate(
                        timeout=rng.uniform(0, duration_s) if kills < NUM_KILLS else None
                    )
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    stdout, stderr = process.communicate()
                    kills += 1
                assert TOKEN not in stdout + stderr
                assert not any(TOKEN.encode() in data for data in merge.written())
                most_here = max(most_here, len(merge.waiting()))
                if process.returncode == 0:
                    resumed += json.loads(stdout)["tasks_resumed"]
                    break
                assert process.returncode == -signal.SIGKILL, stderr
            found = hub.files(name)
            assert found.pop(".gitattributes")
            assert found.pop(RUN_NAME)
            assert found == expected
            assert hub.commits(name) == [hub.commits("writer/first")[0], "initial commit"]
            assert set(hub.objects().values()) == {1}
            assert not merge.waiting()
            sent_bytes = sum(upload.num_bytes for upload in hub.uploads())
            # As the store counts: what git would have is in the commit.
            large = sum(
                len(data)
                for k, data in expected.items()
                if k.endswith((".safetensors", ".parquet"))
            )
            resent += sent_bytes - large
            assert all(not s["authorization"] for s in hub.seen() if s["who"] == "store")
    # A rerun begins with what was committed, and writes anew what was not.
    assert most_here <= MOST_WAITING + 1 + 2 * WORKERS
    # What was on its way when a kill came is sent from its beginning.
    assert 0 <= resent <= kills * UPLOADS_AT_ONCE * SHARD_BYTES
    report(
        "kills while writing to the Hub",
        kills=kills,
        outputs=outputs,
        shards=outputs * len(shards),
        tasks_resumed=resumed,
        MB_of_the_outputs=outputs * large / 1e6,
        MB_sent_again=resent / 1e6,
        most_shards_here=most_here,
    )


def wait_for_upload(hub: Hub, process: subprocess.Popen[str]) -> None:
    """Wait until a process sends something, or ends."""
    before = len(hub.seen())
    while process.poll() is None:
        if any("/info/lfs/" in seen["target"] for seen in hub.seen()[before:]):
            return
        time.sleep(0.01)


def forget_objects(hub: Hub) -> None:
    """Let the store have nothing: what other outputs hold stays theirs."""
    for path in (hub.folder / ".lfs").iterdir():
        path.unlink()
