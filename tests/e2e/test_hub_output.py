"""Merges into a repository of the Hub: sent ahead shard by shard, visible in one commit."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from huggingface_hub import snapshot_download

from della_dist.cli import main
from della_dist.config import MergeConfig
from della_dist.errors import OutputError, RunError
from della_dist.runtime.verify import verify
from tests.hub import files_of
from tests.interrupting import interrupt, interrupt_finishing
from tests.merging import assert_paragraph, config_for, run, save_family, write_config
from tests.servers.hub import Hub, add_commit, set_refs
from tests.servers.hub_writes import READ_TOKEN, TOKEN

# Of huggingface_hub's own calls of its HTTP client.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

#: Several shards of the family.
SHARD_BYTES = 100_000
ATTRIBUTES = {".gitattributes"}

_numbers = itertools.count()


@pytest.fixture
def config(tmp_path: Path) -> MergeConfig:
    base, experts = save_family(tmp_path / "family")
    (base / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (base / "sub").mkdir()
    (base / "sub" / "more.json").write_text(json.dumps({"of": "base"}))
    return config_for(base, experts)


@pytest.fixture
def name(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> str:
    """A repository that nobody has made, under a user who may."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return f"writer/merged{next(_numbers)}"


def staging(tmp_path: Path) -> Path:
    return tmp_path / "hf" / "della-dist"


def whole(config: MergeConfig, tmp_path: Path) -> dict[str, bytes]:
    """Return the files of the same merge into a directory."""
    out = tmp_path / "whole"
    run(config, out, shard_bytes=SHARD_BYTES)
    return files_of(out)


def merged(hub: Hub, name: str, branch: str = "main") -> dict[str, bytes]:
    return {k: v for k, v in hub.files(name, branch).items() if k not in ATTRIBUTES}


def sent(hub: Hub) -> Counter[str]:
    """Return how often each whole body was sent to the store."""
    return Counter(upload.path for upload in hub.uploads() if upload.is_whole)


def command(config: MergeConfig, tmp_path: Path, *arguments: str) -> Result:
    path = write_config(tmp_path / "config.yaml", config)
    return CliRunner().invoke(main, [arguments[0], str(path), *arguments[1:]])


def test_equal_to_a_local_output(
    hub: Hub, config: MergeConfig, name: str, tmp_path: Path
) -> None:
    """One commit, and `snapshot_download` brings the bytes back; nothing stays here."""
    expected = whole(config, tmp_path)
    summary = run(config, f"hf://{name}", shard_bytes=SHARD_BYTES)
    assert summary.num_tasks > 4
    assert merged(hub, name) == expected
    assert len(hub.commits(name)) == 2
    downloaded = files_of(Path(snapshot_download(name, local_dir=tmp_path / "back")))
    assert {k: downloaded[k] for k in expected} == expected
    assert not list(staging(tmp_path).glob("*/*"))
    assert set(sent(hub).values()) == {1}
    assert len(verify(f"hf://{name}", recompute=3).recomputed) == 3
    assert run(config, f"hf://{name}", shard_bytes=SHARD_BYTES).already_complete
    assert len(hub.commits(name)) == 2
