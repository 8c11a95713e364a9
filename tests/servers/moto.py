"""An S3 server of a test's own: moto, in its own process."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from tests.servers.processes import running, wait_for_line

ACCESS_KEY = "testing"
SECRET_KEY = "testing-secret"
#: What servers that know more than one account are told.
KEYS = (ACCESS_KEY, SECRET_KEY)
REGION = "us-east-1"


@contextmanager
def moto_server(host: str = "127.0.0.1") -> Iterator[str]:
    """Run a moto server on a free port of `host`; yield its endpoint URL.

    It holds all objects in memory and serves about 130 MB/s. Conditions hold: If-None-Match on
    PUT and on CompleteMultipartUpload, If-Match on PUT (with or without quotes), GET and DELETE,
    but not If-Match on CompleteMultipartUpload. Nothing is verified: not signatures, payload
    hashes, Content-MD5 or checksums; checksums come back on GET as the client sent them.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "moto.log"
        # Port 0: the server binds a free port and names it, so that no other process can take it.
        command = [sys.executable, "-m", "moto.server", "-H", host, "-p", "0"]
        with running(command, log) as process:
            found = wait_for_line(process, log, r"Running on (http://[\d.]+:\d+)\s")
            yield found[1]


def s3_environment(endpoint: str, keys: tuple[str, str] = KEYS) -> dict[str, str]:
    """Return the environment variables that send S3 clients to `endpoint` and nowhere else."""
    return {
        "AWS_ACCESS_KEY_ID": keys[0],
        "AWS_SECRET_ACCESS_KEY": keys[1],
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_DEFAULT_REGION": REGION,
        # Without these a client may ask the instance metadata service or read ~/.aws.
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": "/dev/null",
        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
    }


def s3_client(endpoint: str, **config: Any) -> Any:
    """Return a boto3 client for `endpoint`; `config` goes to botocore's Config.

    Close it (`contextlib.closing`): its pool holds open sockets.
    """
    return _client(endpoint, KEYS, config)


def make_bucket(endpoint: str, name: str, keys: tuple[str, str] = KEYS) -> None:
    """Create a bucket."""
    with closing(_client(endpoint, keys, {})) as client:
        client.create_bucket(Bucket=name)


def _client(endpoint: str, keys: tuple[str, str], config: Mapping[str, Any]) -> Any:
    import boto3
    from botocore.config import Config

    return boto3.client(
        "s3",
        endpoint_url=endpoint,
        aws_access_key_id=keys[0],
        aws_secret_access_key=keys[1],
        region_name=REGION,
        config=Config(s3={"addressing_style": "path"}, **config),
    )
