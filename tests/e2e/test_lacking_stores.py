"""Stores that speak S3 and lack a part of it: merged all the same, or refused at once and by name.

moto behind a proxy that takes away what the store under test lacks; s3rver lacks it by itself.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from della_dist.cli import main
from della_dist.config import MergeConfig
from della_dist.errors import InputError, OutputError, RunError, StorageError, UnsupportedError
from della_dist.runtime.verify import verify
from della_dist.storage.opening import open_output_store
from della_dist.storage.remote import lease, retry
from della_dist.storage.remote import store as remote
from della_dist.storage.remote.lease import LeaseTimes
from della_dist.storage.remote.s3 import S3Store
from della_dist.storage.remote.store import RemoteStore
from della_dist.storage.remote.upload import MIN_PART_BYTES
from della_dist.storage.store import LOCK_KEY
from della_dist.testing import LARGE_BYTES
from tests.checkpoints import tensor
from tests.merging import config_for, run, save_family, write_config
from tests.remote import upload_inputs
from tests.servers.faults import FaultName
from tests.servers.moto import s3_client
from tests.servers.proxy import Proxy, Rule, faulty_proxy
from tests.servers.static import static_server

pytestmark = pytest.mark.s3

#: What lets a request through as if it carried no such header, and an answer too.
NO_CONDITIONS = tuple(
    Rule("rewrite", pattern=rf"^{name}:.*\r\n", match="^PUT")
    for name in ("if-none-match", "if-match")
)
NO_RANGES = Rule("rewrite", pattern=r"^range:.*\r\n")
NO_ETAGS = Rule("rewrite", pattern=r"^etag:.*\r\n")


@pytest.fixture
def proxy(s3_endpoint: str, s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    with faulty_proxy(s3_endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


@pytest.fixture(autouse=True)
def nothing_said_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_said", set())


@pytest.fixture
def config(tmp_path: Path) -> MergeConfig:
    base, experts = save_family(tmp_path / "in", num_shards=2, config={"model_type": "llama"})
    return config_for(base, experts, "della", parameters={"density": 0.4})


def invoke(config: MergeConfig, tmp_path: Path, out: str, *options: str) -> Result:
    path = write_config(tmp_path / "config.yaml", config)
    started_s = time.monotonic()
    result = CliRunner().invoke(main, ["merge", str(path), out, "--shard-size", "100kB", *options])
    assert "Traceback" not in result.stderr
    if result.exit_code:
        assert time.monotonic() - started_s < retry.PATIENCE_S / 2  # not tried again and again
    return result


def objects(endpoint: str, bucket: str, prefix: str = "") -> list[str]:
    with contextlib.closing(s3_client(endpoint)) as client:
        found = client.list_objects_v2(Bucket=bucket, Prefix=prefix).get("Contents", ())
    return [entry["Key"] for entry in found]


# Conditional writes.


WITHOUT_CONDITIONS = {
    "ignored": NO_CONDITIONS,
    "create-ignored": NO_CONDITIONS[:1],
    "overwrite-ignored": NO_CONDITIONS[1:],
    "501": (Rule("not_implemented", match="^if-(none-)?match:"),),
    "400": (Rule("bad_request", match="^if-(none-)?match:"),),
    "overwrite-501": (Rule("not_implemented", match="^if-match:"),),
    "never-equal": (
        Rule("rewrite", pattern=r'^if-match: "?', replacement="if-match: x", match="^PUT"),
    ),
}


@pytest.mark.parametrize("rules", WITHOUT_CONDITIONS.values(), ids=WITHOUT_CONDITIONS)
def test_a_store_without_conditional_writes(
    config: MergeConfig,
    proxy: Proxy,
    s3_endpoint: str,
    s3_bucket: str,
    tmp_path: Path,
    rules: tuple[Rule, ...],
) -> None:
    proxy.use(*rules)
    out = f"s3://{s3_bucket}/out"
    refused = invoke(config, tmp_path, out)
    assert refused.exit_code == 2
    assert refused.stderr.count("\n") == 1
    assert f"{out} cannot be kept from a second run" in refused.stderr
    assert "no conditional writes" in refused.stderr
    assert "--no-lease" in refused.stderr
    assert objects(s3_endpoint, s3_bucket) == []


def test_a_merge_without_a_lease(
    config: MergeConfig, proxy: Proxy, s3_bucket: str, tmp_path: Path
) -> None:
    proxy.use(*NO_CONDITIONS)
    out = f"s3://{s3_bucket}/out"
    merged = invoke(config, tmp_path, out, "--no-lease")
    assert merged.exit_code == 0, merged.stderr
    assert merged.stderr.count("a second run that writes there would damage it") == 1
    digest = run(config, tmp_path / "local", shard_bytes=100_000).model_digest
    assert verify(out).model_digest == digest
    assert not open_output_store(out).has_state()
    # A finished one whose driver died right after the manifest is tidied without a lease too.
    open_output_store(out).put(".della/plan.json", b"{}")
    assert invoke(config, tmp_path, out, "--no-lease").exit_code == 0
    assert not open_output_store(out).has_state()


def test_a_lease_costs_few_requests(proxy: Proxy, s3_bucket: str) -> None:
    store = open_output_store(f"s3://{s3_bucket}/out")
    proxy.forget()
    with store.lock("me"):
        assert len(proxy.seen()) <= 12


def test_runs_without_leases_see_each_other(
    proxy: Proxy, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RemoteStore, "lease_times", LeaseTimes(0.2, 1.0, 0.1))
    proxy.use(*NO_CONDITIONS)
    store = open_output_store(f"s3://{s3_bucket}/out")
    first = store.lock("the first", lease=False)
    first.check()
    assert store.is_held(first.token)
    # Whoever wants a lease is kept out, and does not take the mark away, however old it is.
    time.sleep(1.2)
    with pytest.raises(OutputError, match=r"begun without a lease \(the first; .*--no-lease"):
        store.lock("a leaseholder")
    assert store.is_held(first.token)
    # Whoever wants none takes over, and the first notices before its next commit.
    second = store.lock("the second", lease=False)
    with pytest.raises(RunError, match="taken over by another run: no lease kept it out"):
        first.check()
    first.release()
    assert store.is_held(second.token)
    second.release()
    assert not store.has_state()


@pytest.mark.parametrize("root", ["memory", "s3"])
def test_a_lease_is_respected_by_runs_without(
    root: str, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RemoteStore, "lease_times", LeaseTimes(0.2, 1.0, 0.1))
    store = open_output_store(f"{root}://{s3_bucket}/out")
    with store.lock("alive") as held:
        with pytest.raises(OutputError, match=r"being written by another run \(alive;"):
            store.lock("me", lease=False)
        held.check()
    dead = {"owner": "dead", "token": "dead", "since": 0, "beat": 0, "process": None}
    store.put(LOCK_KEY, lease._dump(dead))
    store.lock("me", lease=False).release()
    assert not store.has_state()


def test_a_file_system_without_exclusive_creation(monkeypatch: pytest.MonkeyPatch) -> None:
    """As fsspec's general interface is: other modes than overwriting are refused, or ignored."""
    from fsspec.implementations.memory import MemoryFileSystem

    pipe_file = MemoryFileSystem.pipe_file
    store = open_output_store("memory://no-exclusive-creation/out")

    def refuses(self: MemoryFileSystem, path: str, value: bytes, mode: str = "overwrite") -> None:
        if mode != "overwrite":
            raise ValueError(mode)
        pipe_file(self, path, value)

    def ignores(self: MemoryFileSystem, path: str, value: bytes, mode: str = "overwrite") -> None:
        pipe_file(self, path, value)

    for replacement in (refuses, ignores):
        monkeypatch.setattr(MemoryFileSystem, "pipe_file", replacement)
        with pytest.raises(OutputError, match="no conditional writes"):
            store.lock("me")
        assert not store.has_state()
        store.lock("me", lease=False).release()


