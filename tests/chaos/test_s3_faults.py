"""Merges from S3 to S3 survive a faulty network, or fail clearly; they never end with wrong bytes.

What is detected, and how:

* Answers that are cut short, whatever length they state: every read compares with what it asked
  for, whole objects with the size that their HEAD tells.
* Bytes that change on the way to the store: requests are signed, or over https sent with a
  checksum; AWS and Ceph refuse the request, and it is repeated (`tests/e2e/test_rgw.py`).
* Bytes that change on the way from the store, in whole objects (configurations, indexes,
  tokenizers, records): by the checksum that AWS keeps of every object. Ceph 16 keeps none.
* Objects that are replaced while they are read: every ranged read states the ETag it wants.

What is not: bytes of a *ranged* read that change between the store's process and ours. S3 sends no
checksum with a range, an ETag of a multipart upload is no checksum, and no process reads a whole
input shard that it could compare with one. TLS authenticates every byte of an https connection; on
a plain http one a flipped bit that TCP's checksum misses goes into the merge, and only
``verify --recompute`` (which reads again) can find it.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec.config
import pytest
from click.testing import CliRunner, Result

from della_dist.cli import main
from della_dist.errors import InputError, StorageError
from della_dist.runtime.options import RunOptions
from della_dist.runtime.run import merge
from della_dist.storage.opening import open_output_store
from della_dist.storage.remote import retry, upload
from della_dist.storage.remote.lease import LeaseTimes
from della_dist.storage.remote.store import RemoteStore
from tests.chaos.s3_faults import (
    BUCKET,
    FAULTS,
    MIXED,
    SHARD_BYTES,
    Scene,
    leavings,
    pointed_at,
    run,
    write_config,
)
from tests.servers.faults import FaultName
from tests.servers.moto import s3_client as boto3_client
from tests.servers.proxy import Proxy, Rule, faulty_proxy

pytestmark = [pytest.mark.s3, pytest.mark.slow]

NO_SERVER = "http://127.0.0.1:9"

#: How long impatient clients wait for the next bytes of an answer.
ANSWER_S = 1


@pytest.fixture
def proxy(scene: Scene) -> Iterator[Proxy]:
    with faulty_proxy(scene.endpoint) as proxy:
        yield proxy


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give up after seconds; all else is as it is."""
    monkeypatch.setattr(retry, "PATIENCE_S", 4)
    monkeypatch.setattr(RemoteStore, "lease_times", LeaseTimes(beat_s=0.3, silence_s=3))
    monkeypatch.setattr(upload, "ABORT_PATIENCE_S", 1)
    wait_for_s3(monkeypatch, ANSWER_S)


def wait_for_s3(monkeypatch: pytest.MonkeyPatch, answer_s: float) -> None:
    """Configure what a user of s3fs may: how long its client waits."""
    waits = {"connect_timeout": 1, "read_timeout": answer_s}
    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": waits})


@pytest.mark.parametrize("name", [*FAULTS, MIXED])
def test_a_fifth_of_all_requests_fails(scene: Scene, proxy: Proxy, name: str) -> None:
    done = run(scene, proxy, f"a fifth/{name}", name)
    assert done.summary.model_digest == scene.model_digest
    assert not done.leavings
    assert done.summary.tasks_retried == 0  # requests are repeated, not tasks
    assert sum(done.faults.values()) > 10
    assert set(done.faults) == (set(FAULTS.values()) if name == MIXED else {FAULTS[name]})


def once_for_each_operation(fault: FaultName) -> list[Rule]:
    operations = [
        r"^PUT .*/\.della/lock",  # conditional create, and the heartbeat
        r"^PUT .*/\.della/plan.json",
        r"^PUT .*/\.della/tasks/",
        r"^POST .*[?&]uploads",
        r"^PUT .*partNumber=1\b",
        r"^PUT .*partNumber=2\b",
        r"^POST .*[?&]uploadId=",
        r"^PUT .*/della_manifest.json",
        r"^DELETE .*/\.della/plan.json",
        r"^DELETE .*/\.della/lock",
    ]
    return [Rule(fault, match=operation, times=1) for operation in operations]


@pytest.mark.parametrize("fault", ["lost_response", "internal_error"])
def test_each_operation_fails_once(scene: Scene, proxy: Proxy, fault: FaultName) -> None:
    """A request that was performed although its answer was lost does no harm when repeated."""
    rules = once_for_each_operation(fault)
    with pointed_at(proxy.endpoint):
        proxy.use(*rules)
        summary = merge(
            scene.config,
            f"s3://{BUCKET}/once-{fault}",
            RunOptions(device="cpu", shard_bytes=SHARD_BYTES),
        )
    assert proxy.faults() == {fault: len(rules)}
    assert summary.model_digest == scene.model_digest
    assert not leavings(scene.endpoint, f"once-{fault}")


