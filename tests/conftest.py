"""Fixtures for all tests: S3 servers and buckets in them, a Hub and its cache."""

from __future__ import annotations

import functools
import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar
from unittest import mock

import botocore.session
import pytest

from tests.servers.hub import Hub, hub_server
from tests.servers.moto import KEYS, make_bucket, moto_server, s3_environment
from tests.servers.rgw import rgw_server
from tests.servers.s3rver import S3RVER_KEYS, s3rver_server

pytest.register_assert_rewrite("della_dist.testing")

# No test, and no process of one, asks the real Hub; before anything imports huggingface_hub.
os.environ.update(HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9", HF_HOME="/nonexistent")
for _name in ("HF_TOKEN", "HF_HUB_CACHE", "TRANSFORMERS_OFFLINE"):
    os.environ.pop(_name, None)

T = TypeVar("T")

_numbers = itertools.count()


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist looks at the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the processors busy (`pytest -n`): spread the tests that wait among those that compute.

    Modules of tests that start Ray stay together on one worker each, for they share a cluster. All
    others are distributed test by test, in order: a worker makes fixtures of a module once.
    """
    if not hasattr(config, "workerinput"):
        return
    clusters, waiting, computing = [], [], []
    for module, found in itertools.groupby(items, lambda item: item.location[0]):
        tests = list(found)
        if all(item.get_closest_marker("ray") for item in tests):
            for item in tests:
                item.add_marker(pytest.mark.xdist_group(module))
            clusters.append(tests)
        elif module.startswith("tests/chaos/"):
            waiting += [[item] for item in tests]
        else:
            computing.append(tests)
    rest = spread(waiting, computing)
    last = len(rest) * 2 // 3  # what takes long does not come last
    items[:] = itertools.chain(*spread(clusters, rest[:last]), *rest[last:])


def spread(few: list[T], many: list[T]) -> list[T]:
    """Return all of both in their orders, the few evenly among the many."""
    step = max(1, len(many) // max(1, len(few)))
    mixed = []
    for i, one in enumerate(few):
        mixed += [one, *many[i * step : (i + 1) * step]]
    return mixed + many[len(few) * step :]


@pytest.fixture(scope="session", autouse=True)
def one_loader() -> Iterator[None]:
    """Let all clients of S3 share the description of its requests: each would parse megabytes."""
    with mock.patch.object(
        botocore.session, "create_loader", functools.cache(botocore.session.create_loader)
    ):
        yield


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """One moto server for the whole session; its endpoint URL."""
    with moto_server() as endpoint:
        yield endpoint


@pytest.fixture
def s3_bucket(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A fresh, empty bucket's name; the environment sends S3 clients to its server."""
    return _bucket(s3_endpoint, monkeypatch)


@pytest.fixture(scope="session")
def rgw_endpoint() -> Iterator[str]:
    """One Ceph gateway for the whole session; its endpoint URL."""
    with rgw_server() as endpoint:
        yield endpoint


@pytest.fixture
def rgw_bucket(rgw_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A fresh, empty bucket's name in Ceph; the environment sends S3 clients there."""
    return _bucket(rgw_endpoint, monkeypatch)


@pytest.fixture(scope="session")
def s3rver_endpoint() -> Iterator[str]:
    """One s3rver for the whole session; its endpoint URL."""
    with s3rver_server() as endpoint:
        yield endpoint


@pytest.fixture
def s3rver_bucket(s3rver_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A fresh, empty bucket's name in s3rver; the environment sends S3 clients there."""
    return _bucket(s3rver_endpoint, monkeypatch, S3RVER_KEYS)


def _bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch, keys: tuple[str, str] = KEYS) -> str:
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in s3_environment(endpoint, keys).items():
        monkeypatch.setenv(name, value)
    # fsspec hands out old instances by their arguments, and those keep their old endpoint.
    if "s3fs" in sys.modules:
        sys.modules["s3fs"].S3FileSystem.clear_instance_cache()
    bucket = f"bucket-{next(_numbers)}"
    make_bucket(endpoint, bucket, keys)
    return bucket


@pytest.fixture(scope="session")
def hub_of_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """One Hub for the whole session; tests name their repositories differently."""
    with hub_server(tmp_path_factory.mktemp("hub")) as hub:
        yield hub


@pytest.fixture
def hub(hub_of_session: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The Hub that this process and its children ask; an empty cache is ``tmp_path / "hf"``."""
    hub_of_session.forget()
    hub_of_session.use()
    ask_hub(hub_of_session.endpoint, tmp_path / "hf", monkeypatch)
    return hub_of_session


def ask_hub(endpoint: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send `huggingface_hub` to an endpoint and a cache, here and in child processes."""
    from huggingface_hub import constants

    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    monkeypatch.setenv("HF_HOME", str(home))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    # The server speaks the protocol for large files that every Hub has, and not that of hf_xet.
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    # It reads them when it is imported.
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HOME", str(home))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
