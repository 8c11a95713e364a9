"""Merges of models that lie on the Hub, read there in ranges or from its cache."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from huggingface_hub import constants, snapshot_download

from della_dist import check, plan
from della_dist.cli import main
from della_dist.errors import ConfigError, InputChangedError, OutputError, StorageError
from della_dist.runtime.verify import verify
from della_dist.storage.hub import snapshot as hub_snapshot
from della_dist.storage.opening import open_store, resolved
from della_dist.storage.remote import retry
from tests.checkpoints import load_tensors
from tests.conftest import ask_hub
from tests.hub import Family, files_of, publish
from tests.interrupting import interrupt
from tests.merging import assert_paragraph, config_for, run, write_config
from tests.servers.faults import FaultName
from tests.servers.hub import Hub, add_commit, hub_server, set_refs
from tests.servers.hub_writes import TOKEN
from tests.servers.proxy import Rule, faulty_proxy
from tests.servers.ray_cluster import RAY_ENVIRONMENT, ray_cluster

NO_SERVER = "http://127.0.0.1:9"


@pytest.fixture
def family(hub: Hub, tmp_path: Path) -> Family:
    return Family(hub, tmp_path)


def download(family: Family) -> None:
    """Put every model into the cache, as any other program does."""
    for path in (family.base, *family.experts):
        snapshot_download(family.name(path))
    hub_snapshot.forget_snapshots()  # what another process would find


def targets(hub: Hub, who: str) -> list[str]:
    return [seen["target"] for seen in hub.seen() if seen["who"] == who]


def command(folder: Path, family: Family, *arguments: str, **names: str) -> Result:
    config = write_config(folder / "config.yaml", family.config(names=names))
    return CliRunner().invoke(main, [arguments[0], str(config), *arguments[1:]])


def test_a_sample_is_read_in_ranges(hub: Hub, family: Family, tmp_path: Path) -> None:
    """The same figures as of local folders, and nothing is stored."""
    found = check(family.config(), sample_bytes=1 << 20)
    here = check(family.local_config(), sample_bytes=1 << 20)
    assert [dataclasses.replace(one, model="", reference="") for one in found.models] == [
        dataclasses.replace(one, model="", reference="") for one in here.models
    ]
    assert {one.verdict for one in found.models} == {"same backbone"}
    assert found.bytes_read == here.bytes_read < 1 << 20
    assert not (tmp_path / "hf" / "hub").exists()


def test_read_in_ranges(hub: Hub, family: Family, tmp_path: Path) -> None:
    """The same bytes as of local folders, and nothing is stored."""
    local = run(family.local_config(), tmp_path / "local-out")
    out = tmp_path / "out"
    summary = run(family.config(), out)
    assert summary.model_digest == local.model_digest
    assert load_tensors(out) == load_tensors(tmp_path / "local-out")
    assert json.loads((out / "sub" / "more.json").read_text()) == {"of": "base"}
    assert not (tmp_path / "hf" / "hub").exists()
    assert summary.bytes_read == plan(family.config()).bytes_to_read == local.bytes_read
    assert len(verify(str(out), recompute=5).recomputed) == 5
    recipe = (out / "README.md").read_text()
    for path in (family.base, *family.experts):
        name = family.name(path)
        assert f"\n- {name}\n" in recipe  # for the Hub
        assert f"model: hf://{name}@{family.commits[path.name]}\n" in recipe  # to repeat it


@pytest.mark.ray
def test_read_by_actors(
    hub: Hub, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They ask the Hub themselves, and have the environment of their node."""
    for name, value in RAY_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    with ray_cluster(1, 2) as cluster:
        summary = run(family.config(), tmp_path / "out", engine="ray", address=cluster.address)
    assert summary.model_digest == run(family.local_config(), tmp_path / "o").model_digest


def test_read_from_the_cache(hub: Hub, family: Family, tmp_path: Path) -> None:
    download(family)
    hub.forget()
    summary = run(family.config(), tmp_path / "out", memory_bytes=32 << 20)
    assert not targets(hub, "store")
    assert not any("/resolve/" in target for target in targets(hub, "hub"))
    assert summary.model_digest == run(family.local_config(), tmp_path / "o").model_digest
    assert len(verify(str(tmp_path / "out"), recompute=5).recomputed) == 5


