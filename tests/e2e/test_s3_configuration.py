"""Endpoint, credentials and client options come from where users of fsspec and AWS keep them."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.servers.moto import REGION, s3_client
from tests.servers.processes import ROOT

pytestmark = pytest.mark.s3

#: Opens a store in a process that has just started, as fsspec reads its configuration then.
LOOK = """
import json, sys
from botocore import UNSIGNED
from della_dist.storage.opening import open_store
store = open_store(sys.argv[1], 24)
assert store.read("key") == b"value"
client = store._client._connected()
config = client.meta.config
keys = client._request_signer._credentials
print(json.dumps({
    "endpoint": client.meta.endpoint_url,
    "anonymous": config.signature_version is UNSIGNED,
    "key": keys.access_key if keys else None,
    "region": client.meta.region_name,
    "read_timeout": config.read_timeout,
    "connect_timeout": config.connect_timeout,
    "pool": config.max_pool_connections,
    "attempts": config.retries["total_max_attempts"],
    "style": config.s3,
}))
"""
#: The endpoint that nobody is at.
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture
def look(s3_endpoint: str, s3_bucket: str, tmp_path: Path) -> Any:
    """Return what a client is configured as, in this environment and none else."""
    with contextlib.closing(s3_client(s3_endpoint)) as client:
        public = {"Bucket": s3_bucket, "Key": "configured/key", "ACL": "public-read"}
        client.put_object(Body=b"value", **public)

    def look(**environment: str) -> dict[str, Any]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "FSSPEC_"))}
        env = {
            **kept,
            "PYTHONPATH": str(ROOT),
            "FSSPEC_CONFIG_DIR": str(tmp_path / "fsspec"),
            "AWS_CONFIG_FILE": str(tmp_path / "aws-config"),
            "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "aws-credentials"),
            "AWS_EC2_METADATA_DISABLED": "true",
            **environment,
        }
        done = subprocess.run(
            [sys.executable, "-c", LOOK, f"s3://{s3_bucket}/configured"],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            cwd=ROOT,
            env=env,
        )
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert isinstance(found, dict)
        return found

    return look


KEYS = {"AWS_ACCESS_KEY_ID": "from-env", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": REGION}


def test_the_environment_of_fsspec(look: Any, s3_endpoint: str) -> None:
    found = look(FSSPEC_S3_ENDPOINT_URL=s3_endpoint, **{**KEYS, "AWS_ENDPOINT_URL": NOWHERE})
    assert found["endpoint"] == s3_endpoint  # fsspec's wins
    assert (found["key"], found["anonymous"]) == ("from-env", False)
    # What della_dist wants where nobody says otherwise.
    assert found["attempts"] == 1
    assert (found["connect_timeout"], found["read_timeout"]) == (5, 15)
    assert found["pool"] == 24


def test_keys_in_the_environment_of_fsspec(look: Any, s3_endpoint: str) -> None:
    found = look(
        FSSPEC_S3_ENDPOINT_URL=s3_endpoint, FSSPEC_S3_KEY="from-fsspec", FSSPEC_S3_SECRET="x"
    )
    assert found["key"] == "from-fsspec"


def test_anonymous_access(look: Any, s3_endpoint: str) -> None:
    found = look(FSSPEC_S3=json.dumps({"anon": True, "endpoint_url": s3_endpoint}), **KEYS)
    assert found["anonymous"]
    assert found["endpoint"] == s3_endpoint


def test_a_configuration_file_of_fsspec(look: Any, s3_endpoint: str, tmp_path: Path) -> None:
    (tmp_path / "fsspec").mkdir()
    content = {
        "s3": {
            "client_kwargs": {"endpoint_url": s3_endpoint, "region_name": "eu-west-3"},
            "config_kwargs": {"read_timeout": 77, "s3": {"addressing_style": "path"}},
        }
    }
    (tmp_path / "fsspec" / "conf.json").write_text(json.dumps(content))
    found = look(**KEYS)
    assert (found["endpoint"], found["region"]) == (s3_endpoint, "eu-west-3")
    # The user's options win, one by one, over ours.
    assert (found["read_timeout"], found["connect_timeout"]) == (77, 5)
    assert found["style"]["addressing_style"] == "path"
    assert found["attempts"] == 1


def test_options_of_the_client_win_over_ours(look: Any, s3_endpoint: str) -> None:
    options = {
        "retries": {"total_max_attempts": 3, "mode": "standard"},
        "max_pool_connections": 7,
        "connect_timeout": 1,
    }
    configured = {"endpoint_url": s3_endpoint, "config_kwargs": options}
    found = look(FSSPEC_S3=json.dumps(configured), **KEYS)
    assert (found["attempts"], found["pool"], found["connect_timeout"]) == (3, 7, 1)
    assert found["read_timeout"] == 15


def test_a_profile_of_aws(look: Any, s3_endpoint: str, tmp_path: Path) -> None:
    (tmp_path / "aws-config").write_text(
        f"[profile lab]\nregion = eu-north-1\nendpoint_url = {s3_endpoint}\n"
    )
    (tmp_path / "aws-credentials").write_text(
        "[lab]\naws_access_key_id = from-profile\naws_secret_access_key = x\n"
    )
    for how in ({"AWS_PROFILE": "lab"}, {"FSSPEC_S3_PROFILE": "lab"}):
        found = look(**how)
        assert (found["key"], found["region"]) == ("from-profile", "eu-north-1")
        assert found["endpoint"] == s3_endpoint