def test_an_upload_that_is_not_aborted_is_cleared_away_by_the_next_run(
    scene: Scene, proxy: Proxy, impatient: None
) -> None:
    with pointed_at(proxy.endpoint):
        proxy.use(Rule("internal_error", match="^(DELETE|POST) .*uploadId="))
        with pytest.raises(StorageError, match=r"writing s3://chaos/abort/model-.* failed"):
            merge(scene.config, f"s3://{BUCKET}/abort", RunOptions(shard_bytes=SHARD_BYTES))
        assert leavings(scene.endpoint, "abort")
        proxy.use()
        merge(scene.config, f"s3://{BUCKET}/abort", RunOptions(shard_bytes=SHARD_BYTES))
    assert not leavings(scene.endpoint, "abort")


def invoke(*arguments: str) -> Result:
    result = CliRunner().invoke(main, [*arguments, "--quiet"])
    if result.exit_code:  # one paragraph
        assert result.stderr.startswith("della-dist: ")
        assert result.stderr.count("\n") == 1
        assert "Traceback" not in result.output
    return result


@contextlib.contextmanager
def when_seen(proxy: Proxy, method: str, pattern: str, rule: Rule) -> Iterator[None]:
    """Change the plan for good when the first such request has come by."""
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.02):
            if any(s.method == method and pattern in s.target for s in proxy.seen()):
                proxy.use(rule)
                return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("fault", ["freeze", "slow_down", "reset"])
def test_a_store_that_fails_for_good(
    scene: Scene, proxy: Proxy, impatient: None, tmp_path: Path, fault: FaultName
) -> None:
    """One clear paragraph in bounded time; then the run continues."""
    config = write_config(scene, tmp_path / "config.yaml")
    out = f"s3://{BUCKET}/for-good-{fault}"
    command = ["merge", str(config), out, "--shard-size", "12MB", "--workers", "1"]
    proxy.use(Rule("delay", seconds=0.2, match="^PUT .*partNumber"))
    with (
        pointed_at(proxy.endpoint),
        when_seen(proxy, "PUT", "/.della/tasks/", Rule(fault)),
    ):
        started_s = time.monotonic()
        failed = invoke(*command)
        seconds = time.monotonic() - started_s
    assert failed.exit_code == 1, failed.output
    assert f"s3://{BUCKET}/" in failed.stderr
    assert "failed: " in failed.stderr
    # Of the operations that are on their way each has its patience, and they wait together: the
    # one that failed, the abort of its upload, the heartbeat.
    assert seconds < 2 + 4 * (retry.PATIENCE_S + ANSWER_S)
    proxy.use()
    with pointed_at(proxy.endpoint):
        summary = merge(scene.config, out, RunOptions(shard_bytes=12_000_000))
    assert summary.tasks_resumed >= 1
    assert summary.model_digest == scene.model_digest
    assert not leavings(scene.endpoint, out.rpartition("/")[2])


def test_no_server(scene: Scene, impatient: None, tmp_path: Path) -> None:
    config = write_config(scene, tmp_path / "config.yaml")
    with pointed_at(NO_SERVER):
        failed = invoke("merge", str(config), str(tmp_path / "out"))
    assert failed.exit_code == 1  # it may be there again: a batch system tries again
    assert "Could not connect to the endpoint URL" in failed.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("match", [r"^\S+ \S*/away", r"^PUT .*/away/\.della/lock"])
def test_an_output_out_of_reach(
    scene: Scene, proxy: Proxy, impatient: None, tmp_path: Path, match: str
) -> None:
    config = write_config(scene, tmp_path / "config.yaml")
    proxy.use(Rule("slow_down", match=match))
    with pointed_at(proxy.endpoint):
        failed = invoke("merge", str(config), f"s3://{BUCKET}/away")
    assert failed.exit_code == 1, failed.output
    assert f"s3://{BUCKET}/away" in failed.stderr
    assert "Check the store and the network" in failed.stderr
    with pointed_at(scene.endpoint):
        assert open_output_store(f"s3://{BUCKET}/away").list() == []


