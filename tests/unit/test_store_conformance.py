"""Every store passes the same suite."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from della_dist.storage.opening import open_store
from della_dist.storage.store import Store
from tests.conformance import RemoteSuite, StoreSuite

_numbers = itertools.count()


class TestLocal(StoreSuite):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        return open_store(f"file://{tmp_path}/out")


class TestMemory(RemoteSuite):
    @pytest.fixture
    def store(self) -> Iterator[Store]:
        store = open_store(f"memory://suite-{next(_numbers)}/out")
        yield store
        for key in store.list():
            store.delete(key)


@pytest.mark.s3
class TestS3(RemoteSuite):
    @pytest.fixture
    def store(self, s3_bucket: str) -> Store:
        return open_store(f"s3://{s3_bucket}/some/prefix/")


@pytest.mark.s3
class TestS3Bucket(RemoteSuite):
    """A whole bucket."""

    @pytest.fixture
    def store(self, s3_bucket: str) -> Store:
        return open_store(f"s3://{s3_bucket}")


@pytest.mark.rgw
class TestRgw(RemoteSuite):
    """Ceph."""

    @pytest.fixture
    def store(self, rgw_bucket: str) -> Store:
        return open_store(f"s3://{rgw_bucket}/some/prefix")
