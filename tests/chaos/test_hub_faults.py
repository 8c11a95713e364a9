"""A Hub whose network and servers fail while a merge is uploaded: it ends right, or in one line."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import pytest
from click.testing import CliRunner

from della_dist.cli import main
from della_dist.config import MergeConfig
from della_dist.storage.remote import retry
from della_dist.storage.run_history import RUN_NAME
from tests.conftest import ask_hub
from tests.merging import assert_paragraph, config_for, run, save_family, write_config
from tests.servers.faults import FaultName
from tests.servers.hub import Hub
from tests.servers.hub_writes import TOKEN
from tests.servers.proxy import Proxy, Rule, faulty_proxy
from tests.staged import contents

pytestmark = [
    pytest.mark.slow,
    # Of huggingface_hub's own calls of its HTTP client.
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
]

SHARD_BYTES = 100_000
#: Shards of the family are sent in several parts.
PART_BYTES = 40_000


def number_of(request: pytest.FixtureRequest) -> int:
    """Return the test's own number: which requests fail hangs on what they are for."""
    return zlib.crc32(request.node.name.encode())


@pytest.fixture
def config(tmp_path: Path, request: pytest.FixtureRequest) -> MergeConfig:
    base, experts = save_family(tmp_path / "family")
    (base / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return config_for(base, experts, parameters={"density": 0.5}, seed=number_of(request))


@pytest.fixture
def name(hub: Hub, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    # huggingface_hub waits for seconds before it repeats a request; what is repeated is ours.
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return f"writer/faults{number_of(request)}"


def check(hub: Hub, config: MergeConfig, name: str, tmp_path: Path) -> None:
    """One commit, with the bytes of the local output; the token went to the Hub alone."""
    whole = tmp_path / "whole"
    run(config, whole, shard_bytes=SHARD_BYTES)
    files = hub.files(name)
    del files[".gitattributes"], files[RUN_NAME]
    assert files == contents(whole)
    assert len(hub.commits(name)) == 2
    assert not any(s["authorization"] for s in hub.seen() if s["who"] == "store")
    assert not list((tmp_path / "hf" / "della-dist").glob("*/*"))


@pytest.mark.parametrize(
    "fault", ["internal_error", "slow_down", "reset", "lost_response", "flip_request"]
)
def test_a_fifth_of_all_requests_fails(
    hub: Hub,
    config: MergeConfig,
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: FaultName,
) -> None:
    with faulty_proxy(hub.store) as store, faulty_proxy(hub.endpoint) as front:
        ask_hub(front.endpoint, tmp_path / "hf", monkeypatch)
        hub.use(store=store.endpoint, chunk_bytes=PART_BYTES)
        store.use(Rule(fault, 0.2, match="^PUT "), seed=2)
        if fault != "flip_request":  # what is not content has no checksum but TLS's
            front.use(Rule(fault, 0.2), seed=2)
        run(config, f"hf://{name}", shard_bytes=SHARD_BYTES)
        faults = store.faults().get(fault, 0), front.faults().get(fault, 0)
    assert faults[0] > 0
    assert faults[1] > 0 or fault == "flip_request"
    check(hub, config, name, tmp_path)


def test_the_answer_to_the_commit_is_lost(
    hub: Hub,
    config: MergeConfig,
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It was made, and is not made again."""
    with faulty_proxy(hub.endpoint) as front:
        ask_hub(front.endpoint, tmp_path / "hf", monkeypatch)
        front.use(Rule("lost_response", match="^POST .*/commit/", times=1))
        run(config, f"hf://{name}", shard_bytes=SHARD_BYTES)
        assert front.faults()["lost_response"] == 1
    check(hub, config, name, tmp_path)


@pytest.mark.parametrize("busy", ["PUT ", "preupload", "/batch", "/commit/", "repos/create"])
def test_a_hub_that_wants_to_be_left_alone(
    hub: Hub, config: MergeConfig, name: str, tmp_path: Path, busy: str
) -> None:
    """429 with Retry-After, at whatever is asked."""
    hub.use(busy=busy, times=2)
    run(config, f"hf://{name}", shard_bytes=SHARD_BYTES)
    check(hub, config, name, tmp_path)


def test_addresses_that_expire(
    hub: Hub, config: MergeConfig, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hub is asked for another one."""
    with faulty_proxy(hub.store) as store:
        hub.use(store=store.endpoint, expires_s=0.5)
        store.use(Rule("delay", seconds=0.8, match="^PUT ", times=3))
        run(config, f"hf://{name}", shard_bytes=SHARD_BYTES)
        assert 403 in {seen.status for seen in store.seen()}
    hub.use()
    check(hub, config, name, tmp_path)


@pytest.mark.parametrize("gone", ["store", "hub"])
def test_gone_for_good(
    hub: Hub,
    config: MergeConfig,
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    gone: str,
) -> None:
    """One paragraph without a signature; what was merged is kept, and sent by the next run."""
    monkeypatch.setattr(retry, "PATIENCE_S", 1.0)
    path = write_config(tmp_path / "config.yaml", config)
    command = ["merge", str(path), f"hf://{name}", "--quiet", "--shard-size", str(SHARD_BYTES)]
    with faulty_proxy(hub.store) as store, faulty_proxy(hub.endpoint) as front:
        ask_hub(front.endpoint, tmp_path / "hf", monkeypatch)
        hub.use(store=store.endpoint)
        broken: Proxy = store if gone == "store" else front
        broken.use(Rule("reset", match="^(PUT|POST .*/commit/)"))
        result = CliRunner().invoke(main, command)
        assert_paragraph(result, 1, f"hf://{name}", "Check the store and the network")
        assert TOKEN not in result.output
        assert "Signature" not in result.output
        assert set(hub.files(name)) == {".gitattributes"}
        broken.use()
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 0, result.output
    monkeypatch.undo()
    check(hub, config, name, tmp_path)