# The listing of unfinished uploads.


@pytest.mark.parametrize(
    "rule",
    [
        *(
            Rule(fault, match=r"^GET .*[?&]uploads")
            for fault in ("not_implemented", "not_allowed", "not_found", "bad_request", "babble")
        ),
        Rule("rewrite", pattern=r"^GET (\S+)\?uploads&?", replacement=r"GET \1?"),
    ],
    ids=["501", "405", "404", "400", "html", "lists-objects"],
)
def test_a_store_that_lists_no_uploads(
    proxy: Proxy, s3_bucket: str, rule: Rule, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_output_store(f"s3://{s3_bucket}/out")
    store.put("x", b"")
    proxy.use(rule)
    with caplog.at_level(logging.WARNING, "della_dist.run"):
        store.clear_staging()
        store.clear_staging()
    (said,) = (record.getMessage() for record in caplog.records)
    assert "does not list unfinished uploads" in said
    assert "lifecycle rule" in said


def test_a_merge_without_the_sweep(
    config: MergeConfig, proxy: Proxy, s3_bucket: str, tmp_path: Path
) -> None:
    proxy.use(Rule("not_implemented", match=r"^GET .*[?&]uploads"))
    out = f"s3://{s3_bucket}/out"
    merged = invoke(config, tmp_path, out)
    assert merged.exit_code == 0, merged.stderr
    assert merged.stderr.count("does not list unfinished uploads") == 1
    digest = run(config, tmp_path / "local", shard_bytes=100_000).model_digest
    assert verify(out).model_digest == digest


# Multipart uploads.


@pytest.mark.parametrize("fault", ["not_implemented", "bad_request"])
def test_a_store_without_multipart_uploads(
    proxy: Proxy,
    s3_endpoint: str,
    s3_bucket: str,
    tmp_path: Path,
    fault: FaultName,
) -> None:
    numbers = tensor(np.full(MIN_PART_BYTES // 4 + 1, 0.5), "F32")
    base, experts = save_family(tmp_path / "in", {"w": numbers}, num_experts=1)
    config = config_for(base, experts, "task_arithmetic")
    proxy.use(Rule(fault, match=r"^POST .*[?&]upload"))
    refused = invoke(config, tmp_path, f"s3://{s3_bucket}/out")
    assert refused.exit_code == 2
    assert "lacks the multipart uploads" in refused.stderr
    assert objects(s3_endpoint, s3_bucket) == []


def test_small_shards_need_no_multipart_uploads(
    config: MergeConfig, proxy: Proxy, s3_bucket: str, tmp_path: Path
) -> None:
    proxy.use(Rule("not_implemented", match=r"[?&]upload"))
    assert invoke(config, tmp_path, f"s3://{s3_bucket}/out").exit_code == 0


def test_a_part_without_an_etag(proxy: Proxy, s3_bucket: str) -> None:
    proxy.use(NO_ETAGS)
    with open_output_store(f"s3://{s3_bucket}/out").create("x", LARGE_BYTES) as writer:
        writer.write(bytes(LARGE_BYTES))
        with pytest.raises(OutputError, match="without the ETag"):
            writer.commit()


def test_an_error_in_an_answer_of_success(proxy: Proxy, s3_bucket: str) -> None:
    """S3 begins to answer before it knows whether an upload can be completed."""
    store = open_output_store(f"s3://{s3_bucket}/out")
    data = bytes(range(256)) * (LARGE_BYTES // 256)
    proxy.use(Rule("error_under_200", match="^POST .*[?&]uploadId=", times=2))
    with store.create("x", len(data)) as writer:
        writer.write(data)
        writer.commit()
    assert proxy.faults() == {"error_under_200": 2}
    assert store.read("x") == data


# Ranges.


@pytest.mark.parametrize(
    "rule",
    [
        NO_RANGES,
        Rule("rewrite", pattern=r"^content-range:.*\r\n"),
        Rule("rewrite", pattern=r"^range: bytes=(\d+)-", replacement=r"range: bytes=1\1-"),
    ],
    ids=["ignored", "unnamed", "another"],
)
def test_a_store_that_does_not_serve_ranges(
    config: MergeConfig, proxy: Proxy, s3_bucket: str, tmp_path: Path, rule: Rule
) -> None:
    remote_config = upload_inputs(config, f"s3://{s3_bucket}/in")
    proxy.use(rule)
    refused = invoke(remote_config, tmp_path, str(tmp_path / "out"))
    assert refused.exit_code == 2
    assert f"s3://{s3_bucket}/in" in refused.stderr
    assert "the store does not serve ranges" in refused.stderr
    assert not (tmp_path / "out").exists()


def test_a_whole_object_is_a_range_too(proxy: Proxy, s3_bucket: str) -> None:
    store = open_output_store(f"s3://{s3_bucket}/in")
    store.put("x", b"0123456789")
    proxy.use(NO_RANGES)
    assert store.read("x", 0, 10) == b"0123456789"
    for start, stop in ((0, 5), (5, 10), (3, 13)):
        with pytest.raises(InputError, match="does not serve ranges"):
            store.read("x", start, stop)


def test_a_range_of_an_object_of_unknown_size(proxy: Proxy, s3_bucket: str) -> None:
    store = open_output_store(f"s3://{s3_bucket}/in")
    store.put("x", b"0123456789")
    pattern = r"^(content-range: bytes \d+-\d+)/\d+"
    proxy.use(Rule("rewrite", pattern=pattern, replacement=r"\1/*"))
    assert store.read("x", 3, 7) == b"3456"


def test_a_web_server_that_does_not_serve_ranges(tmp_path: Path) -> None:
    (tmp_path / "bucket").mkdir()
    (tmp_path / "bucket" / "x").write_bytes(bytes(range(256)))
    with static_server(tmp_path) as endpoint, faulty_proxy(endpoint) as proxy:
        store = open_output_store(f"{proxy.endpoint}/bucket")
        assert store.read("x", 5, 9) == bytes(range(5, 9))
        proxy.use(NO_RANGES)
        with pytest.raises(InputError, match="does not serve ranges"):
            store.read("x", 5, 9)


# Versions.


def test_a_store_without_etags(
    config: MergeConfig,
    proxy: Proxy,
    s3_bucket: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    remote_config = upload_inputs(config, f"s3://{s3_bucket}/in")
    proxy.use(NO_ETAGS)
    with caplog.at_level(logging.WARNING, "della_dist.run"):
        summary = run(remote_config, tmp_path / "out", shard_bytes=100_000)
    local = run(config, tmp_path / "local", shard_bytes=100_000)
    assert summary.model_digest == local.model_digest
    said = [r.getMessage() for r in caplog.records if "names no versions (ETags)" in r.getMessage()]
    assert len(said) == 1
    # As an output it cannot be leased, and without one it does.
    with pytest.raises(OutputError, match="no conditional writes"):
        run(config, f"s3://{s3_bucket}/out", shard_bytes=100_000)
    run(config, f"s3://{s3_bucket}/out", shard_bytes=100_000, lease=False)
    assert verify(f"s3://{s3_bucket}/out").model_digest == local.model_digest


ETAGS = {
    "none": (NO_ETAGS,),
    "weak": (Rule("rewrite", pattern=r"^etag: ", replacement="ETag: W/"),),
    "unquoted": (Rule("rewrite", pattern=r'^etag: "(.*)"', replacement=r"ETag: \1"),),
    "compared-otherwise": (
        Rule("rewrite", pattern=r'^if-match: "', replacement='if-match: "x', match="^GET"),
    ),
    "not-compared": (Rule("rewrite", pattern=r"^if-match:.*\r\n", match="^GET"),),
    "condition-not-implemented": (Rule("not_implemented", match="^if-match:"),),
}


@pytest.mark.parametrize("rules", ETAGS.values(), ids=ETAGS)
@pytest.mark.parametrize("size", ["equal", "larger"])
def test_an_object_that_changes_is_noticed(
    proxy: Proxy, s3_bucket: str, rules: tuple[Rule, ...], size: str
) -> None:
    store = open_output_store(f"s3://{s3_bucket}/in")
    store.put("x", b"0123456789")
    proxy.use(*rules)
    stat = store.stat("x")
    assert stat.size_bytes == 10
    with store.open_reader("x") as reader:
        assert reader.stat == stat
        assert bytes(reader.view(2, 5)) == b"234"
        assert bytes(reader.view(3, 10)) == b"3456789"
        if size == "equal":
            time.sleep(1.1)  # times are told in seconds
        store.put("x", b"9876543210" if size == "equal" else b"98765432101")
        with pytest.raises(InputError, match="was changed while the merge was running"):
            reader.view(4, 6)
    assert store.stat("x") != stat


def test_neither_etags_nor_times(proxy: Proxy, s3_bucket: str) -> None:
    store = S3Store(f"s3://{s3_bucket}/in", f"{s3_bucket}/in", 1)
    proxy.use(NO_ETAGS, Rule("rewrite", pattern=r"^last-modified:.*\r\n"))
    store.put("x", b"0123456789")
    assert store.age_s("x") is None
    with store.open_reader("x") as reader:
        assert bytes(reader.view(2, 5)) == b"234"
        store.put("x", b"012")
        with pytest.raises((InputError, StorageError), match="changed"):
            reader.view(0, 3)


def test_a_head_that_does_not_tell_the_size(proxy: Proxy, s3_bucket: str) -> None:
    store = open_output_store(f"s3://{s3_bucket}/in")
    store.put("x", b"0123456789")
    proxy.use(Rule("rewrite", pattern=r"^content-length:.*\r\n", match="^HEAD"))
    for read in (store.stat, store.read, store.open_reader):
        with pytest.raises(UnsupportedError, match="does not say how large it is"):
            read("x")


def test_a_listing_that_ends_after_its_first_page(proxy: Proxy, s3_bucket: str) -> None:
    store = open_output_store(f"s3://{s3_bucket}/in")
    for key in "abc":
        store.put(key, b"")
    proxy.use(Rule("rewrite", pattern="list-type=2", replacement="max-keys=2"))
    with pytest.raises(UnsupportedError, match="lacks ListObjectsV2"):
        store.list()
    proxy.use(Rule("not_implemented", match="list-type=2"))
    with pytest.raises(UnsupportedError, match=r"listing .* failed: the store does not do this"):
        store.list()


# A whole server.


@pytest.mark.s3rver
def test_a_merge_from_and_to_s3rver(
    config: MergeConfig, s3rver_bucket: str, tmp_path: Path
) -> None:
    remote_config = upload_inputs(config, f"s3://{s3rver_bucket}/in")
    out = f"s3://{s3rver_bucket}/out"
    refused = invoke(remote_config, tmp_path, out)
    assert refused.exit_code == 2
    assert "no conditional writes" in refused.stderr
    assert open_output_store(out).list() == []
    merged = invoke(remote_config, tmp_path, out, "--no-lease")
    assert merged.exit_code == 0, merged.stderr
    assert "lifecycle rule" in merged.stderr
    assert "would damage it" in merged.stderr
    digest = run(config, tmp_path / "local", shard_bytes=100_000).model_digest
    assert verify(out, recompute=2).model_digest == digest
    assert not open_output_store(out).has_state()
