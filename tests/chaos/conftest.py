"""Fixtures of the chaos tests."""

from __future__ import annotations

import pytest

from tests.chaos.s3_faults import Scene, make_scene


@pytest.fixture(scope="session")
def scene(s3_endpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """Checkpoints in S3, for all tests: each merges them into an output of its own."""
    return make_scene(tmp_path_factory.mktemp("family"), s3_endpoint)
