"""Credentials stay where they are: no message, file or record ever has them."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from della_dist.config import MergeConfig
from della_dist.runtime.output.commit import Output
from tests.merging import config_for, run, save_family, write_config
from tests.remote import upload_inputs
from tests.servers.moto import s3_client
from tests.servers.processes import ROOT
from tests.servers.proxy import Proxy, Rule, faulty_proxy

pytestmark = pytest.mark.s3

SECRETS = {
    "AWS_ACCESS_KEY_ID": "UNMISTAKABLEID",
    "AWS_SECRET_ACCESS_KEY": "UNMISTAKABLEsecret",
    "AWS_SESSION_TOKEN": "UNMISTAKABLEtoken",
}


@pytest.fixture
def config(s3_bucket: str, tmp_path: Path) -> MergeConfig:
    base, experts = save_family(tmp_path / "in", num_shards=2, config={"model_type": "llama"})
    config = config_for(base, experts, "della", parameters={"density": 0.4})
    return upload_inputs(config, f"s3://{s3_bucket}/in")


@pytest.fixture
def proxy(
    config: MergeConfig, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Proxy]:
    """What stands before the store; the credentials are the unmistakable ones."""
    with faulty_proxy(s3_endpoint) as proxy:
        for name, value in {**SECRETS, "AWS_ENDPOINT_URL": proxy.endpoint}.items():
            monkeypatch.setenv(name, value)
        sys.modules["s3fs"].S3FileSystem.clear_instance_cache()
        yield proxy


def leaks(text: str | bytes) -> bool:
    data = text if isinstance(text, bytes) else text.encode()
    return re.search(rb"unmistakable", data, re.IGNORECASE) is not None


def everything_in(endpoint: str, bucket: str, prefix: str) -> dict[str, bytes]:
    """Return all objects, with the lease and the records."""
    with contextlib.closing(s3_client(endpoint)) as client:
        found = client.list_objects_v2(Bucket=bucket, Prefix=prefix)["Contents"]
        return {
            e["Key"]: client.get_object(Bucket=bucket, Key=e["Key"])["Body"].read() for e in found
        }


def della_dist(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "della_dist", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.parametrize(
    ("match", "code"),
    [
        ("", 2),  # everything is refused
        ("^(PUT|POST|DELETE) ", 2),  # reading is allowed
        ("^(PUT|POST) .*model-", 1),  # the shards of the output are refused, while it works
        ("^GET .*/in/.*model-.*[^$]*^range: bytes=[1-9]", 1),  # tensors are
    ],
)
def test_refused_requests(
    config: MergeConfig,
    proxy: Proxy,
    s3_bucket: str,
    tmp_path: Path,
    match: str,
    code: int,
    debug: bool,
) -> None:
    file = write_config(tmp_path / "config.yaml", config)
    proxy.use(Rule("forbidden", match=match))
    options = ["--debug"] if debug else []
    done = della_dist(
        "merge", str(file), f"s3://{s3_bucket}/out", "--shard-size", "100kB", *options
    )
    assert proxy.faults()["forbidden"] >= 1
    assert done.returncode == code, done.stderr
    assert "access denied" in done.stderr
    assert "InvalidAccessKeyId" in done.stderr or "does not exist in our records" in done.stderr
    assert ("Traceback" in done.stderr) == debug
    assert not leaks(done.stdout)
    assert not leaks(done.stderr)


def test_what_a_run_writes(
    config: MergeConfig,
    proxy: Proxy,
    s3_endpoint: str,
    s3_bucket: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While it runs (lease, plan, records), and when it is done (manifest, card, statistics)."""
    while_running: dict[str, bytes] = {}
    commit = Output.commit

    def look(self: Output, record: object) -> None:
        commit(self, record)  # type: ignore[arg-type]
        while_running.update(everything_in(s3_endpoint, s3_bucket, "out/.della/"))

    monkeypatch.setattr(Output, "commit", look)
    run(config, f"s3://{s3_bucket}/out", shard_bytes=400_000)
    assert {"out/.della/lock", "out/.della/plan.json"} < set(while_running)
    written = everything_in(s3_endpoint, s3_bucket, "out/")
    assert {"out/della_manifest.json", "out/README.md", "out/della_tensors.parquet"} < set(written)
    assert not [key for key, data in {**while_running, **written}.items() if leaks(data)]
    verified = della_dist("verify", f"s3://{s3_bucket}/out", "--recompute", "2", "--json")
    planned = della_dist("plan", str(write_config(tmp_path / "c.yaml", config)), "--json")
    for done in (verified, planned):
        assert done.returncode == 0, done.stderr
        assert not leaks(done.stdout + done.stderr)


def test_the_search_finds_what_it_looks_for(proxy: Proxy, s3_bucket: str) -> None:
    """The store does echo the key, and the client does know the secrets."""
    from botocore.exceptions import ClientError

    from della_dist.storage.opening import open_store

    proxy.use(Rule("forbidden", match="^GET "))
    store = open_store(f"s3://{s3_bucket}/out")
    with pytest.raises(OSError, match="access denied") as caught:
        store.list()
    cause = caught.value.__cause__
    while not isinstance(cause, ClientError):
        assert cause is not None
        cause = cause.__cause__
    assert leaks(str(cause.response))
    assert not leaks(str(caught.value))
