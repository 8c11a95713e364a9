"""Fixtures of the chaos tests: a slow merge, and an environment in which Ray speaks to clusters."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.chaos.s3_faults import Scene, make_scene
from tests.chaos.slow_merge import SlowMerge, make_slow_merge
from tests.servers.ray_cluster import RAY_ENVIRONMENT


@pytest.fixture(scope="session")
def slow_merge(tmp_path_factory: pytest.TempPathFactory) -> SlowMerge:
    """Return a merge of 31 tasks."""
    return make_slow_merge(tmp_path_factory.mktemp("slow"))


@pytest.fixture(scope="session")
def other_seed(slow_merge: SlowMerge) -> SlowMerge:
    """Return the same merge with another seed."""
    folder = slow_merge.config_path.parent
    return make_slow_merge(folder, seed=1, family=folder / "family")


@pytest.fixture(autouse=True)
def ray_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let drivers speak to the cluster as it expects."""
    for name, value in RAY_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    yield
    assert not os.environ.get("RAY_ADDRESS")


@pytest.fixture(scope="session")
def scene(s3_endpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """Checkpoints in S3, for all tests: each merges them into an output of its own."""
    return make_scene(tmp_path_factory.mktemp("family"), s3_endpoint)
