"""What a store that verifies signatures and payloads adds: damage on the way, and wrong keys."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from della_dist.cli import main
from della_dist.config import MergeConfig
from della_dist.runtime.verify import verify
from della_dist.storage.opening import open_output_store
from tests.chaos.s3_faults import FAULTS
from tests.merging import config_for, run, save_family, write_config
from tests.remote import upload_inputs
from tests.servers.proxy import Proxy, Rule, faulty_proxy

pytestmark = pytest.mark.rgw


@pytest.fixture
def proxy(rgw_endpoint: str, rgw_bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    with faulty_proxy(rgw_endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


@pytest.fixture
def config(tmp_path: Path) -> MergeConfig:
    base, experts = save_family(tmp_path / "in", num_shards=2, config={"model_type": "llama"})
    return config_for(base, experts, "della", parameters={"density": 0.4})


def test_flipped_bytes_in_uploads(
    config: MergeConfig, proxy: Proxy, rgw_bucket: str, tmp_path: Path
) -> None:
    """The store refuses what is not what was signed; it is sent again."""
    expected = run(config, tmp_path / "out", shard_bytes=100_000)
    proxy.use(Rule("flip_request", probability=0.3, match="^PUT "))
    summary = run(config, f"s3://{rgw_bucket}/out", shard_bytes=100_000)
    assert proxy.faults()["flip_request"] > 3
    assert summary.model_digest == expected.model_digest
    proxy.use()
    assert verify(f"s3://{rgw_bucket}/out").model_digest == expected.model_digest


def test_flipped_bytes_in_parts(proxy: Proxy, rgw_bucket: str) -> None:
    store = open_output_store(f"s3://{rgw_bucket}/out")
    data = bytes(range(256)) * (80 << 10)
    proxy.use(Rule("flip_request", match="^PUT .*partNumber", calls=[1, 3]))
    with store.create("x", len(data)) as writer:
        writer.write(data)
        writer.commit()
    assert proxy.faults() == {"flip_request": 2}
    assert store.read("x") == data


def test_a_fifth_of_all_requests_fails(
    config: MergeConfig, proxy: Proxy, rgw_bucket: str, tmp_path: Path
) -> None:
    expected = run(config, tmp_path / "out", shard_bytes=100_000)
    remote = upload_inputs(config, f"s3://{rgw_bucket}/in")
    proxy.use(*(Rule(fault, 0.03) for fault in FAULTS.values()))
    summary = run(remote, f"s3://{rgw_bucket}/out", shard_bytes=100_000)
    assert sum(proxy.faults().values()) > 10
    assert summary.model_digest == expected.model_digest
    assert not open_output_store(f"s3://{rgw_bucket}/out").has_state()


def invoke(*arguments: str) -> Result:
    result = CliRunner().invoke(main, [*arguments, "--quiet"])
    assert result.stderr.startswith("della-dist: ")
    assert result.stderr.count("\n") == 1
    return result


@pytest.mark.parametrize("direction", ["reading", "writing"])
def test_a_wrong_secret(
    config: MergeConfig,
    rgw_bucket: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    direction: str,
) -> None:
    out = f"s3://{rgw_bucket}/out"
    if direction == "reading":
        config = upload_inputs(config, f"s3://{rgw_bucket}/in")
        out = str(tmp_path / "out")
    file = write_config(tmp_path / "config.yaml", config)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "UNMISTAKABLE-secret")
    __import__("s3fs").S3FileSystem.clear_instance_cache()
    refused = invoke("merge", str(file), out)
    assert refused.exit_code == 2
    assert f"s3://{rgw_bucket}/" in refused.stderr
    assert "access denied" in refused.stderr
    assert "Check the credentials" in refused.stderr
    assert "UNMISTAKABLE" not in refused.output
    assert not (tmp_path / "out").exists()
