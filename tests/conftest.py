"""Fixtures for all tests: an S3 server and buckets in it."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator

import pytest

from tests.servers.moto import make_bucket, moto_server, s3_environment

_numbers = itertools.count()


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """One moto server for the whole session; its endpoint URL."""
    with moto_server() as endpoint:
        yield endpoint


@pytest.fixture
def s3_bucket(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A fresh, empty bucket's name; the environment sends S3 clients to its server."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in s3_environment(s3_endpoint).items():
        monkeypatch.setenv(name, value)
    # fsspec hands out old instances by their arguments, and those keep their old endpoint.
    if "s3fs" in sys.modules:
        sys.modules["s3fs"].S3FileSystem.clear_instance_cache()
    bucket = f"bucket-{next(_numbers)}"
    make_bucket(s3_endpoint, bucket)
    return bucket
