"""Merges from and to object stores: the same bytes as on a disk."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from della_dist.cli import main
from della_dist.config import MergeConfig
from della_dist.errors import ConfigError, InputChangedError, InputError, OutputError
from della_dist.runtime.options import RunOptions
from della_dist.runtime.run import merge
from della_dist.runtime.verify import verify
from della_dist.storage.opening import open_output_store
from tests.merging import config_for, run, save_family, write_config
from tests.remote import download, upload_inputs
from tests.staged import NAMING, contents

_numbers = itertools.count()
MIB = 1 << 20


@pytest.fixture(
    params=[
        "memory",
        pytest.param("s3", marks=pytest.mark.s3),
        pytest.param("rgw", marks=pytest.mark.rgw),
    ],
)
def root(request: pytest.FixtureRequest) -> Iterator[str]:
    """Return a fresh URL."""
    if request.param in ("s3", "rgw"):
        yield f"s3://{request.getfixturevalue(f'{request.param}_bucket')}/some/where"
        return
    location = f"memory://e2e-{next(_numbers)}"
    yield location
    store = open_output_store(location)
    for key in store.list():
        store.delete(key)


@pytest.fixture(params=["della", "ties", "dare_linear", "model_stock"])
def config(request: pytest.FixtureRequest, tmp_path: Path) -> MergeConfig:
    """Return a merge of small local checkpoints."""
    base, experts = save_family(tmp_path / "in", num_shards=3, config={"model_type": "llama"})
    parameters = {"density": 0.4, "rescale": "l1"} if request.param == "della" else {"density": 0.4}
    return config_for(base, experts, request.param, parameters=parameters)


def files_of(folder: Path) -> dict[str, bytes]:
    # The model card and the manifest name the inputs, and those are elsewhere.
    return contents(folder, but=NAMING)


def test_same_bytes_from_and_to_anywhere(config: MergeConfig, root: str, tmp_path: Path) -> None:
    expected = run(config, tmp_path / "out", shard_bytes=100_000)
    remote = upload_inputs(config, f"{root}/in")
    for name, memory, workers in (("a", 128 * MIB, 1), ("b", 1024 * MIB, 3)):
        summary = run(
            remote, f"{root}/{name}", shard_bytes=100_000, memory_bytes=memory, workers=workers
        )
        assert summary.model_digest == expected.model_digest
        assert summary.output == f"{root}/{name}"
        got = files_of(download(f"{root}/{name}", tmp_path / name))
        assert got == files_of(tmp_path / "out")
        assert not open_output_store(f"{root}/{name}").has_state()
    # Mixed: from a disk to the store, from the store to a disk.
    assert run(config, f"{root}/c").model_digest == expected.model_digest
    assert run(remote, tmp_path / "d").model_digest == expected.model_digest
    # Again: nothing to do.
    again = run(remote, f"{root}/a", shard_bytes=100_000)
    assert again.tasks_resumed == again.num_tasks == expected.num_tasks
    assert again.bytes_read == 0


def test_verify(config: MergeConfig, root: str) -> None:
    remote = upload_inputs(config, f"{root}/in")
    digest = run(remote, f"{root}/out", shard_bytes=100_000).model_digest
    summary = verify(f"{root}/out", recompute=4)
    assert summary.model_digest == digest
    assert len(summary.recomputed) == 4


@pytest.fixture
def small(tmp_path: Path) -> MergeConfig:
    """Return a merge of small local checkpoints."""
    base, experts = save_family(tmp_path / "in", num_shards=2)
    return config_for(base, experts, "della", parameters={"density": 0.4})


def test_an_interrupted_run_continues(
    small: MergeConfig, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from della_dist.runtime.output.commit import Output

    remote = upload_inputs(small, f"{root}/in")
    expected = run(remote, f"{root}/whole", shard_bytes=100_000)
    commit = Output.commit

    def stop_after_two(self: Output, record: object) -> None:
        if len(self.committed) == 2:
            raise RuntimeError
        commit(self, record)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Output, "commit", stop_after_two)
        with pytest.raises(RuntimeError):
            run(remote, f"{root}/out", shard_bytes=100_000, workers=1)
    store = open_output_store(f"{root}/out")
    assert not store.exists("config.json")
    assert not store.exists("della_manifest.json")
    assert len(store.list(".della/tasks/")) == 2
    summary = run(remote, f"{root}/out", shard_bytes=100_000)
    assert summary.tasks_resumed == 2
    assert summary.model_digest == expected.model_digest


def test_input_changed_between_runs(
    small: MergeConfig, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from della_dist.runtime.output.commit import Output

    remote = upload_inputs(small, f"{root}/in")
    commit = Output.commit

    def stop_after_one(self: Output, record: object) -> None:
        if self.committed:
            raise RuntimeError
        commit(self, record)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Output, "commit", stop_after_one)
        with pytest.raises(RuntimeError):
            run(remote, f"{root}/out", shard_bytes=100_000, workers=1)
    change(f"{root}/in/expert1")
    with pytest.raises(OutputError, match=r"holds an unfinished run of another merge: .*version"):
        run(remote, f"{root}/out", shard_bytes=100_000)
    assert run(remote, f"{root}/out", shard_bytes=100_000, restart=True).tasks_resumed == 0


def change(location: str) -> None:
    """Change a byte in the middle of a checkpoint's last shard, without changing its size."""
    store = open_output_store(location)
    name = next(key for key in reversed(store.list()) if key.endswith(".safetensors"))
    data = bytearray(store.read(name))
    data[len(data) // 2] ^= 1
    store.put(name, bytes(data))


def test_input_changed_during_a_run(small: MergeConfig, root: str) -> None:
    remote = upload_inputs(small, f"{root}/in")

    def watch(goal: object, snapshot: object) -> None:
        change(f"{root}/in/expert1")

    out = f"{root}/out"
    with pytest.raises(
        InputChangedError, match=r"expert1/model.*was changed while the merge was running"
    ):
        merge(remote, out, RunOptions(device="cpu"), watch=watch)
    # What is committed is kept for the old object, if that comes back, and never joined to the new.
    with pytest.raises(OutputError, match=r"another merge: .*expert1/model.*: version was"):
        run(remote, out)


def test_what_is_refused(small: MergeConfig, root: str, tmp_path: Path) -> None:
    remote = upload_inputs(small, f"{root}/in")
    with pytest.raises(OutputError, match="overlap"):
        run(remote, f"{root}/in/base/out")
    with pytest.raises(OutputError, match="overlap"):
        run(remote, root)
    for name in ("README.md", "model.safetensors", "adapter_model.safetensors"):
        other = open_output_store(f"{root}/other")
        other.put(name, b"somebody's")
        with pytest.raises(OutputError, match=f"holds {name}, which"):
            run(remote, f"{root}/other")
        assert other.list() == [name]
        other.delete(name)
    with pytest.raises(ConfigError, match=r"--memory is 32 MiB; .* the least is"):
        run(remote, f"{root}/out", memory_bytes=32 * MIB)
    with pytest.raises(OutputError, match="holds no finished output"):
        verify(f"{root}/out")
    broken = small.normalized()
    broken["base_model"] = f"{root}/nothing"
    (tmp_path / "broken.json").write_text(json.dumps(broken))
    from della_dist.config import load_config

    with pytest.raises(InputError, match="nothing holds nothing"):
        run(load_config(tmp_path / "broken.json"), tmp_path / "out")
    assert open_output_store(f"{root}/out").list() == []


def test_command_line(small: MergeConfig, root: str, tmp_path: Path) -> None:
    path = str(write_config(tmp_path / "config.yaml", upload_inputs(small, f"{root}/in")))
    out = f"{root}/out"

    def invoke(*arguments: str) -> Result:
        return CliRunner().invoke(main, list(arguments))

    planned = invoke("plan", path, out, "--json", "--shard-size", "100kB")
    assert planned.exit_code == 0, planned.stderr
    described = json.loads(planned.stdout)
    assert described["output"] == out
    assert described["base"] == f"{root}/in/base"
    assert described["tasks_committed"] == 0
    # What is read ahead and what is on its way out are part of the promise.
    assert described["projected_mem"] > 512 * MIB
    assert open_output_store(out).list() == []
    merged = invoke("merge", path, out, "--json", "--shard-size", "100kB", "--quiet")
    assert merged.exit_code == 0, merged.stderr
    summary = json.loads(merged.stdout)
    assert summary["num_tasks"] == described["num_tasks"]
    again = invoke("merge", path, out, "--shard-size", "100kB")
    assert f"{out} is complete already" in again.stdout
    verified = invoke("verify", out, "--recompute", "2")
    assert verified.exit_code == 0, verified.stderr
    assert f"digest  {summary['model_digest']}" in verified.stdout
    change(out)
    assert invoke("verify", out).exit_code == 3


@pytest.mark.parametrize("command", ["plan", "merge"])
def test_credentials_in_the_output_are_refused_and_not_shown(
    small: MergeConfig, tmp_path: Path, command: str
) -> None:
    path = str(write_config(tmp_path / "config.yaml", small))
    for out in ("s3://AKIAKEY:hushhush@bucket/out", "s3://bucket/out?X-Amz-Signature=hushhush"):
        refused = CliRunner().invoke(main, [command, path, out])
        assert refused.exit_code == 2
        assert "environment" in refused.stderr
        assert "hushhush" not in refused.stderr
        assert "AKIAKEY" not in refused.stderr
