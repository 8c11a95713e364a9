"""Merges into a repository of the Hub: sent ahead shard by shard, visible in one commit."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from huggingface_hub import snapshot_download

from della_dist.cli import main
from della_dist.config import MergeConfig, config_from_mapping
from della_dist.errors import ConfigError, OutputError, RunError, StorageError, TensorDataError
from della_dist.runtime.output.commit import Output
from della_dist.runtime.verify import verify
from della_dist.storage.hub.output.client import HubClient
from della_dist.storage.hub.output.store import HubStore
from della_dist.storage.hub.output.uploads import MOST_WAITING
from della_dist.storage.local.store import LocalStore
from della_dist.storage.opening import open_output_store
from della_dist.storage.remote import retry
from della_dist.storage.run_history import RUN_NAME
from della_dist.storage.store import ObjectStat
from tests.checkpoints import load_tensors, save_checkpoint, tensor
from tests.hub import files_of
from tests.interrupting import Killed, interrupt, interrupt_finishing
from tests.merging import assert_paragraph, config_for, run, save_family, write_config
from tests.servers.hub import Hub, add_commit, set_refs
from tests.servers.hub_writes import READ_TOKEN, TOKEN
from tests.servers.processes import ROOT
from tests.servers.ray_cluster import RAY_ENVIRONMENT, ray_cluster
from tests.staged import contents

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
    # The Hub is that of all tests: no two make equal shards, which would be sent only once.
    return config_for(base, experts, parameters={"density": 0.5}, seed=100 + next(_numbers))


def test_stages(name: str, tmp_path: Path) -> None:
    """They lie beside the folder from which is uploaded, until the commit is made."""
    base, experts = save_family(tmp_path / "family")
    first = {"name": "first", **config_for(base, experts[:2], "ties").normalized()}
    second = config_for(base, [experts[2]]).normalized()
    second["models"].append({"model": "first", "parameters": {"weight": 0.5}})
    config = config_from_mapping({"stages": [first], **second}, "test")
    local = run(config, tmp_path / "local", shard_bytes=SHARD_BYTES)
    done = run(config, f"hf://{name}", shard_bytes=SHARD_BYTES, keep_stages=True)
    assert done.model_digest == local.model_digest
    assert done.stages_in is not None
    assert Path(done.stages_in).parent == staging(tmp_path)
    assert (Path(done.stages_in) / "first" / "della_manifest.json").exists()
    again = run(config, f"hf://{name}", shard_bytes=SHARD_BYTES)
    assert again.already_complete
    assert not Path(done.stages_in).exists()
    files = {p.name: p.read_bytes() for p in Path(snapshot_download(name)).glob("*.safetensors")}
    assert files == {p.name: p.read_bytes() for p in (tmp_path / "local").glob("*.safetensors")}
    anew = run(config, f"hf://{name}", shard_bytes=SHARD_BYTES, restart=True)
    assert not anew.already_complete
    assert anew.tasks_resumed == 0
    other = config.with_seed(999)
    with pytest.raises(OutputError, match="another merge"):
        run(other, f"hf://{name}", shard_bytes=SHARD_BYTES)
    done = run(other, f"hf://{name}", shard_bytes=SHARD_BYTES, restart=True)
    assert done.model_digest == run(other, tmp_path / "other", shard_bytes=SHARD_BYTES).model_digest


def test_an_input_is_no_output(name: str, config: MergeConfig) -> None:
    """Whatever revision it is read at: the same command would merge its own output."""
    run(config, f"hf://{name}")
    where = {place: place for place in config.locations()}
    where[config.models[0].model] = f"hf://{name}"
    with pytest.raises(OutputError, match="overlap"):
        run(config.with_locations(where), f"hf://{name}@other")
    with pytest.raises(ConfigError, match="not a URL"):
        run(config, f"hf://{name}", staging="s3://bucket/folder")


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
    return contents(out)


def merged(hub: Hub, name: str, branch: str = "main") -> dict[str, bytes]:
    return {k: v for k, v in hub.files(name, branch).items() if k not in (*ATTRIBUTES, RUN_NAME)}


def interrupt_when_sent(config: MergeConfig, out: str, after: int) -> None:
    """Merge until so many shards are committed, and the Hub has them.

    Killed in this process, an upload would go on in its thread.
    """
    settle = HubStore.settle

    def settle_and_wait(self: HubStore, key: str, committed: ObjectStat, sha256: str) -> None:
        settle(self, key, committed, sha256)
        assert self._uploads is not None
        self._uploads.finish()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HubStore, "settle", settle_and_wait)
        interrupt(config, out, after=after, shard_bytes=SHARD_BYTES)


def command(config: MergeConfig, tmp_path: Path, *arguments: str) -> Result:
    path = write_config(tmp_path / "config.yaml", config)
    return CliRunner().invoke(main, [arguments[0], str(path), *arguments[1:]])


def test_equal_to_a_local_output(hub: Hub, config: MergeConfig, name: str, tmp_path: Path) -> None:
    """One commit, and `snapshot_download` brings the bytes back; nothing stays here."""
    expected = whole(config, tmp_path)
    summary = run(config, f"hf://{name}", shard_bytes=SHARD_BYTES)
    assert summary.num_tasks > 4
    assert merged(hub, name) == expected
    assert len(hub.commits(name)) == 2
    downloaded = files_of(Path(snapshot_download(name, local_dir=tmp_path / "back")))
    assert {k: downloaded[k] for k in expected} == expected
    assert not list(staging(tmp_path).glob("*/*"))
    assert set(hub.objects().values()) == {1}
    assert len(verify(f"hf://{name}", recompute=3).recomputed) == 3
    assert run(config, f"hf://{name}", shard_bytes=SHARD_BYTES).already_complete
    assert len(hub.commits(name)) == 2


# ---------------------------------------------------------------- who may write, and where


def test_private_unless_public_is_asked_for(
    hub: Hub, config: MergeConfig, name: str, tmp_path: Path
) -> None:
    out = f"hf://{name}"
    result = command(config, tmp_path, "merge", out, "--public", "--quiet")
    assert result.exit_code == 0, result.output
    refs = json.loads((hub.folder / name / "refs.json").read_text())
    assert "access" not in refs
    result = command(config, tmp_path, "merge", f"{out}-private", "--quiet")
    assert result.exit_code == 0, result.output
    refs = json.loads((hub.folder / f"{name}-private" / "refs.json").read_text())
    assert refs["access"] == "private"


@pytest.mark.parametrize("public", [False, True])
def test_a_repository_that_is_there_stays_as_it_is(
    hub: Hub, config: MergeConfig, name: str, caplog: pytest.LogCaptureFixture, public: bool
) -> None:
    """And counts as empty with nothing but what the Hub puts there."""
    new = {
        ".gitattributes": b"*.safetensors filter=lfs\n",
        "README.md": b"---\nlicense: mit\n---\n",
    }
    add_commit(hub.folder, name, new)
    if public:
        set_refs(hub.folder, name, access="private")
    run(config, f"hf://{name}", public=public)
    assert ("stays private" if public else "stays public") in caplog.text
    refs = json.loads((hub.folder / name / "refs.json").read_text())
    assert (refs.get("access") == "private") == public
    assert b"# Merged model" in merged(hub, name)["README.md"]


def test_who_may_not_write(
    hub: Hub,
    config: MergeConfig,
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One paragraph, before anything is made or written."""

    def refused(out: str, *words: str) -> None:
        for verb in ("merge", "plan"):
            assert_paragraph(command(config, tmp_path, verb, out), 2, *words)

    refused("hf://other/model", "hf://other/model", "writer, team", "HF_TOKEN")
    add_commit(hub.folder, "other/taken", {"config.json": b"{}"})
    refused("hf://other/taken", "hf://other/taken", "403", "HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
    refused(f"hf://{name}", "may only read", "hf auth login")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    refused(f"hf://{name}", f"hf://{name}", "nvalid user token", "hf auth login")
    monkeypatch.delenv("HF_TOKEN")
    refused(f"hf://{name}", "needs a token, and there is none", "hf auth login", "HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(f"hf://{name}", f"hf://{name}", "HF_HUB_OFFLINE")
    assert not (hub.folder / name).exists()
    assert not staging(tmp_path).exists()


def test_places_that_cannot_be_written(
    hub: Hub, config: MergeConfig, name: str, tmp_path: Path
) -> None:
    for revision in ("refs/pr/1", "0" * 40):
        result = command(config, tmp_path, "merge", f"hf://{name}@{revision}")
        assert_paragraph(result, 2, f"hf://{name}@{revision}", "Name a branch")
    result = command(config, tmp_path, "merge", "hf://writer/double--dash")
    assert_paragraph(result, 2, "hf://writer/double--dash", "cannot be made on the Hub")
    commit = add_commit(hub.folder, name, {".gitattributes": b""})
    set_refs(hub.folder, name, **{"tag:v1": commit})
    result = command(config, tmp_path, "merge", f"hf://{name}@v1")
    assert_paragraph(result, 2, f"hf://{name}@v1", "names a tag", "Name a branch")
    for option in (["--public"], ["--staging", str(tmp_path)]):
        result = command(config, tmp_path, "merge", str(tmp_path / "out"), *option)
        assert_paragraph(result, 2, option[0], "for an output on the Hub")


def test_branches(hub: Hub, config: MergeConfig, name: str, tmp_path: Path) -> None:
    """A new one begins empty, not with what main holds."""
    run(config, f"hf://{name}", shard_bytes=SHARD_BYTES)
    main_before = hub.files(name)
    other = config.with_seed(7)
    run(other, f"hf://{name}@second", shard_bytes=SHARD_BYTES)
    assert merged(hub, name, "second") == whole(other, tmp_path)
    assert hub.files(name) == main_before
    assert len(hub.commits(name, "second")) == 2
    run(other, f"hf://{name}@second", shard_bytes=SHARD_BYTES, restart=True)
    assert verify(f"hf://{name}@second").model_digest


def test_plan_writes_nothing(hub: Hub, config: MergeConfig, name: str, tmp_path: Path) -> None:
    result = command(config, tmp_path, "plan", f"hf://{name}")
    assert result.exit_code == 0, result.output
    assert not (hub.folder / name).exists()
    assert not staging(tmp_path).exists()
    assert {seen["method"] for seen in hub.seen()} == {"GET"}


# ---------------------------------------------------------------- what is there already


@pytest.mark.parametrize("foreign", ["model-00001-of-00008.safetensors", "adapter_config.json"])
def test_files_of_somebody_else(
    hub: Hub, config: MergeConfig, name: str, tmp_path: Path, foreign: str
) -> None:
    add_commit(hub.folder, name, {foreign: b"{}", "notes.txt": b"mine"})
    before = hub.files(name)
    for verb in ("plan", "merge"):
        how = [] if verb == "plan" else ["--restart"]
        result = command(
            config, tmp_path, verb, f"hf://{name}", "--shard-size", str(SHARD_BYTES), *how
        )
        assert_paragraph(result, 2, f"hf://{name} holds", foreign)
    assert hub.files(name) == before
    assert not hub.uploads()


def test_another_merge(hub: Hub, config: MergeConfig, name: str, tmp_path: Path) -> None:
    """Refused, or with ``--restart`` replaced in one commit; other files stay."""
    out = f"hf://{name}"
    add_commit(hub.folder, name, {"LICENSE": b"mine"})
    run(config, out, shard_bytes=SHARD_BYTES)
    other = config.with_seed(7)
    with pytest.raises(OutputError, match="holds another merge"):
        run(other, out)
    run(other, out, restart=True)  # of one shard
    assert run(other, out).already_complete
    files = merged(hub, name)
    assert files.pop("LICENSE") == b"mine"
    run(other, tmp_path / "whole")
    assert files == contents(tmp_path / "whole")
    assert len(hub.commits(name)) == 3


def test_what_was_lost_is_put_back(
    hub: Hub, config: MergeConfig, name: str, tmp_path: Path
) -> None:
    out = f"hf://{name}"
    run(config, out, shard_bytes=SHARD_BYTES)
    before = hub.files(name)
    lost = sorted(before)[-3]
    assert lost.endswith(".safetensors")
    kept = {k: v for k, v in before.items() if k != lost}
    add_commit(hub.folder, name, {**kept, "README.md": b"edited"})
    hub.forget()
    summary = run(config, out, shard_bytes=SHARD_BYTES)
    assert summary.tasks_resumed == summary.num_tasks - 1
    after = hub.files(name)
    del before[RUN_NAME], after[RUN_NAME]
    assert after == {**before, "README.md": b"edited"}
    assert not hub.uploads()  # its bytes were there still
    assert verify(out).edited == ("README.md",)


# ---------------------------------------------------------------- interrupted


def test_continued(hub: Hub, config: MergeConfig, name: str, tmp_path: Path) -> None:
    """What was sent is not sent again, nor merged; nobody has seen it before the commit."""
    expected = whole(config, tmp_path)
    out = f"hf://{name}"
    interrupt_when_sent(config, out, after=3)
    assert set(hub.files(name)) == ATTRIBUTES
    again = run(config, out, shard_bytes=SHARD_BYTES)
    assert again.tasks_resumed == 3
    assert merged(hub, name) == expected
    assert set(hub.objects().values()) == {1}
    assert len(hub.commits(name)) == 2
    assert not list(staging(tmp_path).glob("*/*"))


def test_read_whole_when_continued(hub: Hub, config: MergeConfig, name: str) -> None:
    """``--verify-resumed`` asks the Hub for what was sent, and merges again what it has lost."""
    out = f"hf://{name}"
    interrupt_when_sent(config, out, after=3)
    (stored, *_) = hub.objects()
    (hub.folder / ".lfs" / stored).unlink()
    again = run(config, out, shard_bytes=SHARD_BYTES, verify_resumed=True)
    assert again.tasks_resumed == 2
    assert hub.objects()[stored] == 2
    assert verify(out).model_digest == again.model_digest


def test_what_the_hub_has_lost(hub: Hub, config: MergeConfig, name: str) -> None:
    out = f"hf://{name}"
    interrupt_when_sent(config, out, after=3)
    (stored, *_) = hub.objects()
    (hub.folder / ".lfs" / stored).unlink()
    with pytest.raises(StorageError, match=r"has lost model-\S+safetensors, .*--verify-resumed"):
        run(config, out, shard_bytes=SHARD_BYTES)
    assert set(hub.files(name)) == ATTRIBUTES
    run(config, out, shard_bytes=SHARD_BYTES, verify_resumed=True)
    assert verify(out).model_digest


def test_continued_from_another_machine(
    hub: Hub, config: MergeConfig, name: str, tmp_path: Path
) -> None:
    """It has no records, so that all is merged again, but nothing that was sent is sent again."""
    expected = whole(config, tmp_path)
    out = f"hf://{name}"
    interrupt_when_sent(config, out, after=3)
    again = run(config, out, shard_bytes=SHARD_BYTES, staging=str(tmp_path / "elsewhere"))
    assert again.tasks_resumed == 0
    assert merged(hub, name) == expected
    assert set(hub.objects().values()) == {1}
    assert list(staging(tmp_path).glob("*/*"))
    assert run(config, out, shard_bytes=SHARD_BYTES).already_complete  # and nothing waits any more
    assert not list(staging(tmp_path).glob("*/*"))
    assert len(hub.commits(name)) == 2


def test_ended_before_the_commit_is_known(
    hub: Hub, config: MergeConfig, name: str, tmp_path: Path
) -> None:
    """The commit is there, and no second one is made."""
    commit = HubClient.commit

    def commit_and_die(self: HubClient, *arguments: object) -> None:
        commit(self, *arguments)  # type: ignore[arg-type]
        raise Killed

    out = f"hf://{name}"
    run(config.with_seed(7), out, shard_bytes=SHARD_BYTES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HubClient, "commit", commit_and_die)
        with pytest.raises(Killed):
            run(config, out, shard_bytes=2 * SHARD_BYTES, restart=True)
    assert list(staging(tmp_path).glob("*/.della/hub/*"))
    assert len(hub.commits(name)) == 3
    assert run(config, out, shard_bytes=2 * SHARD_BYTES).already_complete
    assert len(hub.commits(name)) == 3
    assert not list(staging(tmp_path).glob("*/*"))
    run(config, tmp_path / "same", shard_bytes=2 * SHARD_BYTES)
    assert merged(hub, name) == contents(tmp_path / "same")


@pytest.mark.parametrize("at", ["config.json", "README.md", "della_tensors.parquet"])
def test_ended_while_the_small_files_are_written(
    hub: Hub, config: MergeConfig, name: str, tmp_path: Path, at: str
) -> None:
    expected = whole(config, tmp_path)
    interrupt_finishing(config, f"hf://{name}", at, shard_bytes=SHARD_BYTES)
    assert set(hub.files(name)) == ATTRIBUTES
    summary = run(config, f"hf://{name}", shard_bytes=SHARD_BYTES)
    assert summary.tasks_resumed == summary.num_tasks
    assert merged(hub, name) == expected
    assert len(hub.commits(name)) == 2


def test_somebody_else_commits_meanwhile(
    hub: Hub, config: MergeConfig, name: str, tmp_path: Path
) -> None:
    """The run ends, nothing of it is seen, and the next one only commits."""
    out = f"hf://{name}"
    finish = Output.finish

    def finish_after_them(self: Output, *how: Any) -> Any:
        add_commit(hub.folder, name, {**hub.files(name), "notes.txt": b"theirs"})
        return finish(self, *how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Output, "finish", finish_after_them)
        with pytest.raises(RunError, match=rf"{out} was changed while .* somebody else committed"):
            run(config, out, shard_bytes=SHARD_BYTES)
    assert set(hub.files(name)) == {*ATTRIBUTES, "notes.txt"}
    summary = run(config, out, shard_bytes=SHARD_BYTES)
    assert summary.tasks_resumed == summary.num_tasks
    assert set(hub.objects().values()) == {1}
    files = merged(hub, name)
    assert files.pop("notes.txt") == b"theirs"
    assert files == whole(config, tmp_path)


def test_two_at_once(hub: Hub, config: MergeConfig, name: str) -> None:
    """On one machine the second is refused by the lock."""
    out = f"hf://{name}"
    with (
        open_output_store(out).lock("pid 42 on host h"),
        pytest.raises(OutputError, match=r"being written by another run \(pid 42 on host h"),
    ):
        run(config, out)


def test_an_input_that_is_refused_late(
    hub: Hub, config: MergeConfig, name: str, tmp_path: Path
) -> None:
    """Nothing of the run is left here, or in the repository."""
    shard = tmp_path / "family" / "expert0" / "model.safetensors"
    data = load_tensors(shard.parent)
    last = "model.layers.1.self_attn.q_proj.weight"
    spoiled = np.full(data[last].shape, np.nan)
    shutil.rmtree(shard.parent)
    save_checkpoint(shard.parent, {**data, last: tensor(spoiled, data[last].dtype)})
    with pytest.raises(TensorDataError, match=re.escape(last)):
        run(config, f"hf://{name}", shard_bytes=SHARD_BYTES, workers=1)
    assert set(hub.files(name)) == ATTRIBUTES
    assert not list(staging(tmp_path).glob("*/*"))


# ---------------------------------------------------------------- how it goes up


@pytest.mark.ray
def test_by_actors_that_may_not_write(
    hub: Hub, config: MergeConfig, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They write to a folder that is shared, and only the driver has a token."""
    for variable, value in RAY_ENVIRONMENT.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.delenv("HF_TOKEN")
    with ray_cluster(2, 1) as cluster:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        shared = tmp_path / "shared"
        run(
            config,
            f"hf://{name}",
            engine="ray",
            address=cluster.address,
            shard_bytes=SHARD_BYTES,
            staging=str(shared),
        )
    assert merged(hub, name) == whole(config, tmp_path)
    assert len(hub.commits(name)) == 2
    assert set(hub.objects().values()) == {1}
    assert not list(shared.iterdir())


def test_the_token_goes_to_the_hub_alone(
    hub: Hub, config: MergeConfig, name: str, tmp_path: Path
) -> None:
    """Not to the store, whose addresses are signed, nor into anything that is written."""
    hub.use(chunk_bytes=SHARD_BYTES // 3)
    read = LocalStore.put
    written: list[bytes] = []

    def put(self: LocalStore, key: str, data: bytes) -> Any:
        written.append(data)
        return read(self, key, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalStore, "put", put)
        how = ["--debug", "--shard-size", str(SHARD_BYTES)]
        result = command(config, tmp_path, "merge", f"hf://{name}", *how)
    assert result.exit_code == 0, result.output
    told = {
        who: {s["authorization"] for s in hub.seen() if s["who"] == who} for who in ("hub", "store")
    }
    assert told["hub"] >= {f"Bearer {TOKEN}"}
    assert told["store"] == {""}
    assert any("/.parts/" in upload.path for upload in hub.uploads())
    for data in (result.output.encode(), *written, *hub.files(name).values()):
        assert TOKEN.encode() not in data
        assert b"Signature=" not in data


def test_the_folder_holds_a_few_shards(hub: Hub, name: str, tmp_path: Path) -> None:
    """However slowly they are sent."""
    hub.use(bytes_per_s=1_000_000)
    rng = np.random.default_rng(0)
    tensors = {f"layer{i:02d}": tensor(rng.normal(size=(50, 200)), "F32") for i in range(20)}
    config = config_for(*save_family(tmp_path / "many", tensors))
    most = 0

    def look() -> None:
        nonlocal most
        here = [p for p in staging(tmp_path).rglob("*.safetensors*") if p.suffix != ".json"]
        most = max(most, len(here))

    over = threading.Event()

    def keep_looking() -> None:
        while not over.wait(0.005):
            look()

    looking = threading.Thread(target=keep_looking)
    looking.start()
    try:
        summary = run(config, f"hf://{name}", shard_bytes=40_000, workers=2)
    finally:
        over.set()
        looking.join()
    assert summary.num_tasks > 2 * (MOST_WAITING + 1 + 2)
    # One more, which the run is held up with, and those that the workers write.
    assert 0 < most <= MOST_WAITING + 1 + 2
    assert len(hub.commits(name)) == 2


def test_shards_that_the_hub_takes_with_the_commit(
    hub: Hub, config: MergeConfig, name: str, tmp_path: Path
) -> None:
    """As it may do with small ones: they wait for it here."""
    hub.use(regular=True)
    out = f"hf://{name}"
    interrupt(config, out, after=3, shard_bytes=SHARD_BYTES)
    assert run(config, out, shard_bytes=SHARD_BYTES).tasks_resumed == 3
    hub.use()
    assert merged(hub, name) == whole(config, tmp_path)
    assert not list(staging(tmp_path).glob("*/*"))


def test_a_repository_that_ignores_shards(
    hub: Hub, config: MergeConfig, name: str, tmp_path: Path
) -> None:
    """What git would leave out without a word is refused."""
    add_commit(hub.folder, name, {".gitignore": b"*.safetensors"})
    result = command(config, tmp_path, "merge", f"hf://{name}", "--quiet")
    assert_paragraph(result, 1, f"hf://{name}", ".gitignore", "model")
    assert set(hub.files(name)) == {".gitignore"}
    add_commit(hub.folder, name, {".gitattributes": b""})
    result = command(config, tmp_path, "merge", f"hf://{name}", "--quiet")
    assert result.exit_code == 0, result.output
    assert not list(staging(tmp_path).glob("*/*"))


def test_a_file_that_the_commit_lacks(
    hub: Hub, config: MergeConfig, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run does not say that it is done."""
    monkeypatch.setattr(retry, "PATIENCE_S", 0.5)
    hub.use(left_out="config.json")
    with pytest.raises(StorageError, match=r"the branch has not got config\.json"):
        run(config, f"hf://{name}")
    hub.use()
    run(config, f"hf://{name}")
    assert verify(f"hf://{name}").num_files == len(merged(hub, name))


def test_the_right_is_lost_meanwhile(
    hub: Hub, config: MergeConfig, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is merged and sent is kept: another token goes on with it."""
    out = f"hf://{name}"
    finish = Output.finish

    def finish_without(self: Output, *how: Any) -> Any:
        monkeypatch.setenv("HF_TOKEN", "hf_revoked")
        return finish(self, *how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Output, "finish", finish_without)
        with pytest.raises((RunError, StorageError), match=re.escape(out)):
            run(config, out, shard_bytes=SHARD_BYTES)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    again = run(config, out, shard_bytes=SHARD_BYTES)
    assert again.tasks_resumed == again.num_tasks
    assert set(hub.objects().values()) == {1}
    assert len(hub.commits(name)) == 2


def test_a_shard_that_was_damaged_while_it_waited(
    hub: Hub, config: MergeConfig, name: str, tmp_path: Path
) -> None:
    hub.use(regular=True)
    out = f"hf://{name}"
    interrupt(config, out, after=3, shard_bytes=SHARD_BYTES)
    hub.use()
    (folder,) = staging(tmp_path).iterdir()
    record = min(folder.glob(".della/tasks/*.json"))
    shard = folder / json.loads(record.read_text())["name"]
    stat = shard.stat()
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    with shard.open("r+b") as file:
        file.write(data)
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    again = run(config, out, shard_bytes=SHARD_BYTES, verify_resumed=True)
    assert again.tasks_resumed == 2
    assert merged(hub, name) == whole(config, tmp_path)


def test_a_signal_does_not_wait_for_what_is_being_sent(
    hub: Hub, config: MergeConfig, name: str, tmp_path: Path
) -> None:
    hub.use(bytes_per_s=100)  # a shard would take a quarter of an hour
    path = write_config(tmp_path / "config.yaml", config)
    command = [sys.executable, "-m", "della_dist", "merge", str(path), f"hf://{name}"]
    process = subprocess.Popen(
        [*command, "--shard-size", str(SHARD_BYTES)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    with process:
        while not any("/info/lfs/" in seen["target"] for seen in hub.seen()):
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert stderr.endswith("della-dist: interrupted; the same command continues.\n")
    hub.use()
    assert run(config, f"hf://{name}", shard_bytes=SHARD_BYTES).tasks_resumed > 0
    assert merged(hub, name) == whole(config, tmp_path)