def test_an_input_vanishes_during_the_run(scene: Scene) -> None:
    location = scene.config.models[0].model

    def remove(goal: object, snapshot: object) -> None:
        with contextlib.closing(boto3_client(scene.endpoint)) as client:
            client.copy_object(Bucket=BUCKET, Key="kept", CopySource={"Bucket": BUCKET, "Key": key})
            client.delete_object(Bucket=BUCKET, Key=key)

    with pointed_at(scene.endpoint):
        store = open_output_store(location)
        names = [name for name in store.list() if name.endswith(".safetensors")]
        key = f"{location.removeprefix(f's3://{BUCKET}/')}/{names[-1]}"
        try:
            with pytest.raises(InputError, match=rf"{key} was removed while the merge was running"):
                merge(scene.config, f"s3://{BUCKET}/gone", RunOptions(), watch=remove)
        finally:
            with contextlib.closing(boto3_client(scene.endpoint)) as client:
                source = {"Bucket": BUCKET, "Key": "kept"}
                client.copy_object(Bucket=BUCKET, Key=key, CopySource=source)
        # Put back, it is what it was, and the run goes on.
        summary = merge(scene.config, f"s3://{BUCKET}/gone", RunOptions())
    assert summary.model_digest == scene.model_digest
    assert not leavings(scene.endpoint, "gone")


@pytest.mark.parametrize("out", ["s3://no-such-bucket/out", "s3://no-such-bucket"])
def test_an_output_bucket_that_is_not_there(scene: Scene, tmp_path: Path, out: str) -> None:
    config = write_config(scene, tmp_path / "config.yaml")
    with pointed_at(scene.endpoint):
        refused = invoke("merge", str(config), out)
    assert refused.exit_code == 2
    assert out in refused.stderr
    assert "there is no such object (or bucket)" in refused.stderr


def test_no_permission_to_write(scene: Scene, proxy: Proxy, tmp_path: Path) -> None:
    """Reading is allowed: the run is refused before it reads tensors."""
    config = write_config(scene, tmp_path / "config.yaml")
    proxy.use(Rule("forbidden", match="^(PUT|POST|DELETE) "))
    with pointed_at(proxy.endpoint):
        refused = invoke("merge", str(config), f"s3://{BUCKET}/forbidden")
    assert refused.exit_code == 2, refused.output
    assert f"s3://{BUCKET}/forbidden" in refused.stderr
    assert "access denied" in refused.stderr
    assert "Check the credentials" in refused.stderr
    with pointed_at(scene.endpoint):
        assert open_output_store(f"s3://{BUCKET}/forbidden").list() == []


def test_flipped_bytes_of_whole_objects(scene: Scene, proxy: Proxy) -> None:
    """The store has their checksums: the read is repeated."""
    with pointed_at(proxy.endpoint):
        store = open_output_store(f"s3://{BUCKET}/flipped")
        store.put("small.json", bytes(range(256)) * 100)
        proxy.use(Rule("flip_response", match="^GET ", times=2))
        assert store.read("small.json") == bytes(range(256)) * 100
        assert proxy.faults() == {"flip_response": 2}


def test_cut_answers_of_whole_objects_without_checksums(scene: Scene, proxy: Proxy) -> None:
    """As Ceph has them: the size tells."""
    data = bytes(range(256)) * 100
    plain = {"request_checksum_calculation": "when_required"}
    with contextlib.closing(boto3_client(scene.endpoint, **plain)) as client:
        client.put_object(Bucket=BUCKET, Key="plain/x", Body=data)
        assert not any(
            name.startswith("Checksum")
            for name in client.head_object(Bucket=BUCKET, Key="plain/x", ChecksumMode="ENABLED")
        )
    with pointed_at(proxy.endpoint):
        store = open_output_store(f"s3://{BUCKET}/plain")
        for fault in ("shorten", "close_body", "reset_body"):
            proxy.forget()
            proxy.use(Rule(fault, match="^GET ", times=2))
            assert store.read("x") == data
            assert proxy.faults() == {fault: 2}


def test_an_upload_that_stalls(
    scene: Scene, proxy: Proxy, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network that is slow does not fail; one that takes no more bytes does."""
    wait_for_s3(monkeypatch, 2 * ANSWER_S)
    data = bytes(40 << 20)
    with pointed_at(proxy.endpoint):
        store = open_output_store(f"s3://{BUCKET}/stall")
        proxy.use(Rule("bandwidth", bytes_per_s=8 << 20, match="^PUT "))
        started_s = time.monotonic()
        store.put("x", data)
        assert time.monotonic() - started_s > 4 * ANSWER_S
        assert store.stat("x").size_bytes == len(data)
        assert len(proxy.seen()) == 2  # it was sent once
        proxy.use(Rule("bandwidth", bytes_per_s=1, match="^PUT "))
        with pytest.raises(StorageError, match=r"writing s3://chaos/stall/y failed"):
            store.put("y", data)
    assert time.monotonic() - started_s < 30
