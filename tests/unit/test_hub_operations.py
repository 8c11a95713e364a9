"""What della_dist knows of the inside of `huggingface_hub`: it fails here if that changes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from della_dist.storage.hub.output.operations import (
    addition,
    is_ignored,
    is_uploaded,
    uploaded_addition,
)
from tests.servers.hub import Hub
from tests.servers.hub_writes import TOKEN

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
DATA = bytes(range(256)) * 50


@pytest.fixture
def api(hub: Hub) -> HfApi:
    return HfApi(endpoint=hub.endpoint, token=TOKEN)


def test_a_file_that_was_sent_by_another_process(hub: Hub, api: HfApi) -> None:
    """It is in the commit by its digest, and nothing is asked or sent."""
    api.create_repo("writer/operations", private=True)
    first = addition("a.safetensors", DATA)
    assert not is_uploaded(first)
    api.preupload_lfs_files("writer/operations", [first], free_memory=False)
    assert is_uploaded(first)
    assert not is_ignored(first)
    hub.forget()
    again = uploaded_addition("a.safetensors", len(DATA), hashlib.sha256(DATA).hexdigest())
    assert is_uploaded(again)
    api.create_commit("writer/operations", [again], commit_message="test")
    assert not hub.uploads()
    assert not any("preupload" in seen["target"] for seen in hub.seen())
    assert not any("/lfs/" in seen["target"] for seen in hub.seen())
    assert hub.files("writer/operations")["a.safetensors"] == DATA


def test_a_file_that_goes_with_the_commit(hub: Hub, api: HfApi, tmp_path: Path) -> None:
    api.create_repo("writer/small", private=True)
    (tmp_path / "a.json").write_bytes(b"{}")
    small = addition("a.json", tmp_path / "a.json")
    api.preupload_lfs_files("writer/small", [small], free_memory=False)
    assert not is_uploaded(small)
    assert small.upload_info.sha256 == hashlib.sha256(b"{}").digest()


def test_a_file_that_git_ignores(hub: Hub, api: HfApi) -> None:
    api.create_repo("writer/ignoring", private=True)
    api.upload_file(
        path_or_fileobj=b"*.safetensors", path_in_repo=".gitignore", repo_id="writer/ignoring"
    )
    ignored = addition("a.safetensors", DATA)
    api.preupload_lfs_files("writer/ignoring", [ignored], free_memory=False)
    assert is_ignored(ignored)
    assert not is_uploaded(ignored)
