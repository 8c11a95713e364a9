"""`della_run.json`: who merged what when, over all sessions; no merge rests on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from della_dist import verify
from della_dist.config import MergeConfig
from della_dist.errors import OutputError, StorageError
from della_dist.specs.history import History
from della_dist.storage.local.store import LocalStore
from della_dist.storage.manifest import MANIFEST_NAME
from della_dist.storage.opening import open_store
from della_dist.storage.run_history import RUN_NAME, load_history
from della_dist.storage.sealed import seal, unseal
from tests import kin
from tests.interrupting import interrupt, interrupt_finishing
from tests.merging import config_for, run
from tests.staged import contents

SHARD_BYTES = 100_000
KEPT = 3


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> MergeConfig:
    """Return a merge of two experts of one backbone."""
    folder = tmp_path_factory.mktemp("family")
    base = kin.drawn(0)
    experts = [kin.save(folder / f"e{m}", kin.tuned(base, 0.05, 100 + m)) for m in range(2)]
    return config_for(kin.save(folder / "base", base), experts, parameters={"density": 0.5})


@pytest.fixture(scope="module")
def whole(config: MergeConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    run(config, out, shard_bytes=SHARD_BYTES, check=True)
    return out


def record(out: Path | str) -> History:
    return load_history(open_store(str(out)).read(RUN_NAME))


def test_one_session(config: MergeConfig, whole: Path) -> None:
    found = record(whole)
    manifest = json.loads((whole / MANIFEST_NAME).read_text())
    assert RUN_NAME not in {file["name"] for file in manifest["files"]}
    assert found.model_digest == manifest["model_digest"] == verify(str(whole)).model_digest
    (session,) = found.sessions
    assert session.engine == "local"
    assert session.cpu_s > 0
    assert (session.workers_lost, session.tasks_retried, session.stragglers) == (0, 0, 0)
    assert [shard.index for shard in found.shards] == list(range(len(manifest["shards"])))
    sizes = [file["size_bytes"] for file in manifest["shards"]]
    assert [shard.bytes_written for shard in found.shards] == sizes
    assert sum(shard.spent.bytes_read for shard in found.shards) == session.bytes_read
    assert {shard.worker for shard in found.shards} <= {"0", "1"}
    for shard in found.shards:
        spent = shard.spent
        took_s = spent.merging_s + spent.writing_s + spent.committing_s
        assert 0 <= shard.start_s <= shard.end_s <= session.elapsed_s
        assert 0 < took_s <= shard.end_s - shard.start_s + 0.01  # as rounded
        assert shard.attempt == 1
    assert found.check is not None
    assert [Path(model["model"]).name for model in found.check["models"]] == ["e0", "e1"]
    assert {model["verdict"] for model in found.check["models"]} == {"same backbone"}
    (pair,) = found.check["pairs"]
    assert pair[:2] == [0, 1]


def test_a_run_that_is_continued_adds_to_it(
    config: MergeConfig, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    interrupt(config, out, after=KEPT, shard_bytes=SHARD_BYTES, check=True)
    run(config, out, shard_bytes=SHARD_BYTES)
    found = record(out)
    first, second = found.sessions
    assert second.began_s >= first.began_s + first.elapsed_s - 0.01  # as rounded
    of_first = [shard for shard in found.shards if shard.session == 0]
    assert len(of_first) == KEPT
    assert len(found.shards) == len(record(whole).shards)
    assert first.elapsed_s == max(shard.end_s for shard in of_first)
    assert second.bytes_read == sum(s.spent.bytes_read for s in found.shards if s.session == 1)
    ours, theirs = (dict(one.check or {}) for one in (found, record(whole)))
    assert ours.pop("elapsed_s") > 0
    del theirs["elapsed_s"]
    assert ours == theirs
    assert contents(out) == contents(whole)
    # A shard that is lost later is merged in a third session.
    (out / "model-00002-of-00009.safetensors").unlink()
    run(config, out, shard_bytes=SHARD_BYTES)
    again = record(out)
    assert len(again.sessions) == 3
    assert [s for s in again.shards if s.index != 1] == [s for s in found.shards if s.index != 1]
    assert again.shards[1].session == 2
    assert again.check == found.check
    assert contents(out) == contents(whole)


def test_without_a_check(config: MergeConfig, tmp_path: Path) -> None:
    run(config, tmp_path / "out")
    assert record(tmp_path / "out").check is None


def test_killed_while_it_is_written(config: MergeConfig, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupt_finishing(config, out, RUN_NAME, shard_bytes=SHARD_BYTES)
    assert not (out / MANIFEST_NAME).exists()
    assert run(config, out, shard_bytes=SHARD_BYTES).tasks_resumed == len(record(whole).shards)
    found = record(out)
    assert len(found.sessions) == 2
    assert {shard.session for shard in found.shards} == {0}
    assert contents(out) == contents(whole)


def test_a_merge_is_whole_without_it(
    config: MergeConfig, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = LocalStore.put

    def refusing(self: LocalStore, key: str, data: bytes) -> Any:
        if key in (RUN_NAME, ".della/check.json"):
            raise StorageError("no")
        return put(self, key, data)

    out = tmp_path / "out"
    monkeypatch.setattr(LocalStore, "put", refusing)
    run(config, out, shard_bytes=SHARD_BYTES, check=True)
    assert not (out / RUN_NAME).exists()
    assert contents(out) == contents(whole)
    assert run(config, out, shard_bytes=SHARD_BYTES).already_complete


def test_what_is_unreadable_costs_no_work(config: MergeConfig, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupt(config, out, after=KEPT, shard_bytes=SHARD_BYTES, check=True)
    (out / ".della/check.json").write_bytes(b"{")
    changes: list[Any] = [{"session": {}}, None]
    for path, change in zip(sorted((out / ".della/tasks").iterdir()), changes, strict=False):
        path.write_bytes(seal({**unseal(path.read_bytes()), "run": change}))
    assert run(config, out, shard_bytes=SHARD_BYTES).tasks_resumed == KEPT
    found = record(out)
    assert len(found.shards) == len(record(whole).shards) - len(changes)
    assert found.check is None
    assert contents(out) == contents(whole)


def test_a_record_of_another_output_is_not_taken(
    config: MergeConfig, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    other = config.with_seed(7)
    run(other, out, shard_bytes=SHARD_BYTES)
    (out / RUN_NAME).write_bytes((whole / RUN_NAME).read_bytes())
    (out / "model-00002-of-00009.safetensors").unlink()
    run(other, out, shard_bytes=SHARD_BYTES)
    assert [shard.index for shard in record(out).shards] == [1]
    # Nor is what belongs to a merge that is discarded.
    run(config, out, shard_bytes=SHARD_BYTES, restart=True)
    assert len(record(out).sessions) == 1


def test_somebody_elses_file_is_in_the_way(config: MergeConfig, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / RUN_NAME).write_text("mine")
    with pytest.raises(OutputError, match=RUN_NAME):
        run(config, out)
    assert [path.name for path in out.iterdir()] == [RUN_NAME]
    assert (out / RUN_NAME).read_text() == "mine"


@pytest.mark.s3
def test_in_a_store(config: MergeConfig, s3_bucket: str) -> None:
    out = f"s3://{s3_bucket}/out"
    interrupt(config, out, after=KEPT, shard_bytes=SHARD_BYTES, check=True)
    run(config, out, shard_bytes=SHARD_BYTES)
    found = record(out)
    assert len(found.sessions) == 2
    assert len([shard for shard in found.shards if shard.session == 0]) == KEPT
    assert found.check is not None
    assert verify(out).model_digest == found.model_digest