def test_begun_from_the_hub_and_ended_from_the_cache(
    hub: Hub, family: Family, tmp_path: Path
) -> None:
    """One commit is one input, wherever it is read."""
    out = tmp_path / "out"
    interrupt(family.config(), out, after=1, shard_bytes=300_000)
    download(family)
    summary = run(family.config(), out, shard_bytes=300_000)
    assert summary.tasks_resumed == 1
    assert summary.model_digest == run(family.local_config(), tmp_path / "o").model_digest
    assert run(family.config(), out, shard_bytes=300_000).already_complete


def test_a_revision_that_the_cache_lacks(
    hub: Hub, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    download(family)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    name, commit = family.name(family.base), family.commits["base"]
    lacks = f"{name} is in the cache, but not its revision v9 (there: "
    assert_paragraph(command(tmp_path, family, "plan", base=f"{name}@v9"), 2, f"{lacks}main)")
    (constants.HF_HUB_CACHE / Path(f"models--{name.replace('/', '--')}/refs/main")).unlink()
    assert_paragraph(command(tmp_path, family, "plan", base=f"{name}@v9"), 2, f"{lacks}{commit})")
    nothing = command(tmp_path, family, "plan", base="user/nothing")
    both = command(tmp_path, family, "plan", base=f"{name}@{'0' * 40}", expert0="user/nothing")
    assert_paragraph(both, 2, "2 problems", "not its revision 0000", "user/nothing is not in")
    assert_paragraph(nothing, 2, "user/nothing is not in the cache")


def test_one_commit_in_two_ways(hub: Hub, family: Family, tmp_path: Path) -> None:
    name = family.name(family.base)
    pinned = f"{name}@{family.commits['base']}"
    said = f"{pinned} and {name} are the same checkpoint"
    assert_paragraph(command(tmp_path, family, "plan", expert0=pinned), 2, said)


def test_what_is_missing_is_said_at_once(family: Family, tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    result = command(tmp_path, family, "plan", base="user/nothing", expert0=missing)
    first = "2 problems. (1) there is no directory user/nothing, and hf://user/nothing does not"
    assert_paragraph(result, 2, first, f"(2) checkpoint {missing} does not exist")


@pytest.mark.parametrize("unreachable", [False, True])
def test_offline(
    hub: Hub,
    family: Family,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    unreachable: bool,
) -> None:
    download(family)
    local = run(family.local_config(), tmp_path / "o")  # and the kernels are compiled
    hub.forget()
    if unreachable:
        monkeypatch.setattr(constants, "ENDPOINT", NO_SERVER)
    else:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    started_s = time.monotonic()
    summary = run(family.config(), tmp_path / "out")
    assert time.monotonic() - started_s < 10  # nobody waits for what is not needed
    assert not hub.seen()
    assert ("Going by what the cache has" in caplog.text) == unreachable
    assert summary.model_digest == local.model_digest


def test_a_part_of_a_model_in_the_cache(hub: Hub, family: Family, tmp_path: Path) -> None:
    """What is missing is read from the Hub, so that no file beside the weights is forgotten."""
    snapshot_download(family.name(family.base), allow_patterns="*.safetensors")
    snapshot_download(family.name(family.experts[0]), allow_patterns="*.json")
    damaged = snapshot_download(family.name(family.experts[1]))
    blob = (Path(damaged) / "model.safetensors").resolve()
    blob.write_bytes(blob.read_bytes()[:-1])  # a download that was cut short
    hub_snapshot.forget_snapshots()
    hub.forget()
    summary = run(family.config(), tmp_path / "out")
    assert summary.model_digest == run(family.local_config(), tmp_path / "o").model_digest
    assert (tmp_path / "out" / "sub" / "more.json").is_file()
    read = {target.split("/")[2] for target in targets(hub, "store")}
    assert read == {"expert0", "expert1", "expert2"}


def test_a_file_of_the_cache_that_is_cut_meanwhile(hub: Hub, family: Family) -> None:
    folder = Path(snapshot_download(family.name(family.base)))
    store = open_store(f"hf://{family.name(family.base)}")
    shards = [key for key in store.list() if key.endswith(".safetensors")]
    os.truncate((folder / shards[0]).resolve(), 100)
    with pytest.raises(InputChangedError, match="cut short in the cache"):
        store.open_reader(shards[0])


def test_downloaded_first(hub: Hub, family: Family, tmp_path: Path) -> None:
    """Into the cache, from which everybody reads; weights in other formats are not fetched."""
    files = {**files_of(family.base), "pytorch_model.bin": b"other weights"}
    add_commit(hub.folder, family.name(family.base), files)
    snapshot_download(family.name(family.experts[0]), allow_patterns="*.json")  # a part is there
    hub_snapshot.forget_snapshots()
    summary = run(family.config(), tmp_path / "out", download=True)
    assert summary.model_digest == run(family.local_config(), tmp_path / "o").model_digest
    fetched = [target for target in targets(hub, "hub") if "/resolve/" in target]
    assert fetched
    assert not any("pytorch_model.bin" in target for target in fetched)
    hub_snapshot.forget_snapshots()
    hub.forget()
    assert run(family.config(), tmp_path / "out", download=True).already_complete
    assert verify(str(tmp_path / "out"), recompute=3).recomputed
    assert not targets(hub, "store")  # of weights, nothing is asked again


def test_what_cannot_be_downloaded(
    hub: Hub, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_refs(hub.folder, family.name(family.experts[0]), access="gated")
    result = command(tmp_path, family, "merge", str(tmp_path / "out"), "--download", "--quiet")
    assert_paragraph(result, 2, f"hf://{family.name(family.experts[0])}", "gated")
    assert not (tmp_path / "out").exists()
    set_refs(hub.folder, family.name(family.experts[0]), access="")
    download(family)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    summary = run(family.config(), tmp_path / "out", download=True)
    assert summary.model_digest == run(family.local_config(), tmp_path / "o").model_digest


def test_revisions(hub: Hub, family: Family, tmp_path: Path) -> None:
    """A branch is what it is when a run begins; an output of another commit is not continued."""
    base, first = family.name(family.base), family.experts[0]
    publish(hub, family.experts[1], family.name(first), "refs/pr/1")
    names = {"expert0": f"{family.name(first)}@refs/pr/1", "expert1": f"hf://{family.name(first)}"}
    swapped = run(family.config(names=names), tmp_path / "swapped")
    order = [family.experts[1], first, family.experts[2]]
    same = run(config_for(family.base, order), tmp_path / "same")
    assert swapped.model_digest == same.model_digest
    commit = family.commits["base"]
    assert resolved(base) == resolved(f"{base}@main") == f"hf://{base}@{commit}"
    assert resolved(f"{base}@{commit}") == f"hf://{base}@{commit}"

    out = tmp_path / "out"
    run(family.config(), out)
    publish(hub, family.experts[2], family.name(first))
    with pytest.raises(OutputError, match=rf"hf://{family.name(first)}@\w+/model.*: version was"):
        run(family.config(), out)
    pinned = {"expert0": f"{family.name(first)}@{family.commits['expert0']}"}
    assert run(family.config(names=pinned), out).already_complete


def test_a_local_folder_of_that_name_wins(
    hub: Hub, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(family.user).symlink_to(tmp_path / "local")
    summary = run(family.config(), tmp_path / "out")
    assert not hub.seen()
    assert summary.model_digest == run(family.local_config(), tmp_path / "o").model_digest


# ---------------------------------------------------------------- who may read


@pytest.mark.parametrize("access", ["gated", "private"])
def test_the_token_goes_to_the_hub_alone(
    hub: Hub, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, access: str
) -> None:
    for path in (family.base, *family.experts):
        set_refs(hub.folder, family.name(path), access=access)
    result = command(tmp_path, family, "plan")
    words = ("gated", "access at") if access == "gated" else ("does not exist", "private")
    assert_paragraph(result, 2, f"hf://{family.user}/", "hf auth login", "HF_TOKEN", *words)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.forget()
    out = tmp_path / "out"
    result = command(tmp_path, family, "merge", str(out), "--debug")
    assert result.exit_code == 0, result.output
    assert TOKEN not in result.output
    assert all(TOKEN.encode() not in p.read_bytes() for p in out.rglob("*") if p.is_file())
    told = {
        who: {s["authorization"] for s in hub.seen() if s["who"] == who} for who in ("hub", "store")
    }
    assert told["hub"] >= {f"Bearer {TOKEN}"}
    assert told["store"] == {""}


def test_names_that_are_wrong(hub: Hub, family: Family, tmp_path: Path) -> None:
    result = command(tmp_path, family, "plan", base="user0/nothing-of-the-kind")
    assert_paragraph(
        result, 2, "no directory user0/nothing-of-the-kind", "does not exist on the Hub"
    )
    result = command(tmp_path, family, "plan", base=f"{family.name(family.base)}@v9")
    assert_paragraph(result, 2, "@v9", "no such revision")
    with pytest.raises(ConfigError, match=r"a model on the Hub is hf://org/name"):
        family.config(names={"base": f"hf://{family.name(family.base)}/sub"})


def test_what_is_not_there(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert_paragraph(command(tmp_path, family, "plan"), 2, "not in the cache", "HF_HUB_OFFLINE")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", NO_SERVER)
    monkeypatch.setattr(hub_snapshot, "PATIENCE_S", 1.0)
    said = (f"there is no directory {family.user}/", "looking up hf://", "the network")
    assert_paragraph(command(tmp_path, family, "plan"), 1, *said)


def test_a_model_without_weights(hub: Hub, family: Family, tmp_path: Path) -> None:
    add_commit(hub.folder, f"{family.user}/empty", {"config.json": b"{}"})
    result = command(tmp_path, family, "plan", base=f"{family.user}/empty")
    assert_paragraph(result, 2, f"hf://{family.user}/empty@", "holds no safetensors files")


# ---------------------------------------------------------------- faults


def test_addresses_that_expire(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with hub_server(tmp_path / "repositories", expires_s=0.3) as hub:
        ask_hub(hub.endpoint, tmp_path / "hf", monkeypatch)
        data = bytes(range(256)) * 100
        add_commit(hub.folder, "user/model", {"model.safetensors": data})
        store = open_store("hf://user/model")
        for start in (0, 1000, 2000):
            assert store.read("model.safetensors", start, start + 500) == data[start:][:500]
        assert len([t for t in targets(hub, "hub") if "/resolve/" in t]) == 1
        time.sleep(0.4)
        assert store.read("model.safetensors", 7, 9) == data[7:9]
        assert len([t for t in targets(hub, "hub") if "/resolve/" in t]) == 2


def test_a_hub_that_is_busy(hub: Hub, family: Family, tmp_path: Path) -> None:
    """It says how long it wants to be left alone."""
    for path in (family.base, *family.experts):
        set_refs(hub.folder, family.name(path), busy_until=str(time.time() + 1.5))
    summary = run(family.config(), tmp_path / "out")
    assert summary.model_digest == run(family.local_config(), tmp_path / "o").model_digest
    asked = [target for target in targets(hub, "hub") if "/revision/" in target]
    assert 4 < len(asked) <= 12


def to_store(hub: Hub, endpoint: str) -> Rule:
    """Return the rule of a proxy before the Hub that sends on to another address of its store."""
    return Rule("rewrite", pattern=f"^location: {hub.store}", replacement=f"location: {endpoint}")


FAULTS: list[FaultName] = [
    "internal_error",
    "slow_down",
    "reset",
    "lost_response",
    "reset_body",
    "close_body",
    "shorten",
]


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fifth_of_all_requests_fails(
    hub: Hub, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: FaultName
) -> None:
    with faulty_proxy(hub.store) as store, faulty_proxy(hub.endpoint) as front:
        ask_hub(front.endpoint, tmp_path / "hf", monkeypatch)
        rule = Rule(fault, 0.2, match="^GET ")
        store.use(rule, seed=1)
        front.use(rule, to_store(hub, store.endpoint), seed=1)
        summary = run(family.config(), tmp_path / "out", shard_bytes=100_000)
        faults = store.faults().get(fault, 0), front.faults().get(fault, 0)
    assert min(faults) > 0
    assert summary.model_digest == run(family.local_config(), tmp_path / "o").model_digest


def test_a_store_that_is_gone(
    hub: Hub, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One paragraph, which shows no signature."""
    monkeypatch.setattr(retry, "PATIENCE_S", 1.0)
    with faulty_proxy(hub.endpoint) as front:
        ask_hub(front.endpoint, tmp_path / "hf", monkeypatch)
        front.use(to_store(hub, NO_SERVER))
        result = command(tmp_path, family, "plan")
    assert_paragraph(result, 1, f"hf://{family.user}/", f"ConnectionError at {NO_SERVER}")
    assert "Signature" not in result.output


def test_a_version_that_is_not_the_planned_one(hub: Hub, family: Family) -> None:
    store = open_store(f"hf://{family.name(family.base)}")
    stat = store.stat("model.safetensors")
    with pytest.raises(InputChangedError, match="was changed"):
        store.open_reader("model.safetensors", dataclasses.replace(stat, version="0" * 64))
    with pytest.raises(StorageError, match="no such file"):
        store.stat("nothing")
