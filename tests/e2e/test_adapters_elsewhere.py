"""Merges of adapters from anywhere, by any backend, interrupted or not: the same bytes."""

from __future__ import annotations

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from huggingface_hub import snapshot_download

from della_dist import plan
from della_dist.config import MergeConfig, config_from_mapping
from della_dist.errors import OutputError
from della_dist.ops.gpu.backend import TorchBackend
from della_dist.ops.tensor import load_backend
from della_dist.planning.memory import MemoryBudget
from della_dist.runtime.open_plan import open_plan
from della_dist.runtime.options import RunOptions
from della_dist.runtime.task.context import MergeContext
from della_dist.runtime.task.inputs import InputStores
from della_dist.runtime.task.merge import digest_tensor
from della_dist.runtime.task.meter import Meter
from della_dist.storage.hub import snapshot as hub_snapshot
from tests.adapters import save_adapter, save_llama
from tests.hub import files_of
from tests.interrupting import interrupt
from tests.merging import run
from tests.remote import upload
from tests.servers.hub import Hub, add_commit
from tests.staged import NAMING, by_hand, contents, document, staged


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_llama(folder / "base")
    save_adapter(folder / "base", folder / "a", target_modules="all-linear")
    save_adapter(folder / "base", folder / "b", seed=2, use_dora=True, modules_to_save=["norm"])
    return folder


def config_of(where: str, method: str = "della") -> MergeConfig:
    """Return a merge of two adapters, whose folders are called as `where` says."""
    base, a, b = (where.format(name) for name in ("base", "a", "b"))
    content = {
        "merge_method": method,
        "base_model": base,
        "models": [
            {"model": f"{base}+{a}", "parameters": {"weight": 1.0}},
            {"model": f"{base}+{b}", "parameters": {"weight": 0.5}},
        ],
        "parameters": {"density": 0.5},
        "seed": 3,
    }
    return config_from_mapping(content, "merge.yaml")


@pytest.fixture(scope="module")
def config(folder: Path) -> MergeConfig:
    return config_of(f"{folder}/{{}}")


@pytest.fixture(scope="module")
def digest(config: MergeConfig, tmp_path_factory: pytest.TempPathFactory) -> str:
    return run(config, tmp_path_factory.mktemp("once") / "out").model_digest


@pytest.mark.s3
def test_from_a_bucket(folder: Path, digest: str, tmp_path: Path, s3_bucket: str) -> None:
    root = f"s3://{s3_bucket}/in"
    for name in ("base", "a", "b"):
        upload(folder / name, f"{root}/{name}")
    there = config_of(f"{root}/{{}}")
    summary = run(there, tmp_path / "out", memory_bytes=64 << 20)
    assert summary.model_digest == digest
    projected = plan(there, options=RunOptions(device="cpu", memory_bytes=64 << 20))
    assert projected.bytes_to_read == summary.bytes_read


@pytest.mark.parametrize("cached", [False, True])
def test_from_the_hub(folder: Path, digest: str, tmp_path: Path, hub: Hub, cached: bool) -> None:
    for name in ("base", "a", "b"):
        add_commit(hub.folder, f"lora-{cached}/{name}", files_of(folder / name))
        if cached:
            snapshot_download(f"lora-{cached}/{name}")
    hub_snapshot.forget_snapshots()
    assert run(config_of(f"lora-{cached}/{{}}"), tmp_path / "out").model_digest == digest
    revision = config_of(f"hf://lora-{cached}/{{}}@main")
    assert run(revision, tmp_path / "pinned").model_digest == digest


def test_interrupted_and_resumed(config: MergeConfig, digest: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupt(config, out, after=3, shard_bytes=20_000)
    summary = run(config, out, shard_bytes=20_000)
    assert summary.tasks_resumed == 3
    assert summary.model_digest == digest


def test_another_adapter_is_another_merge(folder: Path, tmp_path: Path) -> None:
    inputs = shutil.copytree(folder, tmp_path / "in")
    config, out = config_of(f"{inputs}/{{}}"), tmp_path / "out"
    run(config, out)
    shutil.rmtree(inputs / "a")
    save_adapter(inputs / "base", inputs / "a", seed=7, target_modules="all-linear")
    with pytest.raises(OutputError, match=r"adapter_model.safetensors"):
        run(config, out)
    # The same two the other way round, too.
    swapped = config_of(f"{folder}/{{}}").normalized()
    swapped["models"].reverse()
    run(config_of(f"{folder}/{{}}"), tmp_path / "other")
    with pytest.raises(OutputError, match=r"holds another merge: .*config.models\[0\]"):
        run(config_from_mapping(swapped, "merge.yaml"), tmp_path / "other")


def test_both_backends(config: MergeConfig, digest: str, tmp_path: Path) -> None:
    torch_backend = TorchBackend("cpu")
    plan_of = open_plan(config)
    with ThreadPoolExecutor(2) as compute:
        contexts = [
            MergeContext(
                plan_of, backend, MemoryBudget(64 << 20, 1, 2), compute, Meter(),
                threading.Event(), InputStores(4),
            )
            for backend in (load_backend("numba"), torch_backend)
        ]  # fmt: skip
        for shard in plan_of.shards:
            for tensor in shard.tensors:
                one, other = (digest_tensor(context, tensor) for context in contexts)
                assert one == other, tensor.name


def test_relative_and_home(
    folder: Path, digest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    assert run(config_of("./{}"), tmp_path / "here").model_digest == digest
    monkeypatch.setenv("HOME", str(folder))
    assert run(config_of("~/{}"), tmp_path / "home").model_digest == digest
    assert run(config_of("{}"), tmp_path / "names").model_digest == digest


def test_on_the_output_of_a_stage(folder: Path, tmp_path: Path) -> None:
    """Behind its name, and alone where it is the base."""
    base, a, b = (folder / name for name in ("base", "a", "b"))
    documents = [
        document([f"{base}+{a}"], "task_arithmetic", name="one", base_model=base),
        document([f"one+{b}"], "della", name="two", base_model=base),
        document([a, "two"], "della", base_model="one"),
    ]
    config = staged(*documents)
    run(config, tmp_path / "out")
    hand = by_hand(config, tmp_path / "hand")
    assert contents(tmp_path / "out", but=NAMING) == contents(hand, but=NAMING)
